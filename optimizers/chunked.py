"""MARS-AdamW on a CPU, where a step costs what it moves through memory.

Bytes a float32 parameter: fused AdamW reads 16 and writes 12. Here the norm reads 4, the rest reads
20 and writes 16, because the corrected gradient lives for a chunk only, which stays in the cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparring.optimizers.adamw import Settings

_CHUNK = 1 << 18
"""Elements at a time: a megabyte of corrected gradient. Measured: smaller ones cost in calls."""


class NormCache:
    """Norms of tensors, valid until the tensor is written to."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, int, float]] = {}

    def get(self, tensor: Tensor) -> float:
        held = self._found.get(id(tensor))
        if held is None or held[0] is not tensor or held[1] != tensor._version:
            return _norm(tensor)
        return held[2]

    def put(self, tensor: Tensor, norm: float) -> None:
        self._found[id(tensor)] = (tensor, tensor._version, norm)


def _norm(tensor: Tensor) -> float:
    """Euclidean norm; a dot product is the faster way to it."""
    flat = tensor.view(-1)
    return math.sqrt(float(torch.dot(flat, flat)))


def _corrected_norm(last: Tensor, grad: Tensor, coefficient: float, buffer: Tensor) -> float:
    """|c|, without a c of full size."""
    total = 0.0
    for h, g in zip(
        torch.split(last.view(-1), _CHUNK), torch.split(grad.view(-1), _CHUNK), strict=True
    ):
        c = torch.lerp(h, g, 1 + coefficient, out=buffer[: g.numel()])
        total += float(torch.dot(c, c))
    return math.sqrt(total)


def chunked_mars_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    last_grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    settings: Settings,
    *,
    coefficient: float,
    clip: bool,
    norms: NormCache,
) -> None:
    """Correct, clip, update and remember; all tensors contiguous, of one floating type."""
    lr, beta1, beta2, weight_decay, eps = settings
    buffer = torch.empty(_CHUNK, dtype=params[0].dtype)
    grad_norms = [_norm(grad) if clip else 0.0 for grad in grads]
    for number, (grad, last, grad_norm) in enumerate(
        zip(grads, last_grads, grad_norms, strict=True)
    ):
        factor = 1.0
        # |c| <= (1 + kappa) |g| + kappa |h|: mostly far below one, so there is nothing to clip.
        if clip and (1 + coefficient) * grad_norm + coefficient * norms.get(last) > 0.999:
            factor = 1 / max(1.0, _corrected_norm(last, grad, coefficient, buffer))
        arrays = [params[number], grad, last, exp_avgs[number], exp_avg_sqs[number]]
        if max_exp_avg_sqs:
            arrays.append(max_exp_avg_sqs[number])
        step = [steps[number]]
        flat = [array.view(-1) for array in arrays]
        for start in range(0, grad.numel(), _CHUNK):
            x, g, h, m, v, *largest = (array[start : start + _CHUNK] for array in flat)
            c = torch.lerp(h, g, 1 + coefficient, out=buffer[: g.numel()])
            if factor != 1.0:
                c.mul_(factor)
            torch._fused_adamw_(
                [x], [c], [m], [v], largest, step,
                lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                amsgrad=bool(largest), maximize=False, grad_scale=None, found_inf=None,
            )  # fmt: skip
            h.copy_(g)
        if clip:
            norms.put(last, grad_norm)
