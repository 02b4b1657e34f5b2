"""From a name in a recipe to an optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only, by the shape the tensor has outside its ZeRO shard."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters.

    Args:
        name: "adamw" or "rmsprop".
        parameters: those without `requires_grad` are left out.
        beta2: AdamW's second-moment decay; RMSprop's smoothing constant.
        weight_decay: decoupled for AdamW; matrices only.

    Raises:
        ValueError: unknown name, or nothing to train.
    """
    groups = _decay_groups(parameters, weight_decay)
    if not groups:
        raise ValueError("no parameter is trainable")
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2))
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, alpha=beta2)
    raise ValueError(f"unknown optimizer {name!r}; known are adamw, rmsprop")
