"""Checks of arguments, which recipes need too. Imports no torch."""

from __future__ import annotations

import operator


def check_count(name: str, value: int) -> int:
    """The number as Python's int, also where it is one of numpy's.

    Raises:
        ValueError: it is below 1 or no whole number.
    """
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")
    return count


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError: the number is not in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], not {value!r}")
