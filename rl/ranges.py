"""Checks of arguments, which recipes need too. Imports no torch."""

from __future__ import annotations


def check_count(name: str, value: int) -> None:
    """Raises ValueError: the number is below 1 or no whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises ValueError: the number is not in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], not {value!r}")
