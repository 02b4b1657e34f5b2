"""Estimators of the gradient of J = E sum_h gamma^h r_h, as coefficients of log-probabilities.

Every estimator here has the form sum_t c_t grad log pi(a_t | s_t) for a trajectory, where c_t does
not depend on the parameters that are differentiated. One backward pass through the surrogate
mean_i sum_t c_{i,t} log pi(a_{i,t} | s_{i,t}) therefore gives it; no per-sample gradient is needed.
With w_h the weight of the first h + 1 actions, x_h = gamma^h r_h and b_h a baseline:

    reinforce   c_t = w_{H-1} (sum_h x_h - b)                  Williams, 1992
    gpomdp      c_t = sum_{h >= t} w_h (x_h - b_h)             Baxter and Bartlett, 2001; indexed by
                                                               rewards, as arXiv 2003.04302 has it
    pgt         c_t = sum_{h >= t} w_h x_h - w_t b_t           Sutton et al., 2000; by actions

The discount is gamma^h from step 0: estimators without it do not estimate the gradient of J. An
episode that has ended goes on in an absorbing state: r = 0, no score, w_h frozen, and in gpomdp
-b_h goes on to h = H - 1. Masking b_h by "alive" there is biased, since whether step h is reached
correlates with the scores so far (tests/rl/test_estimators.py shows by how much).

Shape legend: N trajectories, H horizon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["reinforce", "gpomdp", "pgt"]
ESTIMATORS: tuple[Estimator, ...] = ("reinforce", "gpomdp", "pgt")


def check_estimator(name: str) -> None:
    """Raises ValueError: no such estimator."""
    if name not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {list(ESTIMATORS)}, not {name!r}")


def discounted(rewards_NH: Tensor, gamma: float) -> Tensor:
    """(N, H) gamma^h r_h."""
    powers = gamma ** torch.arange(
        rewards_NH.shape[1], dtype=rewards_NH.dtype, device=rewards_NH.device
    )
    return rewards_NH * powers


def reverse_cumsum(values_NH: Tensor) -> Tensor:
    """(N, H) sum over h >= t."""
    return values_NH.flip(1).cumsum(1).flip(1)


def baseline_signal(estimator: Estimator, rewards_NH: Tensor) -> Tensor:
    """(N, H) what the estimator's baseline b_h is to be the mean of.

    Args:
        estimator: its name.
        rewards_NH: discounted rewards.

    Raises:
        ValueError: no such estimator.
    """
    check_estimator(estimator)
    if estimator == "gpomdp":
        return rewards_NH
    if estimator == "pgt":
        return reverse_cumsum(rewards_NH)
    return rewards_NH.sum(1, keepdim=True).expand_as(rewards_NH)


def coefficients(
    estimator: Estimator, rewards_NH: Tensor, baseline_NH: Tensor, weights_NH: Tensor
) -> Tensor:
    """c_t of the equations above; those of steps that were not taken have no meaning.

    Args:
        estimator: "reinforce", "gpomdp" or "pgt".
        rewards_NH: discounted rewards gamma^h r_h, 0 after the ending.
        baseline_NH: b_h, independent of the trajectory's own actions; (1, H) or (N, H).
        weights_NH: w_h > 0, from `importance_weights`; ones on policy.

    Returns:
        (N, H), without gradient.

    Raises:
        ValueError: no such estimator.
    """
    check_estimator(estimator)
    with torch.no_grad():
        if estimator == "gpomdp":
            return reverse_cumsum(weights_NH * (rewards_NH - baseline_NH))
        if estimator == "pgt":
            return reverse_cumsum(weights_NH * rewards_NH) - weights_NH * baseline_NH
        total = rewards_NH.sum(1, keepdim=True) - baseline_NH
        return weights_NH[:, -1:] * total


def surrogate(logp_NH: Tensor, coefficients_NH: Tensor) -> Tensor:
    """(N,) sum_t c_t log pi(a_t | s_t), whose gradient is the estimate of each trajectory.

    Args:
        logp_NH: with gradient, 0 for steps that were not taken.
        coefficients_NH: from `coefficients`.
    """
    return (coefficients_NH.detach() * logp_NH).sum(1)


def importance_weights(
    target_NH: Tensor,
    behaviour: Sequence[tuple[float, Tensor]],
    *,
    clip: float | None = None,
) -> Tensor:
    """w_h = p(tau_{0:h} | target) / sum_k share_k p(tau_{0:h} | policy k), in log space.

    For the correction of STORM-PG the target is the OLD policy and the trajectories come from the
    NEW one: w_h = prod_{t <= h} pi_old(a_t|s_t) / pi_new(a_t|s_t), and E w_h = 1. With several
    policies, each having sampled its share of the batch, this is the balance heuristic of multiple
    importance sampling (Veach and Guibas, 1995): w_h <= 1 / share of the target.

    Args:
        target_NH: log pi(a_t | s_t) under the target, 0 for steps that were not taken.
        behaviour: pairs of a share in (0, 1], which sum to 1, and log-probabilities (N, H).
        clip: upper bound of w_h, at least 1. Biased; None for no bound.

    Returns:
        (N, H) without gradient.

    Raises:
        ValueError: shares that do not sum to 1, or a clip below 1.
        FloatingPointError: a weight too large for float64.
    """
    if clip is not None and not clip >= 1:
        raise ValueError(f"clip must be at least 1, the mean of the weights, not {clip!r}")
    logs = log_weights(target_NH, behaviour)
    if clip is not None:
        logs = logs.clamp(max=math.log(clip))
    weights = logs.exp()
    if not torch.isfinite(weights).all():
        raise FloatingPointError(
            f"a log importance weight is {float(logs.max()):.4g}: the step between the two "
            "policies is too long; lower lr, raise sigma, or set clip or defensive"
        )
    return weights


@torch.no_grad()
def log_weights(target_NH: Tensor, behaviour: Sequence[tuple[float, Tensor]]) -> Tensor:
    """(N, H) logarithms of `importance_weights` without a clip; arguments as there.

    Raises:
        ValueError: shares that do not sum to 1.
    """
    if not math.isclose(sum(share for share, _ in behaviour), 1):
        raise ValueError(f"shares must sum to 1, not {[share for share, _ in behaviour]}")
    prefixes = [math.log(share) + logp.cumsum(1) for share, logp in behaviour]
    return target_NH.cumsum(1) - torch.stack(prefixes).logsumexp(0)
