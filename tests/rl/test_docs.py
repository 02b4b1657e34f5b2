"""Every Python block of docs/rl runs, with warnings as errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "rl"
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in sorted(FOLDER.glob("*.md"))
    for number, block in enumerate(
        re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    )
]


def test_the_pages_have_blocks() -> None:
    assert len(BLOCKS) >= 5


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(block, "block", "exec"), {"__name__": "block"})
