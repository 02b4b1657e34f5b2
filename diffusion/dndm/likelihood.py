"""A Monte Carlo estimate of the bound on -log p(text) of a trained network.

One time a text, spread evenly over (0, 1] by stratification, and one noise. With t ~ U,

    masks, or a network that is told the noise   lambda_t CE, lambda_t the reciprocal `weight`
    any other noise                    T KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))

is unbiased for the bound of ancestral sampling in T steps (losses.py). A sampler that chooses its
positions by the network's answer has another law, which this bound is not about.

Shape legend: B rows, N positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.diffusion.dndm.denoisers import told
from sparring.diffusion.dndm.forward import corrupt
from sparring.diffusion.dndm.losses import cross_entropy, variational_term, weight
from sparring.diffusion.dndm.network import TextDenoiser, padded
from sparring.diffusion.dndm.schedules import Schedule
from sparring.diffusion.dndm.vocabulary import PAD

FINEST = 100_000
"""T in place of infinity for noise that is no mask; the bound differs from its limit by O(1/T)."""


def stratified_times(rows: int, steps: float, generator: torch.Generator) -> Tensor:
    """(B,) float64 times in {1/T, .., 1}, or (0, 1], one in each B-th of the interval, shuffled."""
    u = torch.rand(rows, generator=generator, dtype=torch.float64)
    u = (torch.randperm(rows, generator=generator) + u) / rows
    return 1 - u if steps == math.inf else ((u * steps).floor() + 1) / steps


@torch.no_grad()
def bound(
    network: TextDenoiser,
    targets: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]],
    *,
    steps: float,
    schedule: Schedule,
    seed: int,
    batch: int = 100,
) -> Tensor:
    """(B,) float64, nats: unbiased for a bound on -log p of each text, given its length and source.

    Args:
        network: trained, in evaluation mode.
        targets: symbols of each text, none empty.
        sources: of each text; empty where the network has none.
        steps: T, or math.inf.
        schedule: alpha.
        seed: of times and noise.
        batch: texts a call.
    """
    noise, device = network.config.noise, network.device
    conditioned = network.config.shape.schedule_conditioning
    masked = noise.mask_id is not None or conditioned
    if steps == math.inf and not masked:
        steps = FINEST
    generator = torch.Generator().manual_seed(seed)
    times = stratified_times(len(targets), steps, generator)
    parts = []
    for start in range(0, len(targets), batch):
        some = slice(start, start + batch)
        x0, t = padded(targets[some]), times[some]
        free = x0 != PAD
        (made,) = corrupt(x0, t, schedule=schedule, noise=noise, generator=generator, free_BN=free)
        cond = {"source": padded(sources[some]).to(device)} if sources else {}
        if conditioned:
            cond["noisy"] = made.noisy_BN.to(device)
        logits = network(made.x_BN.to(device), told(t).to(device), **cond).logits.double().cpu()
        if masked:
            factor = weight(t, steps=steps, schedule=schedule, kind="reciprocal")
            nats = factor * cross_entropy(logits, x0, made.noisy_BN, noise=noise)
        else:
            before, now = schedule.alpha(t - 1 / steps), schedule.alpha(t)
            term = variational_term(logits, made.x_BN, x0, before, now, noise=noise, free_BN=free)
            nats = steps * term
        parts.append(nats)
    return torch.cat(parts)
