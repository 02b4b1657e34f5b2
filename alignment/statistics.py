"""Error bars for win rates: means with bootstrap intervals, and differences of paired measures.

Prompts that were made from one base question rise and fall together, so the bootstrap draws whole
groups; drawing rows would make the interval too narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """A mean and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def _vector(name: str, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be a non-empty vector, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} is not finite at {np.flatnonzero(~np.isfinite(vector))[0]}")
    return vector


def _group_numbers(groups: npt.ArrayLike | None, size: int) -> npt.NDArray[np.intp]:
    """A number from 0 for the group of each row; every row its own group by default."""
    if groups is None:
        return np.arange(size)
    labels = np.asarray(groups)
    if labels.shape != (size,):
        raise ValueError(f"groups must have shape {(size,)} like the values, got {labels.shape}")
    return np.unique(labels, return_inverse=True)[1]


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean with a percentile interval from the cluster bootstrap.

    As many groups as there are get drawn with replacement, each bringing all its rows; a resample's
    mean is over its rows. A single group gives an interval of no width, which says nothing.

    Args:
        values: (N,) any unit.
        groups: (N,) group labels (strings or numbers); every row is its own group when None.
        seed: equal seeds give equal intervals.
        resamples: number of resamples, at least 1.
        level: probability the interval is meant to cover, in (0, 1).

    Returns:
        (mean, low, high); the mean is that of the values, not of the resamples.

    Raises:
        ValueError: no values, values that are not finite, groups of another length, or `resamples`
            or `level` out of range.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    vector = _vector("values", values)
    number = _group_numbers(groups, vector.size)
    sums = np.bincount(number, weights=vector)
    counts = np.bincount(number)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # all draws at once would be resamples × groups in memory
        drawn = rng.integers(counts.size, size=counts.size)
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(vector.mean()), float(low), float(high))


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    groups: npt.ArrayLike | None = None,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Mean of a − b over the same rows, with the interval of `bootstrap_mean`.

    Args:
        a: (N,) measure of one policy.
        b: (N,) the same measure of another, row by row on the same prompts.
        groups, seed, resamples, level: as in `bootstrap_mean`.

    Returns:
        (mean difference, low, high); 0 outside the interval means that the two differ.

    Raises:
        ValueError: a and b differ in length, or as `bootstrap_mean`.
    """
    first, second = _vector("a", a), _vector("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a and b must be paired, got {first.size} and {second.size} values")
    return bootstrap_mean(
        first - second, groups=groups, seed=seed, resamples=resamples, level=level
    )
