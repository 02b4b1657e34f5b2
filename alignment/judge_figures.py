"""Figures of a judge from its one-order logits: position, length, transitivity, calibration.

Pairs of identical texts are counted and otherwise left out: there is nothing to prefer.

Shape legend: N prompts, K responses each, P = K(K−1)/2 unordered pairs i < j, T triples i < j < k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sparring.alignment.games import cyclic_part, pairwise_probabilities
from sparring.launch.statistics import (
    FloatArray,
    Resamples,
    fit_logistic,
    percentile_interval,
)

BoolArray = npt.NDArray[np.bool_]

BINS = 10
_RESAMPLES = 1000
# P̂ of the same terms in another order differs in the last bits; see `pairs`.
_TIE = 1e-9


class Ratio(NamedTuple):
    """A figure that is Σ over / Σ under, both (N,) sums over the pairs of each prompt."""

    over: FloatArray
    under: FloatArray

    @classmethod
    def mean(cls, values: npt.ArrayLike, counted: BoolArray) -> Ratio:
        """The mean of `values` (N, ...) where `counted`."""
        given = np.where(counted, np.asarray(values, dtype=np.float64), 0.0)
        flat = given.reshape(len(given), -1), counted.reshape(len(given), -1)
        return cls(flat[0].sum(1), flat[1].sum(1).astype(np.float64))


def _pairs(matrix_NKK: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """(N, P) entries ij and ji, i < j."""
    matrix = np.asarray(matrix_NKK, dtype=np.float64)
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2]:
        raise ValueError(f"logits must have shape (N, K, K), got {matrix.shape}")
    i, j = np.triu_indices(matrix.shape[1], 1)
    return matrix[:, i, j], matrix[:, j, i]


def different_texts(texts: Sequence[Sequence[str]]) -> BoolArray:
    """(N, P) whether the two responses of a pair are different texts."""
    return np.array([[a != b for a, b in combinations(row, 2)] for row in texts], dtype=bool)


def position(logits_NKK: npt.ArrayLike, different_NP: BoolArray) -> dict[str, Ratio]:
    """What the order of presentation does; L_ij has i in the first place.

    Returns:
        swap_consistency: pairs with the same verdict in both orders. Opposite signs of L_ij and
            L_ji count 1, two zeros 1 (a tie twice), one zero ½.
        first_place_advantage: mean of σ(L_ij) over ordered pairs, − ½; 0 when indifferent.
        first_place_offset: mean of (L_ij + L_ji)/2, in logits.
        tie_rate: pairs with L_ij = L_ji, ties once both orders are heard.
    """
    forward, backward = _pairs(logits_NKK)
    signs = np.sign(forward), -np.sign(backward)
    same = 1 - np.abs(signs[0] - signs[1]) / 2
    chance = (2 + np.tanh(forward / 2) + np.tanh(backward / 2)) / 4
    return {
        "swap_consistency": Ratio.mean(same, different_NP),
        "first_place_advantage": Ratio.mean(chance - 0.5, different_NP),
        "first_place_offset": Ratio.mean((forward + backward) / 2, different_NP),
        "tie_rate": Ratio.mean(forward == backward, different_NP),
    }


def longer_wins(
    logits_NKK: npt.ArrayLike, lengths_NK: npt.ArrayLike, different_NP: BoolArray
) -> Ratio:
    """Share of pairs, not tied and of different length, in which the longer response wins."""
    forward, backward = _pairs(logits_NKK)
    margin, difference = forward - backward, _length_difference(lengths_NK)
    counted = different_NP & (margin != 0) & (difference != 0)
    return Ratio.mean(margin * difference > 0, counted)


def _length_difference(lengths_NK: npt.ArrayLike) -> FloatArray:
    lengths = np.asarray(lengths_NK, dtype=np.float64)
    i, j = np.triu_indices(lengths.shape[1], 1)
    return lengths[:, i] - lengths[:, j]


def transitivity(logits_NKK: npt.ArrayLike, different_NP: BoolArray) -> dict[str, Ratio]:
    """Whether preferences could come from ratings, both orders averaged.

    Returns:
        cyclic_triples: share of triples i ≻ j ≻ k ≻ i among those without a tie or a copy; coins
            give ¼. Left out for K < 3.
        cyclicity: share of the squared logits that no r_i − r_j explains (`games.cyclic_part`);
            independent noise gives (K − 2)/K.
    """
    logits = np.asarray(logits_NKK, dtype=np.float64)
    figures = {"cyclicity": Ratio(*cyclic_part(logits))}
    count = logits.shape[1]
    if count >= 3:
        sign = np.sign(logits - np.swapaxes(logits, 1, 2))
        i, j, k = np.array(list(combinations(range(count), 3))).T
        around = sign[:, i, j], sign[:, j, k], sign[:, k, i]
        different = np.zeros(logits.shape, dtype=bool)
        different[:, *np.triu_indices(count, 1)] = different_NP
        decided = different[:, i, j] & different[:, j, k] & different[:, i, k]
        decided &= (around[0] != 0) & (around[1] != 0) & (around[2] != 0)
        cyclic = np.abs(around[0] + around[1] + around[2]) == 3
        figures["cyclic_triples"] = Ratio.mean(cyclic, decided)
    return figures


def agreement(
    first_NKK: npt.ArrayLike, second_NKK: npt.ArrayLike, different_NP: BoolArray
) -> dict[str, Ratio]:
    """How far two judges of the same responses agree, both orders averaged.

    Returns:
        agreement: 1 for the same verdict (two ties are the same), ½ where one alone ties, else 0.
        kendall: mean over prompts of Kendall's τ_b between the two rankings by P̂; prompts in which
            a judge has all P̂ equal do not count.
    """
    signs, ranks = [], []
    for logits in (first_NKK, second_NKK):
        forward, backward = _pairs(logits)
        signs.append(np.sign(forward - backward))
        win = pairwise_probabilities(logits).mean(axis=2)
        gap = _length_difference(win)
        ranks.append(np.sign(gap) * (np.abs(gap) > _TIE))
    same = 1 - np.abs(signs[0] - signs[1]) / 2
    norm = np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))
    ranked = norm > 0
    tau = (ranks[0] * ranks[1]).sum(1) / np.where(ranked, norm, 1)
    return {"agreement": Ratio.mean(same, different_NP), "kendall": Ratio.mean(tau, ranked)}


class Measure:
    """Figures as [value, low, high], resampling groups of prompts."""

    def __init__(self, groups: Sequence[str], seed: int, level: float) -> None:
        self._draws = Resamples(groups, seed=seed, resamples=_RESAMPLES)
        self._level = level

    def ratios(self, figures: Mapping[str, Ratio]) -> dict[str, list[float] | None]:
        """None where nothing was counted."""
        columns = np.stack([column for ratio in figures.values() for column in ratio], axis=1)
        resampled, ratio_sums, found = self._draws.sums(columns), columns.sum(0), {}
        for n, name in enumerate(figures):
            place = slice(2 * n, 2 * n + 2)
            found[name] = self._interval(_quotient_of, ratio_sums[place], resampled[:, place])
        return found

    def slope(
        self,
        feature_NP: FloatArray,
        target_NP: FloatArray,
        counted: BoolArray,
        *,
        standardised: bool,
    ) -> list[float] | None:
        """b of σ(b·feature) ~ target over the counted pairs; no intercept, as i, j have no order.

        `standardised`: b is per root mean square of the feature, not per unit.

        A resample's b is one Newton step from that of all pairs: exact enough for an interval,
        and as quick as a mean.
        """
        scale = float(np.sqrt(np.mean(feature_NP[counted] ** 2))) if counted.any() else 0.0
        if scale == 0:
            return None
        feature = np.where(counted, feature_NP / scale, 0.0)
        unit = 1.0 if standardised else scale
        ridge = 1e-6 * float(counted.sum())
        fitted = fit_logistic(feature[counted][:, None], target_NP[counted], ridge=ridge)[0, 0]
        chance = 0.5 + 0.5 * np.tanh(fitted * feature / 2)
        slope = (np.where(counted, chance - target_NP, 0.0) * feature).sum(1)
        bend = (chance * (1 - chance) * feature**2).sum(1)

        def step(sums: FloatArray) -> FloatArray:
            change = (sums[..., 0] + ridge * fitted) / (sums[..., 1] + ridge)
            return np.asarray((fitted - change) / unit)

        columns = np.stack([slope, bend], axis=1)
        return self._interval(step, columns.sum(0), self._draws.sums(columns))

    def reliability(
        self, first_NP: FloatArray, second_NP: FloatArray, counted: BoolArray
    ) -> tuple[list[dict[str, float]], list[float] | None]:
        """Bins of P by the first judge with the second's mean, and the expected calibration error.

        Both orientations of a pair count, so that the numbering of responses does not matter.
        """
        first = np.concatenate([first_NP, 1 - first_NP], axis=1)
        second = np.concatenate([second_NP, 1 - second_NP], axis=1)
        both = np.concatenate([counted, counted], axis=1)
        bins = np.minimum((first * BINS).astype(int), BINS - 1)
        columns = []
        for b in range(BINS):
            inside = both & (bins == b)
            columns += [inside.sum(1), (inside * first).sum(1), (inside * second).sum(1)]
        stacked = np.stack(columns, axis=1).astype(np.float64)

        def error(sums: FloatArray) -> FloatArray:
            count, mine, other = (sums[..., n::3] for n in range(3))
            return _quotient(np.abs(mine - other).sum(-1), count.sum(-1))

        rows = [
            {"count": n / 2, "first": a / n, "second": b / n}
            for n, a, b in stacked.sum(0).reshape(BINS, 3).tolist()
            if n
        ]
        return rows, self._interval(error, stacked.sum(0), self._draws.sums(stacked))

    def _interval(
        self, figure: Callable[[FloatArray], FloatArray], sums: FloatArray, resampled: FloatArray
    ) -> list[float] | None:
        value = float(figure(sums))
        if not np.isfinite(value):
            return None
        return [float(x) for x in percentile_interval(value, figure(resampled), self._level)]


def _quotient_of(sums: FloatArray) -> FloatArray:
    return _quotient(sums[..., 0], sums[..., 1])


def _quotient(over: FloatArray, under: FloatArray) -> FloatArray:
    """over/under, NaN where under is 0."""
    positive = np.asarray(under) > 0
    return np.where(positive, over / np.where(positive, under, 1.0), np.nan)


def logit_figures(
    logits_NKK: npt.ArrayLike,
    lengths_NK: npt.ArrayLike,
    different_NP: BoolArray,
    groups: Sequence[str],
    *,
    second_NKK: npt.ArrayLike | None = None,
    seed: int,
    level: float = 0.95,
) -> dict[str, Any]:
    """All figures of arrays; see `position`, `longer_wins`, `transitivity` and `agreement`.

    Besides: `identical_rate`, the share of pairs that are one text twice; `length_slope`, b of
    σ(b·d) ~ P(i beats j) with d the difference of lengths over its root mean square; and with a
    second judge `temperature`, a of σ(a·L₁) ~ P₂ (½: the first judge is twice as sharp),
    `calibration_error` and `reliability`.

    Args:
        logits_NKK: one-order logits, row beats column, the row's response in the first place.
        lengths_NK: lengths of responses in any one unit.
        different_NP: `different_texts` of the responses.
        groups: (N,) labels of the groups that the bootstrap draws.
        second_NKK: another judge's logits of the same responses.
        seed, level: of the bootstrap.

    Returns:
        [value, low, high] a figure, None where it is undefined; `reliability` is a list of bins.
    """
    measure = Measure(groups, seed, level)
    every = np.ones_like(different_NP)
    ratios = {
        **position(logits_NKK, different_NP),
        "identical_rate": Ratio.mean(~different_NP, every),
        "longer_wins": longer_wins(logits_NKK, lengths_NK, different_NP),
        **transitivity(logits_NKK, different_NP),
    }
    if second_NKK is not None:
        ratios |= agreement(logits_NKK, second_NKK, different_NP)
    figures: dict[str, Any] = dict(measure.ratios(ratios))
    first = _pairs(pairwise_probabilities(logits_NKK))[0]
    difference = _length_difference(lengths_NK)
    counted = different_NP & (difference != 0)
    figures["length_slope"] = measure.slope(difference, first, counted, standardised=True)
    if second_NKK is not None:
        forward, backward = _pairs(logits_NKK)
        second = _pairs(pairwise_probabilities(second_NKK))[0]
        margin = (forward - backward) / 2
        figures["temperature"] = measure.slope(margin, second, different_NP, standardised=False)
        bins, error = measure.reliability(first, second, different_NP)
        figures |= {"calibration_error": error, "reliability": bins}
    return figures
