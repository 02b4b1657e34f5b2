"""Win rates of one policy against another, as they are and with the length of responses held equal.

Shape legend: N rows, each a response of ours and one of theirs to the same prompt.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparring.launch.statistics import (
    FloatArray,
    Interval,
    Resamples,
    fit_logistic,
    percentile_interval,
)

# In units of one row's log loss: 320 wins of 320 give 0.998 instead of an infinite logit.
RIDGE = 0.1


def verdicts(logits_NMM: npt.ArrayLike, ours: int, theirs: int) -> FloatArray:
    """Who wins each row when both orders are heard: 1 for ours, ½ for a tie, 0 for theirs.

    Args:
        logits_NMM: judge logits among the M responses of each row, row beats column.
        ours, theirs: places among the M.

    Returns:
        (N,) the sign of L_ours,theirs − L_theirs,ours, as a number from 0 to 1.
    """
    logits = np.asarray(logits_NMM)
    margin = logits[:, ours, theirs] - logits[:, theirs, ours]
    return np.asarray(0.5 + 0.5 * np.sign(margin), dtype=np.float64)


def length_feature(ours_N: npt.ArrayLike, theirs_N: npt.ArrayLike) -> FloatArray | None:
    """tanh((len_ours − len_theirs)/std), the length term of arXiv 2404.04475.

    Args:
        ours_N, theirs_N: (N,) lengths in one unit.

    Returns:
        (N,) in (−1, 1), or None where all differences are one number other than 0: a length term
        that is constant cannot be told from a difference in quality.
    """
    difference = np.asarray(ours_N, dtype=np.float64) - np.asarray(theirs_N, dtype=np.float64)
    if not difference.any():
        return difference
    spread = float(difference.std())
    if spread <= 1e-9 * np.abs(difference).max():
        return None
    return np.asarray(np.tanh(difference / spread), dtype=np.float64)


def length_controlled_win_rate(
    preferences_N: npt.ArrayLike,
    ours_N: npt.ArrayLike,
    theirs_N: npt.ArrayLike,
    *,
    groups: npt.ArrayLike,
    seed: int,
    level: float = 0.95,
    resamples: int = 500,
    ridge: float = RIDGE,
) -> Interval | None:
    """The win rate that a logistic model predicts for responses of equal length.

    Fits P(ours wins) = σ(θ + φ·tanh((len_ours − len_theirs)/std)) and returns σ(θ), the mean
    prediction with the length term at 0, as AlpacaEval 2 does (Dubois et al., arXiv 2404.04475).
    Their third term, (ψ_m − ψ_b)·γ_x with an instruction difficulty γ_x, is left out: γ_x is fitted
    once from many models' answers to each prompt, which a run of a few iterates has not. So is
    their regularisation by baselines that were prompted to be verbose and concise; a ridge on θ and
    φ stands in its place. The interval refits both in every resample, with the std kept.

    LC(ours, theirs) = 1 − LC(theirs, ours) exactly.

    Args:
        preferences_N: (N,) in [0, 1], hard or soft.
        ours_N, theirs_N: (N,) lengths; AlpacaEval counts characters.
        groups: (N,) labels of the groups that the bootstrap draws.
        seed, level, resamples: of the bootstrap.
        ridge: weight of ½(θ² + φ²) against the summed log loss.

    Returns:
        (value, low, high), or None where lengths differ by a constant (see `length_feature`).

    Raises:
        ValueError: shapes differ, or a preference outside [0, 1].
    """
    feature = length_feature(ours_N, theirs_N)
    if feature is None:
        return None
    design = np.stack([np.ones_like(feature), feature], axis=1)
    target = np.asarray(preferences_N, dtype=np.float64)

    def predicted(weights: FloatArray | None) -> FloatArray:
        theta = fit_logistic(design, target, ridge=ridge, weights_RN=weights)[:, 0]
        return np.asarray(1 / (1 + np.exp(-theta)), dtype=np.float64)

    draws = Resamples(groups, seed=seed, resamples=resamples)
    resampled = np.concatenate([predicted(weights) for weights in draws.weights()])
    return percentile_interval(float(predicted(None)[0]), resampled, level)
