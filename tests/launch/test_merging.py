"""Portions made on machines of their own, merged: the bytes of the whole, or a clear refusal."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from one_stage import run_stage

from sparring.launch import cli, shards
from sparring.launch.config import parse_portion
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.stages import many, numbered


@pytest.mark.parametrize("rows", [1, 4, 5, 23, 24])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_portions_are_the_rows_in_order(rows: int, size: int) -> None:
    items = list(range(rows))
    chunks = -(-rows // size)
    for count in range(1, chunks + 1):
        parts = [shards.portion(items, size, f"{i}/{count}") for i in range(count)]
        assert [n for part in parts for n in part] == items
        assert all(parts)
        # A chunk is never torn apart, so what shares a batch stays the same.
        assert {start for part in parts for start in part[::size]} == set(items[::size])
    with pytest.raises(SparringError, match=rf"are {chunks} chunks, too few for {chunks + 1} sh"):
        shards.portion(items, size, f"0/{chunks + 1}")


@pytest.mark.parametrize("text", ["1", "a/b", "4/4", "5/4", "-1/4", "0/0", "1/4 "])
def test_malformed_portions(text: str) -> None:
    with pytest.raises(ValueError, match="a shard is i/n with i from 0 to n - 1"):
        parse_portion(text)


def test_a_portion_is_checked_before_anything_runs(tmp_path: Path) -> None:
    given = ["--model", "smollm2", "--prompts", "p.jsonl", "--out", str(tmp_path / "r")]
    with pytest.raises((SystemExit, UsageError)):
        cli._stage_options("generate", [*given, "--shard", "4/4"])


def test_numbered_inputs_keep_their_order() -> None:
    given = [f"step{n}" for n in range(12)]
    inputs = {"model": "m", **numbered("shards", given), "shards_of": "x"}
    assert many("shards", inputs) == given


@pytest.fixture(scope="module")
def work(
    tiny_model: Path, tiny_prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The whole of 160 prompts' responses, and the same in three shards."""
    folder = tmp_path_factory.mktemp("merging")
    inputs = {"model": tiny_model, "prompts": tiny_prompts}
    settings = {"engine": "transformers", "k": 2, "max_new_tokens": 6, "chunk": 23, "probes": 0}
    made = {"whole": run_stage("generate", folder / "whole", inputs, **settings).path}
    for n in range(3):
        made[f"{n}/3"] = run_stage(
            "generate", folder / f"s{n}", inputs, **settings, shard=f"{n}/3"
        ).path
    made["0/2"] = run_stage("generate", folder / "half", inputs, **settings, shard="0/2").path
    made["other"] = run_stage(
        "generate", folder / "seed", inputs, **settings, shard="1/3", seed=9
    ).path
    return made


def merged(output: Path, parts: list[Path]) -> Path:
    return run_stage("merge", output, numbered("shards", parts)).path


def test_merged_shards_are_the_bytes_of_the_whole(work: dict[str, Path], tmp_path: Path) -> None:
    parts = [work[f"{n}/3"] for n in (2, 0, 1)]  # in any order
    out = merged(tmp_path / "m", parts)
    whole = (work["whole"] / "responses.parquet").read_bytes()
    assert (out / "responses.parquet").read_bytes() == whole


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is nothing to merge"),
        (["0/3", "2/3"], "shard 1/3 is missing"),
        (["0/3", "0/3", "1/3", "2/3"], "shard 0/3 is given twice"),
        (["0/3", "0/2"], "is one of 2 shards, .* of 3"),
        (["0/3", "other", "2/3"], "no shards of the same work:\n  seed: 2 -> 9"),
        (["whole"], "is no shard: it was made without --shard"),
    ],
)
def test_what_is_not_the_whole_work_is_refused(
    work: dict[str, Path], tmp_path: Path, names: list[str], message: str
) -> None:
    with pytest.raises(SparringError, match=message):
        merged(tmp_path / "m", [work[name] for name in names])
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_incomplete_or_damaged_shards_are_refused(work: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparringError, match="not complete"):
        merged(tmp_path / "m", [tmp_path / "empty"])
    shutil.copytree(work["1/3"], tmp_path / "damaged")
    file = tmp_path / "damaged" / "responses.parquet"
    file.write_bytes(file.read_bytes()[::-1])  # as long as before
    with pytest.raises(SparringError, match=r"responses\.parquet changed after it was made"):
        merged(tmp_path / "m2", [work["0/3"], tmp_path / "damaged", work["2/3"]])
