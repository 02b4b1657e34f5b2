"""Losses of SPIN-Diffusion: squared errors of four predictions in, one loss a pair out.

A pair is a real image (the winner) and one that an earlier iterate made (the loser), under the same
caption. Both the model and that iterate, the opponent, predict the noise of both; an error is the
mean over an image's dimensions of (target - prediction)^2. With the model at its start all margins
are 0 and the loss is log 2, with a gradient that is not zero: beta / 4 times that of
winner - loser.

Shapes: B pairs, T steps of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda z: -functional.logsigmoid(z),
    "hinge": lambda z: torch.relu(1 - z),
}
"""The decreasing convex functions l(z)."""


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(B,) mean over all dimensions but the first of (target - prediction)^2, float32 at least.

    The mean, not the sum, makes `beta` the same number at every resolution.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (target.to(dtype) - prediction.to(dtype)).square().flatten(1).mean(1)


def margin(
    winner: Tensor, loser: Tensor, opponent_winner: Tensor, opponent_loser: Tensor
) -> Tensor:
    """How much more the model has gained on the winner than on the loser: (l - l_k) - (w - w_k).

    Args:
        winner, loser: the model's errors, all four of one shape.
        opponent_winner, opponent_loser: the opponent's.

    Raises:
        ValueError: shapes that differ.
    """
    shapes = {tuple(t.shape) for t in (winner, loser, opponent_winner, opponent_loser)}
    if len(shapes) > 1:
        raise ValueError(f"the four errors must have one shape, got {sorted(shapes)}")
    return (loser - opponent_loser) - (winner - opponent_winner)


def _link(name: str, beta: float) -> Callable[[Tensor], Tensor]:
    if name not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}; got {name!r}")
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a finite number from 0 up, got {beta}")
    return LINKS[name]


def inside(margin_B: Tensor, *, beta: float, weight_B: Tensor | None = None) -> Tensor:
    """(B,) beta/2 weight_t margin_t, what the link takes; arguments as of `decoupled_loss`."""
    z = beta / 2 * margin_B
    return z if weight_B is None else z * weight_B


def decoupled_loss(
    margin_B: Tensor, *, beta: float, weight_B: Tensor | None = None, link: str = "logistic"
) -> Tensor:
    """l(beta/2 weight_t margin_t) at one step t a pair (arXiv 2402.10210, eq. 4.9).

    With t uniform its mean is an upper bound of `trajectory_loss`, by Jensen; the loser needs its
    last image only, noised anew. beta is in the units of the authors' parent code, which takes 2000
    to 5000.

    Args:
        margin_B: of errors that are means over dimensions.
        beta: strength of the pull towards the opponent, at least 0.
        weight_B: of each pair's step, 1 if None.
        link: l, a key of `LINKS`.

    Raises:
        ValueError: an unknown link, or beta out of its range.
    """
    return _link(link, beta)(inside(margin_B, beta=beta, weight_B=weight_B))


def trajectory_loss(margin_BT: Tensor, scale_T: Tensor, *, link: str = "logistic") -> Tensor:
    """l(sum_t scale_t margin_t) over whole trajectories (arXiv 2402.10210, eq. 4.8).

    Args:
        margin_BT: of |x_{t-1} - mu(x_t)|^2, summed over dimensions, with the winner's trajectory
            from q(x_{1:T}|x_0) and the loser's from the opponent's own sampling.
        scale_T: lambda / (2 sigma_t^2), sigma_t^2 being the variance of the reverse step.
        link: l, a key of `LINKS`.
    """
    return _link(link, 0.0)((margin_BT * scale_T).sum(1))


def guard(winner_residual: Tensor, loser_residual: Tensor) -> Tensor:
    """(B,) factor in (0, 1] on the loser's gradient, so that the winner's error does not grow.

    A step changes the winner's prediction by -(g_w - s g_l) times what the network makes of it, and
    its error to first order by -|g_w|^2 + s <g_w, g_l>, which s = |g_w|^2 / <g_w, g_l> makes zero.
    In the space of predictions, with one Jacobian for both images (compare arXiv 2511.03317).

    Args:
        winner_residual, loser_residual: prediction - target, (B, ...), without gradient.
    """
    w, loser = winner_residual.detach().flatten(1), loser_residual.detach().flatten(1)
    together = (w * loser).sum(1)
    own = w.square().sum(1)
    return torch.where(together > own, own / together.clamp(min=1e-30), torch.ones_like(own))


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """The value as it is, with its gradient times a factor."""
    return factor * value + (1 - factor) * value.detach()
