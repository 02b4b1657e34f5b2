"""The empirical game: policies playing each other on held-out prompts.

A policy that beats its predecessor need not be harder to beat: preferences may be cyclic, and then
self-play circles (Swamy et al., arXiv 2401.04056; Munos et al., arXiv 2312.00886). What tells is
exploitability: how often the best answer to a policy wins. Here the answers are the iterates
themselves, so every figure is a lower bound on exploitability among all policies.

Shape legend: N rows (a prompt and response number), M policies, S samples of a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sparring.launch.statistics import (
    FloatArray,
    Interval,
    Resamples,
    bootstrap_mean,
    percentile_interval,
)


def pairwise_probabilities(logits_NMM: npt.ArrayLike) -> FloatArray:
    """σ((L_ab − L_ba)/2): the convention "pairwise" of `preferences`, in numpy and float64.

    Args:
        logits_NMM: (..., M, M) judge logits, row beats column.

    Returns:
        (..., M, M) with P_ab + P_ba = 1.
    """
    logits = np.asarray(logits_NMM, dtype=np.float64)
    return np.asarray(0.5 + 0.5 * np.tanh((logits - np.swapaxes(logits, -1, -2)) / 4))


def payoff(probabilities_NMM: npt.ArrayLike) -> FloatArray:
    """(M, M) probability that policy a beats policy b, the mean over rows."""
    return np.asarray(np.mean(_rows(probabilities_NMM), axis=0), dtype=np.float64)


def _rows(probabilities_NMM: npt.ArrayLike) -> FloatArray:
    rows = np.asarray(probabilities_NMM, dtype=np.float64)
    if rows.ndim != 3 or not rows.size or rows.shape[1] != rows.shape[2]:
        raise ValueError(f"probabilities must have shape (N, M, M), got {rows.shape}")
    return rows


def _game(payoff_MM: npt.ArrayLike, mixture_M: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    game, mixture = (np.asarray(x, dtype=np.float64) for x in (payoff_MM, mixture_M))
    if game.ndim != 2 or game.shape[0] != game.shape[1] or mixture.shape != game.shape[1:]:
        raise ValueError(
            f"a payoff (M, M) and a mixture (M,) are needed, got {game.shape} and {mixture.shape}"
        )
    if (mixture < 0).any() or not np.isclose(mixture.sum(), 1):
        raise ValueError(f"a mixture is probabilities that sum to 1, got {mixture.tolist()}")
    return game, mixture


def exploitability(payoff_MM: npt.ArrayLike, mixture_M: npt.ArrayLike) -> float:
    """max_a P(a beats the mixture) − ½, over the policies of the matrix.

    0 where no policy of the matrix beats the mixture; never below 0 when the mixture's policies are
    among them. A policy outside the matrix may exploit it further: this is a lower bound.

    Args:
        payoff_MM: (M, M) probability that row beats column, P + Pᵀ = 1.
        mixture_M: (M,) probability of playing each policy.

    Returns:
        In [0, ½].

    Raises:
        ValueError: shapes do not fit, or the mixture is no distribution.
    """
    game, mixture = _game(payoff_MM, mixture_M)
    return float((game @ mixture).max() - 0.5)


def duality_gap(payoff_MM: npt.ArrayLike, mixture_M: npt.ArrayLike) -> float:
    """max_a P(a beats the mixture) − min_b P(the mixture beats b), SPPO's gap (arXiv 2405.00675).

    Twice the exploitability where P + Pᵀ = 1. Arguments and raises are those of `exploitability`.
    """
    game, mixture = _game(payoff_MM, mixture_M)
    return float((game @ mixture).max() - (mixture @ game).min())


def cyclic_part(advantage_MM: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Squared size of what ratings do not explain, and of the whole antisymmetric matrix.

    Combinatorial Hodge decomposition on the complete graph (Jiang, Lim, Yao, Ye, "Statistical
    ranking and combinatorial Hodge theory", Mathematical Programming 127, 2011, arXiv 0811.1067;
    for games Balduzzi et al., ICML 2019, arXiv 1901.08106): A_ab = (r_a − r_b) + C_ab. The least
    squares ratings are the row means, r_a = mean_b A_ab, and C, whose rows sum to 0, is orthogonal
    to all rating differences.

    Args:
        advantage_MM: (..., M, M); the antisymmetric part is used.

    Returns:
        (...,) ‖C‖² and (...,) ‖A‖²; their quotient is the cyclicity.
    """
    given = np.asarray(advantage_MM, dtype=np.float64)
    matrix = (given - np.swapaxes(given, -1, -2)) / 2
    rating = matrix.mean(axis=-1)
    cyclic = matrix - (rating[..., :, None] - rating[..., None, :])
    return (cyclic**2).sum((-1, -2)), (matrix**2).sum((-1, -2))


def cyclicity(advantage_MM: npt.ArrayLike) -> float:
    """Share of the squared antisymmetric part that no rating difference explains, in [0, 1].

    1 for rock-paper-scissors, 0 for P_ab = ½ + r_a − r_b, always 0 for two policies. Of a payoff
    σ(r_a − r_b) it is 0 in logits; in probabilities it grows with the differences, up to
    (M − 2)/(3M) for a strict order, so compare it with that before speaking of cycles. NaN where
    nobody beats anybody.

    Args:
        advantage_MM: (M, M) payoff P or logits: constants cancel in the antisymmetric part.
    """
    cyclic, whole = cyclic_part(advantage_MM)
    return float(cyclic / whole) if whole > 0 else float("nan")


def best_response(wins_NCS: npt.ArrayLike, *, halves: npt.ArrayLike | None = None) -> FloatArray:
    """How often the best candidate at each prompt beats the policy, − ½, without selection bias.

    The candidate that wins most against one half of the policy's samples is measured against the
    other half, and the other way round; the result is the mean of both. Measured where it was
    chosen, the best of C candidates would seem to win even if all were the policy's own. The mean
    over prompts is a lower bound of E_x max_y P(y beats π | x) − ½: a candidate chosen from few
    samples is not always the best, and the best response of all need not be a candidate.

    Args:
        wins_NCS: (N, C, S) probability that candidate c beats sample s of the policy, at N prompts.
            Where a candidate is another policy, c's own sample number s answers s.
        halves: (S,) 0 or 1; alternating when None.

    Returns:
        (N,) in [−½, ½]; candidates that tie share alike.

    Raises:
        ValueError: fewer than two samples, or an empty half.
    """
    wins = np.asarray(wins_NCS, dtype=np.float64)
    if wins.ndim != 3 or wins.shape[2] < 2:
        raise ValueError(
            f"wins must have shape (N, C, S) with S of at least 2 to choose from one half and "
            f"measure on the other, got {wins.shape}"
        )
    half = np.arange(wins.shape[2]) % 2 if halves is None else np.asarray(halves)
    if half.shape != wins.shape[2:] or set(np.unique(half)) != {0, 1}:
        raise ValueError(f"halves must number all {wins.shape[2]} samples 0 or 1, both used")
    means = [wins[:, :, half == side].mean(axis=2) for side in (0, 1)]
    measured = np.zeros(len(wins))
    for chosen, other in (means, means[::-1]):
        best = chosen >= chosen.max(axis=1, keepdims=True) - 1e-12
        measured += (best * other).sum(axis=1) / best.sum(axis=1) / 2
    return measured - 0.5


def cross_play(
    probabilities_NMM: npt.ArrayLike,
    *,
    groups: npt.ArrayLike,
    seed: int,
    level: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Figures of the empirical game, with intervals that resample groups of prompts.

    Args:
        probabilities_NMM: (N, M, M) probability that a beats b in each row; the last policy is the
            last iterate.
        groups: (N,) labels of the groups that the bootstrap draws.
        seed, level, resamples: of the bootstrap.

    Returns:
        JSON-ready: `payoff`, `payoff_low`, `payoff_high` as (M, M) lists, and as [mean, low, high]
        `exploitability_last`, `exploitability_average` (of the uniform mixture of all M),
        `duality_gap_last`, `duality_gap_average` and `cyclicity` (left out where it is undefined).
    """
    rows = _rows(probabilities_NMM)
    count = rows.shape[1]
    flat = np.column_stack([rows.reshape(len(rows), -1), np.ones(len(rows))])
    sums = Resamples(groups, seed=seed, resamples=resamples).sums(flat)
    games = (sums[:, :-1] / sums[:, -1:]).reshape(-1, count, count)
    mean = payoff(rows)
    ends = np.quantile(games, [(1 - level) / 2, (1 + level) / 2], axis=0)
    last, average = np.eye(count)[-1], np.full(count, 1 / count)

    def measure(figure: Callable[[FloatArray], float]) -> Interval:
        return percentile_interval(figure(mean), [figure(game) for game in games], level)

    figures: dict[str, Any] = {"payoff": mean.tolist()}
    figures |= {"payoff_low": ends[0].tolist(), "payoff_high": ends[1].tolist()}
    for name, mixture in (("last", last), ("average", average)):
        value = measure(partial(exploitability, mixture_M=mixture))
        figures[f"exploitability_{name}"] = list(value)
        figures[f"duality_gap_{name}"] = [2 * end for end in value]
    if np.isfinite(cyclicity(mean)):
        figures["cyclicity"] = list(measure(cyclicity))
    return figures


def best_responses(
    probabilities_NMM: npt.ArrayLike,
    prompts: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """`best_response` to the last and to the average policy, choosing an iterate prompt by prompt.

    Args:
        probabilities_NMM: (N, M, M), rows of one prompt next to each other, all prompts with the
            same number of responses.
        prompts, groups: (N,) ids of the prompts, and the groups that the bootstrap draws.
        seed, level: of the bootstrap over prompts.

    Returns:
        `best_response_last` and `best_response_average` as [mean, low, high]; empty with one
        response a prompt, which leaves nothing to measure on.
    """
    rows = _rows(probabilities_NMM)
    first = list(dict.fromkeys(prompts))
    samples = len(rows) // len(first)
    if samples < 2:
        return {}
    wins_PSMM = rows.reshape(len(first), samples, *rows.shape[1:])
    group_of = dict(zip(prompts, groups, strict=True))
    against = {"last": wins_PSMM[..., -1], "average": wins_PSMM.mean(axis=-1)}
    labels = [group_of[prompt] for prompt in first]
    figures = {}
    for name, wins_PSM in against.items():
        values = best_response(np.swapaxes(wins_PSM, 1, 2))
        figures[f"best_response_{name}"] = list(
            bootstrap_mean(values, groups=labels, seed=seed, level=level)
        )
    return figures
