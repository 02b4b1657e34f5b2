"""From an optimizer's section in a recipe to the optimizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import nn

from sparring.optimizers.config import OptimizerConfig
from sparring.optimizers.groups import grouped
from sparring.optimizers.mars import MARS


def build_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    tables: Collection[nn.Parameter] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, in groups of one kind (`grouped`).

    Args:
        parameters: `model.named_parameters()`; those without `requires_grad` are left out.
        lr: learning rate to start with.
        tables: the embeddings; None to tell them by their names.

    Raises:
        ValueError: nothing to train.
    """
    groups = grouped(parameters, weight_decay=config.weight_decay, tables=tables)
    if not groups:
        raise ValueError("no parameter is trainable")

    def either(value: float | None, default: float) -> float:
        return default if value is None else value

    if config.name == "rmsprop":
        alpha = either(config.beta2, 0.99)
        return torch.optim.RMSprop(groups, lr=lr, alpha=alpha, eps=config.eps)
    if config.name == "adamw":
        betas = either(config.beta1, 0.9), either(config.beta2, 0.95)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=config.eps)
    return MARS(
        groups,
        lr=lr,
        betas=(either(config.beta1, 0.95), either(config.beta2, 0.99)),
        eps=config.eps,
        gamma=config.gamma,
        variant=config.variant,
        exact=config.exact,
        optimize_1d=config.optimize_1d,
        lr_1d=lr * config.lr_1d_factor,
        clip_c=config.clip_c,
    )
