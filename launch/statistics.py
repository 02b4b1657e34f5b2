"""Error bars: bootstrap intervals of means, ratios and refits; and logistic regression.

Prompts that were made from one base question rise and fall together, so the bootstrap draws whole
groups; drawing rows would make the interval too narrow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# Entries of a block of row weights; 32 MB of float64.
_BLOCK = 4_000_000


class Interval(NamedTuple):
    """A mean and the ends of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float


def _vector(name: str, values: npt.ArrayLike) -> FloatArray:
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


class Resamples:
    """Resamples of whole groups, for figures that are computed from all rows anew.

    The draws are those of `bootstrap_mean` with the same seed, groups and number of resamples.

    Args:
        groups: (N,) group labels.
        seed: equal seeds give equal resamples.
        resamples: number of resamples, at least 1.

    Raises:
        ValueError: no rows, or no resamples.
    """

    def __init__(self, groups: npt.ArrayLike, *, seed: int, resamples: int = 2000) -> None:
        labels = np.asarray(groups)
        if labels.ndim != 1 or labels.size == 0:
            raise ValueError(f"groups must be a non-empty vector, got shape {labels.shape}")
        if resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {resamples}")
        self._number = _group_numbers(labels, labels.size)
        self._groups = int(self._number.max()) + 1
        self._seed, self._resamples = seed, resamples

    def _counts(self) -> Iterator[npt.NDArray[np.intp]]:
        """(G,) how often each group is drawn, a resample after the other."""
        rng = np.random.default_rng(self._seed)
        for _ in range(self._resamples):
            drawn = rng.integers(self._groups, size=self._groups)
            yield np.bincount(drawn, minlength=self._groups)

    def sums(self, columns_NF: npt.ArrayLike) -> FloatArray:
        """(resamples, F) sums of each column over the rows of each resample."""
        columns = np.asarray(columns_NF, dtype=np.float64)
        by_group = np.stack(
            [np.bincount(self._number, weights=c, minlength=self._groups) for c in columns.T], 1
        )
        return np.stack([counts @ by_group for counts in self._counts()])

    def weights(self) -> Iterator[npt.NDArray[np.float64]]:
        """How often each row is in each resample, in blocks (b, N) of bounded size."""
        block = max(1, _BLOCK // len(self._number))
        rows: list[FloatArray] = []
        for counts in self._counts():
            rows.append(counts[self._number].astype(np.float64))
            if len(rows) == block:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)


def percentile_interval(value: float, resampled: npt.ArrayLike, level: float) -> Interval:
    """A figure with the percentiles of its resamples, less those where it is undefined (NaN).

    Args:
        value: the figure over all rows.
        resampled: (R,) the figure in each resample.
        level: probability the interval is meant to cover, in (0, 1).

    Raises:
        ValueError: `level` is out of range, or no resample has the figure.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    figures = np.asarray(resampled, dtype=np.float64)
    figures = figures[~np.isnan(figures)]
    if not figures.size:
        raise ValueError("the figure is undefined in every resample")
    low, high = np.quantile(figures, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def fit_logistic(
    features_ND: npt.ArrayLike,
    target_N: npt.ArrayLike,
    *,
    ridge: float,
    weights_RN: npt.ArrayLike | None = None,
    steps: int = 60,
) -> FloatArray:
    """Ridge logistic regression, one fit for each row of weights.

    Minimises Σ_n w_n CE(t_n, σ(x_n·b)) + ½ ridge ‖b‖² by Newton's method, halving a step that does
    not go down. With a ridge above 0 separable data have a finite solution.

    Args:
        features_ND: (N, D); a column of ones makes an intercept, which is penalised too.
        target_N: (N,) in [0, 1]; soft labels are fine.
        ridge: at least 0.
        weights_RN: (R, N), not negative; all ones, R = 1, when None.

    Returns:
        (R, D) coefficients, in float64.

    Raises:
        ValueError: shapes differ, a target outside [0, 1], or a negative ridge.
    """
    design, target = (np.asarray(x, dtype=np.float64) for x in (features_ND, target_N))
    weights = np.ones((1, len(target))) if weights_RN is None else np.asarray(weights_RN, float)
    if design.ndim != 2 or target.shape != design.shape[:1] or weights.shape[1:] != target.shape:
        raise ValueError(
            "features (N, D), target (N,) and weights (R, N) do not fit: "
            f"{design.shape}, {target.shape}, {weights.shape}"
        )
    if not ((target >= 0) & (target <= 1)).all():  # NaN too
        raise ValueError("targets must be probabilities in [0, 1]")
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")

    def loss(coefficients: FloatArray) -> FloatArray:
        z = coefficients @ design.T
        entropy = np.logaddexp(0, z) - target * z
        value: FloatArray = (weights * entropy).sum(1) + ridge / 2 * (coefficients**2).sum(1)
        return value

    identity = np.eye(design.shape[1])
    fitted = np.zeros((len(weights), design.shape[1]))
    value = loss(fitted)
    for _ in range(steps):
        chance = 0.5 + 0.5 * np.tanh(fitted @ design.T / 2)  # σ without overflow
        slope = (weights * (chance - target)) @ design + ridge * fitted
        bend = weights * chance * (1 - chance)
        curve = np.swapaxes(design * bend[:, :, None], 1, 2) @ design
        # The second term only keeps a saturated fit without a ridge from being singular.
        curve += (ridge + 1e-12) * identity
        change = np.linalg.solve(curve, slope[:, :, None])[:, :, 0]
        size = np.ones((len(weights), 1))
        for _ in range(30):
            trial = loss(fitted - size * change)
            worse = trial > value + 1e-12 * np.abs(value)
            if not worse.any():
                break
            size[worse] /= 2
        fitted, value = fitted - size * change, loss(fitted - size * change)
        if np.abs(change).max() < 1e-9:
            break
    return fitted
