"""The number types of docs/alignment/parity.md: what it prints is what its code prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "alignment" / "parity.md"


def test_what_rounding_leaves_of_an_update(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    ((code, printed),) = re.findall(r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", text, re.M | re.S)
    exec(compile(code, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == printed
