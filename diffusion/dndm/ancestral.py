"""Ancestral sampling at every step of a grid (D3PM), and MDLM's cache: what DNDM is compared with.

Shape legend: B rows, N positions, M positions that may change, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparring.diffusion.dndm.denoisers import Denoiser, Network, Sampled, check_input
from sparring.diffusion.dndm.draws import Draws, Generators
from sparring.diffusion.dndm.forward import posterior_mean
from sparring.diffusion.dndm.noise import Noise
from sparring.diffusion.dndm.schedules import LinearSchedule, Schedule, check_steps


@dataclass(frozen=True, kw_only=True)
class Ancestral:
    """x_{t-1} ~ sum_{x_0} p_theta(x_0 | x_t) q(x_{t-1} | x_t, x_0), t = T..1 (arXiv 2107.03006).

    Args:
        steps: T.
        schedule: alpha.
        cache: use the last prediction again while no token of the whole batch has changed, as
            MDLM's `ddpm_cache` does (2406.07524). Only for networks that ignore t. The calls that
            it saves grow fewer with the batch.

    Raises:
        ValueError: steps < 1 or infinite.
    """

    steps: int
    schedule: Schedule = field(default_factory=LinearSchedule)
    cache: bool = False

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.steps == math.inf:
            raise ValueError("ancestral sampling needs finitely many steps; DNDM takes math.inf")

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        x_BN: Tensor,
        free_BN: Tensor,
        *,
        noise: Noise,
        generator: Generators,
        cond: Mapping[str, Any] | None = None,
        output_history: bool = False,
    ) -> Sampled:
        """Generate the free positions; arguments as of `Reveal.sample`.

        Raises:
            ValueError: as `Reveal.sample`.
        """
        check_input(x_BN, free_BN, noise)
        draws = Draws(generator, len(x_BN), x_BN.device)
        x = noise.fill(x_BN, free_BN, draws)
        network = Network(denoiser, noise, cond or {}, len(x), x.device)
        everyone = torch.ones(len(x), dtype=torch.bool, device=x.device)
        history = [x] if output_history else None
        alpha = self.schedule.grid(self.steps).to(x.device)
        p, seen, where = None, x, free_BN
        for t in range(self.steps, 0, -1):
            if p is None or not (self.cache and torch.equal(x, seen)):
                time = torch.full((len(x),), t / self.steps, dtype=torch.float64, device=x.device)
                logits = network(x, time, everyone)
                # A token that noise cannot be is clean and stays.
                where = free_BN & (noise.law_K.to(x.device)[x] > 0)
                p, seen = noise.log_probabilities(logits[where]).exp(), x
            size = (len(p),)
            law = posterior_mean(
                p, x[where], alpha[t - 1].expand(size), alpha[t].expand(size), noise
            )
            x = x.masked_scatter(where, draws.categorical(law, where))
            if history is not None:
                history.append(x)
        return Sampled(x, network.nfe, network.evaluations, history)
