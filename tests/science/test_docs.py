"""Every Python block of docs/science runs, one page in one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "science").glob("*.md"))
BLOCKS = {"index": 0, "compositional": 3, "admm": 3, "confdiff": 1}
"""Pages, and how many blocks they have at least."""


def test_the_pages_are_all_known() -> None:
    assert set(BLOCKS) == {page.stem for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= BLOCKS[page.stem]
    script = "import warnings; warnings.simplefilter('error')\n" + "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
