"""The data stages' page, run as a reader would paste it, and what its files hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sparring.alignment.rows import Pair
from sparring.launch.rows import read_rows

PAGE = Path(__file__).resolve().parents[2] / "docs/alignment/data-stages.md"


def block(kind: str, after: str) -> str:
    """The first code block of a kind behind a text of the page."""
    below = PAGE.read_text(encoding="utf-8").split(after, 1)[1]
    found = re.search(rf"^```{kind}\n(.*?)^```$", below, re.M | re.S)
    assert found, after
    return found[1]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-stages")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block("bash", "<!-- run by")],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder / "work"


def test_shards_are_merged_and_ranked(work: Path) -> None:
    merged = pq.read_table(work / "responses/responses.parquet").to_pylist()
    assert [(r["prompt_id"], r["k"]) for r in merged] == [
        (f"{n:06d}", k) for n in range(3) for k in range(3)
    ]
    ranked = pq.read_table(work / "judged/ranked.parquet").to_pylist()
    assert {(r["prompt_id"], r["k"]): r["text"] for r in ranked} == {
        (r["prompt_id"], r["k"]): r["text"] for r in merged
    }
    for n in range(3):
        mine = [r for r in ranked if r["prompt_id"] == f"{n:06d}"]
        assert sum(r["win_probability"] for r in mine) == pytest.approx(1.5)
        by_rank = sorted(mine, key=lambda r: r["rank"])
        assert by_rank == sorted(mine, key=lambda r: -r["win_probability"])


def test_responses_of_another_program_become_pairs(work: Path) -> None:
    ranked = pq.read_table(work / "given/ranked.parquet").to_pylist()
    assert max(ranked, key=lambda r: r["win_probability"])["text"] == "The Loire."
    (pair,) = read_rows(work / "pairs/pairs.parquet", Pair)
    assert pair.chosen_win > 0.5 > pair.rejected_win


def test_the_best_of_k_as_the_page_says(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work.parent)
    names: dict[str, dict[str, str]] = {}
    exec(block("python", "## What comes out"), names)
    assert set(names["best_of_k"]) == {"000000", "000001", "000002"}
