"""Every Python block of docs/diffusion/dndm.md runs, with warnings as errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_law import FIGURES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "diffusion" / "dndm.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)


def test_the_page_has_blocks_and_a_place_for_results() -> None:
    assert len(BLOCKS) == 5
    assert "\n<!-- results: dndm -->\n" in TEXT


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "DNDMScheduler" in block:
        pytest.importorskip("diffusers", reason="needs diffusers")
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_the_table_of_figures_is_the_tests_own() -> None:
    """Rows of T in the page against FIGURES of tiny_law.py."""
    for steps, (masked, blind, markov) in FIGURES.items():
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {steps} | ."))
        cells = [float(cell.strip("* ")) for cell in row.split("|")[2:-1]]
        assert cells == [masked, masked, blind, masked, markov]
