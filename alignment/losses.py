"""Preference losses: log-ratios in, one loss a row out.

A log-ratio is Δ(y) = log π(y|x) − log π_ref(y|x), in nats, summed (not averaged) over the tokens of
the response y. Nothing here reduces over rows: the trainer sums and divides by global counts, so
that the batch split and the world size do not change a step.

Shapes: B is the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    # softplus(-z) switches to a straight line at 20 and loses the tail in float64.
    "logistic": lambda z: -functional.logsigmoid(z),
    "hinge": lambda z: torch.relu(1 - z),
    "exponential": lambda z: torch.exp(-z),
    "correlation": lambda z: 1 - z,
}
"""The decreasing convex functions ℓ(z) that SPIN may put on its margin z."""


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value}")


def _require_same_shape(**tensors: Tensor) -> None:
    """Broadcasting (B,) against (B, 1) would give a plausible (B, B) loss, so it is refused."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"all arguments must have one shape, got {listed}")


def spin_loss(
    real_logratio: Tensor, generated_logratio: Tensor, *, lam: float, link: str = "logistic"
) -> Tensor:
    """SPIN: tell the real response from the policy's own earlier one.

    ℓ(λ·Δ(y) − λ·Δ(y′)) with y from the data and y′ from the reference (arXiv 2401.01335, eq. 4.7).
    At Δ = 0 the logistic loss is log 2. Exact minimisation gives p_{t+1} ∝ p_t·(p_data/p_t)^{1/λ},
    which approaches p_data only for λ > ½.

    Args:
        real_logratio: (B,) nats, Δ of the real response.
        generated_logratio: (B,) nats, Δ of the reference's own response.
        lam: λ > 0, the paper's regularisation; the same number as DPO's β.
        link: ℓ, a key of `LINKS`.

    Returns:
        (B,) losses; nats for the logistic link.

    Raises:
        ValueError: `lam` is not positive and finite, `link` is unknown, or the shapes differ.
    """
    _require_positive("lam", lam)
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}; got {link!r}")
    _require_same_shape(real_logratio=real_logratio, generated_logratio=generated_logratio)
    return LINKS[link](lam * (real_logratio - generated_logratio))


def sppo_loss(logratio: Tensor, win_probability: Tensor, *, eta: float) -> Tensor:
    """SPPO: regress each response's log-ratio on how often it beats the reference policy.

    (Δ(y) − η(P̂(y ≻ π_ref | x) − ½))² (arXiv 2405.00675, eq. 4.7), where η/2 stands in for the
    log-partition function. A response is a row; the authors' code takes the *mean* of a pair's two
    rows, TRL's `sppo_hard` their sum. Losses near 1e5 at the usual η = 1000 are as expected: the
    first one, with π = π_ref, is (η(P̂ − ½))².

    Args:
        logratio: (B,) nats.
        win_probability: (B,) P̂ in [0, 1].
        eta: η > 0, the reciprocal of β.

    Returns:
        (B,) losses, nats².

    Raises:
        ValueError: `eta` is not positive and finite, or the shapes differ.
    """
    _require_positive("eta", eta)
    _require_same_shape(logratio=logratio, win_probability=win_probability)
    return (logratio - eta * (win_probability - 0.5)).square()


def dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    """DPO: −log σ(β(Δ_w − Δ_l)) (arXiv 2305.18290, eq. 7).

    Args:
        chosen_logratio: (B,) nats, Δ_w.
        rejected_logratio: (B,) nats, Δ_l.
        beta: β > 0, the strength of the pull towards the reference.

    Returns:
        (B,) losses in nats.

    Raises:
        ValueError: `beta` is not positive and finite, or the shapes differ.
    """
    _require_positive("beta", beta)
    _require_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return -functional.logsigmoid(beta * (chosen_logratio - rejected_logratio))


def ipo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float) -> Tensor:
    """IPO: (Δ_w − Δ_l − 1/(2β))² (arXiv 2310.12036, whose τ is written β here).

    The log-ratios are sums over tokens, as in the paper; TRL's IPO averages over tokens.

    Args:
        chosen_logratio: (B,) nats, Δ_w.
        rejected_logratio: (B,) nats, Δ_l.
        beta: β > 0; 1/(2β) is the margin aimed at, in nats.

    Returns:
        (B,) losses, nats².

    Raises:
        ValueError: `beta` is not positive and finite, or the shapes differ.
    """
    _require_positive("beta", beta)
    _require_same_shape(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    return (chosen_logratio - rejected_logratio - 1 / (2 * beta)).square()
