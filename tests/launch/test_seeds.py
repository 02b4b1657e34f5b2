"""Seed streams: one number for one name, unrelated numbers for others."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparring.launch.seeds import derive

names = st.lists(st.integers() | st.text("ab:\x1f1", max_size=4), max_size=3).map(tuple)


@given(st.integers(0, 3), names, st.integers(0, 3), names)
def test_different_names_give_different_seeds(
    one: int, path: tuple[int | str, ...], two: int, other: tuple[int | str, ...]
) -> None:
    # The type counts: 1 == True in Python, but prompt "1" is not sample 1.
    same = one == two and [*map(repr, path)] == [*map(repr, other)]
    assert (derive(one, *path) == derive(two, *other)) == same


@given(st.integers(), names)
def test_seeds_suit_torch_numpy_and_parquet(seed: int, path: tuple[int | str, ...]) -> None:
    assert 0 <= derive(seed, *path) < 2**62


def test_a_seed_is_the_same_on_every_machine() -> None:
    """Changing this changes every run: raise the stages' versions with it."""
    # printf '0\x1fstr:generate\x1fstr:iter0' | sha256sum, its first 8 bytes without 2 bits
    assert derive(0, "generate", "iter0") == 1132579076497913725


def test_the_numbers_look_random() -> None:
    bits = np.array([[derive(7, "p", n) >> b & 1 for b in range(62)] for n in range(2000)])
    # Each mean has standard deviation 0.0112; 62 of them stay within 4.5 of it.
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 4.5 * 0.5 / 2000**0.5
