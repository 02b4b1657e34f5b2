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
    def of(scheduler: Any) -> Process:
        """The process of a scheduler.

        Raises:
            SparringError: a type of prediction that is not one of the three, or a scheduler of
                another process (EDM's, whose times are noise levels).
        """
        kind = type(scheduler).__name__
        if "FlowMatch" in kind:
            return Process("flow", None)
        named = str(scheduler.config.get("prediction_type"))
        if named not in _NAMES:
            raise SparringError(
                f"the scheduler's prediction_type is {named!r}; known are {', '.join(_NAMES)}"
            )
        if _NAMES[named] == "flow":
            return Process("flow", None)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            raise SparringError(
                f"the scheduler {kind} has no alphas_cumprod, so its noise is not known at a time "
                "step; DDIM, DDPM, PNDM, Euler and DPM-Solver have it, and flows need none"
            )
        return Process(_NAMES[named], alphas.clone())

    def to(self, device: torch.device) -> Process:
        """With its tensor there, so that a user's weight may index it by time steps."""
        alphas = self.alphas_cumprod
        return Process(self.target, None if alphas is None else alphas.to(device))

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


def retargeted(scheduler: Any, target: Target) -> Any:
    """A scheduler that samples with a network of another target.

    Raises:
        SparringError: a flow's scheduler, which has no noise schedule, for epsilon or v.
    """
    present = Process.of(scheduler).target
    if present == target:
        return scheduler
    if target == "flow":
        from diffusers import DPMSolverMultistepScheduler

        # Unlike FlowMatchEuler it fits pipelines that were written for epsilon.
        return DPMSolverMultistepScheduler.from_config(
            scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    if present == "flow":
        raise SparringError(
            f"model.target = {target!r}, but {type(scheduler).__name__} is a flow's scheduler "
            "without a noise schedule; put another one into the pipeline's scheduler folder"
        )
    named = next(name for name, kind in _NAMES.items() if kind == target)
    return type(scheduler).from_config(scheduler.config, prediction_type=named)


def seeded(shape: tuple[int, ...], seeds: list[int]) -> tuple[Tensor, Tensor]:
    """A uniform number and normal noise of a shape for each seed: (B,) and (B, *shape)."""
    uniform, noise = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        uniform.append(torch.rand((), generator=generator, dtype=torch.float64))
        noise.append(torch.randn(shape, generator=generator))
    return torch.stack(uniform), torch.stack(noise)
