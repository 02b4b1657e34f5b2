"""The forward process and what the network is asked for, by type of prediction.

    epsilon    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, target eps
    v          the same x_t, target sqrt(a_t) eps - sqrt(1 - a_t) x_0       (arXiv 2202.00512)
    flow       x_t = (1 - s) x_0 + s eps, target eps - x_0                  (arXiv 2403.03206)

a_t is the scheduler's `alphas_cumprod`, s = t / 1000. All losses are on |target - prediction|^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparring.launch.errors import SparringError

Target = Literal["epsilon", "v", "flow"]
_NAMES: dict[str, Target] = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Process:
    """q(x_t | x_0) of a pipeline."""

    target: Target
    alphas_cumprod: Tensor | None
    """(T,) for epsilon and v."""

    @staticmethod
    def of(scheduler: Any, target: str = "auto") -> Process:
        """The process of a scheduler.

        Raises:
            SparringError: a type of prediction that is not one of the three.
        """
        if "FlowMatch" in type(scheduler).__name__:
            kind: Target = "flow"
        else:
            named = str(scheduler.config.prediction_type)
            if named not in _NAMES:
                raise SparringError(
                    f"the scheduler's prediction_type is {named!r}; known are {', '.join(_NAMES)}"
                )
            kind = _NAMES[named]
        if target not in ("auto", kind):
            raise SparringError(
                f"train.target = {target!r}, but this pipeline's scheduler says {kind!r}; leave it "
                'at "auto", or correct scheduler/scheduler_config.json'
            )
        return Process(kind, None if kind == "flow" else scheduler.alphas_cumprod.clone())

    def times(self, u_B: Tensor) -> Tensor:
        """(B,) time steps from uniform numbers in [0, 1): 0..T-1, or 1000 s for a flow."""
        if self.alphas_cumprod is None:
            return 1000 * (1 - u_B)  # in (0, 1000]
        return (u_B * len(self.alphas_cumprod)).long()

    def corrupt(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the target, both (B, C, H, W)."""
        shape = (-1,) + (1,) * (x0_BCHW.dim() - 1)
        if self.alphas_cumprod is None:
            s = (t_B / 1000).to(x0_BCHW.dtype).view(shape)
            return (1 - s) * x0_BCHW + s * noise_BCHW, noise_BCHW - x0_BCHW
        a = self.alphas_cumprod.to(x0_BCHW)[t_B].view(shape)
        x = a.sqrt() * x0_BCHW + (1 - a).sqrt() * noise_BCHW
        if self.target == "epsilon":
            return x, noise_BCHW
        return x, a.sqrt() * noise_BCHW - (1 - a).sqrt() * x0_BCHW


def seeded(shape: tuple[int, ...], seeds: list[int]) -> tuple[Tensor, Tensor]:
    """A uniform number and normal noise of a shape for each seed: (B,) and (B, *shape)."""
    uniform, noise = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand((), generator=generator, dtype=torch.float64))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(uniform), torch.stack(noise)
