"""AdamW in two halves, moments and update, on lists of tensors.

torch's own does both at once; MARS's exact mode makes the update later than the moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor


class Settings(NamedTuple):
    """Hyper-parameters of an update."""

    lr: float | Tensor
    beta1: float
    beta2: float
    weight_decay: float
    eps: float


def adamw_moments(
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    settings: Settings,
) -> None:
    """m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; with amsgrad the largest v."""
    if not gradients:
        return
    torch._foreach_lerp_(exp_avgs, gradients, 1 - settings.beta1)
    torch._foreach_mul_(exp_avg_sqs, settings.beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - settings.beta2)
    if max_exp_avg_sqs:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)


def adamw_apply(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: Sequence[float] | Sequence[Tensor],
    settings: Settings,
) -> None:
    """x -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x).

    Steps are numbers, or tensors that stay on the device (CUDA graphs, compilation).
    """
    if not params:
        return
    lr, beta1, beta2, weight_decay, eps = settings
    scale1: list[Any] = [-lr / (1 - beta1**step) for step in steps]
    scale2: list[Any] = [(1 - beta2**step) ** 0.5 for step in steps]
    denominators = list(torch._foreach_sqrt(exp_avg_sqs))
    torch._foreach_div_(denominators, scale2)
    torch._foreach_add_(denominators, eps)
    updates = list(torch._foreach_div(exp_avgs, denominators))
    torch._foreach_mul_(updates, scale1)
    if weight_decay:
        torch._foreach_mul_(params, cast(float, 1 - lr * weight_decay))
    torch._foreach_add_(params, updates)
