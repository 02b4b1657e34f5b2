"""Small parameters, gradients that are given, and training on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparring.optimizers import MARS

SHAPES = ((5, 7), (6,), (9, 3), (4, 2, 3, 3), (1,), (3, 8))


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(x.to(dtype)) for x in draw]


def gradients(steps: int, scale: float = 0.3, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(steps)
    ]


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: list[Tensor]) -> None:
    for parameter, gradient in zip(params, step, strict=True):
        parameter.grad = gradient.to(parameter.dtype).clone()
    optimizer.step()


def train(params: list[nn.Parameter], stream: list[list[Tensor]], **options: Any) -> MARS:
    optimizer = MARS(params, **options)
    for step in stream:
        feed(optimizer, params, step)
    return optimizer


def difference(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max(
        float((x.detach().double() - y.detach().double()).abs().max())
        for x, y in zip(a, b, strict=True)
    )
