"""Figures with intervals as cells, and cells as an aligned table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def cell(value: Any) -> str:
    """A figure as text: "0.512 [0.480, 0.547]" for [mean, low, high], "0.512", or "-" for None."""
    if value is None:
        return "-"
    if not isinstance(value, (list, tuple, float)):
        return str(value)
    parts = [value] if isinstance(value, float) else value
    digits = 1 if abs(parts[0]) >= 10 else 3
    # Adding 0 turns -0.0 into 0.0, so that rounding does not leave a sign.
    mean, *ends = (f"{round(part, digits) + 0.0:.{digits}f}" for part in parts)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text: columns of equal width, and a rule below the first line."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * w for w in widths))
    return [line.rstrip() for line in text]
