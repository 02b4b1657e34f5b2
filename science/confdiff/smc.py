"""Guided samples weighed to the law of an energy: twisted sequential Monte Carlo.

Particles move by a guided kernel and are weighed against the base model's kernel tilted by
psi(x, t) = e^(-E_t(x)), an estimate of E[e^(-k E(x_0)) | x_t]. From t to s,

    log w += log q(x_s | x_t) - log r(x_s | x_t) + log psi(x_s, s) - log psi(x_t, t)

with q the base's and r the guided reverse SDE's Gaussian steps (solvers.py), and the terminal
energy as the last psi. Weighted means are those of q_0 e^(-terminal), whatever guided the
particles: another eta, another force, nothing. `conf sample` gives the learnt E_t_min as terminal:
its weights undo steps and eta, but not what that network missed, nor the bias of the base model or
of K steps. (Twisted diffusion sampler, Wu et al., arXiv 2306.17775, algorithm 1.)

Rotations have their Gaussians in the tangent space at R_t: u = log(R_t^T R_s) before it is wrapped,
so that the ratio is of densities of u, and no wrapping has to be summed.

Shape legend: B particles, all of one chain; N residues; K steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import EnergyFunction, ForceFunction
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.solvers import (
    Grid,
    Noise,
    ScoreFunction,
    check_finite,
    scale_each,
    sde_step,
    times,
)
from sparring.science.confdiff.tangent import Score, Tangent, moved_along


@dataclass(frozen=True)
class Population:
    """What :func:`twisted` returns."""

    x: Frames
    """(B, N) particles at t_min."""
    score: Score
    """The guided one there, with the base model's x0 and torsions."""
    log_weights: Tensor
    """(B,) float64: e^ of them weigh the particles; their mean estimates E_q0[e^(-k E)]."""
    ancestors: Tensor
    """(B,) which starting particle each comes from."""
    ess: list[float]
    """Kish's effective number of particles after each step, before resampling."""


def kish(log_weights: Tensor) -> Tensor:
    """(...) effective number of samples (sum w)^2 / sum w^2, of log weights (..., B).

    B if all are equal and 1 if one has it all.
    """
    sums = 2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)
    return sums.exp()


def systematic(log_weights: Tensor, uniform: float) -> Tensor:
    """(B,) indices of particles to keep: each B w times on average, and never off by 1 or more.

    Args:
        log_weights: (B,).
        uniform: one draw in [0, 1).
    """
    count = len(log_weights)
    cdf = log_weights.double().softmax(0).cumsum(0)
    points = (torch.arange(count, device=cdf.device) + uniform) / count
    return torch.searchsorted(cdf, points, right=True).clamp_max(count - 1)


@torch.no_grad()
def twisted(
    base: ScoreFunction,
    force: ForceFunction | None,
    process: Process,
    mask: Tensor,
    noise: Noise,
    *,
    terminal: EnergyFunction,
    twist: EnergyFunction | None = None,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
    steps: int = 500,
    grid: Grid = "quadratic",
    resample_below: float = 0.0,
    start: Frames | None = None,
) -> Population:
    """Weighted samples of q_0 e^(-k E).

    Args:
        base: s_q.
        force: F_t, or any other; particles move by s_q - eta F_t. None for s_q alone.
        process: of the noise.
        mask: (B, N) bool.
        noise: as for `solve`.
        terminal: k E of (x, t_min), whose law the weights are for.
        twist: E_t between; None for 0, if particles are not resampled.
        eta: factor of the force; 1 has the least spread of weights if the force is right.
        generator: on the CPU, for resampling. It makes a sample depend on its whole population.
        steps: K.
        grid: of times.
        resample_below: resample when `kish` is below this part of B; 0 for never, which leaves
            importance weights alone.
        start: (B, N) x_1 instead of the prior's.

    Raises:
        ValueError: resampling without a twist or generator.
        SparringError: states or weights that are not finite.
    """
    if resample_below and (twist is None or generator is None):
        raise ValueError("resampling needs a twist and a generator; or set resample_below to 0")
    path = times(process, steps, grid)
    first = process.prior(mask, noise.draw())
    x = first if start is None else start
    between = twist or _nothing

    def guided(score: Score, x: Frames, t: float) -> Score:
        return score if force is None else score.moved(force(x, t), -eta)

    psi = -between(x, path[0]).double()
    log_weights, ancestors, ess = psi, torch.arange(len(mask), device=mask.device), []
    for t, s in pairwise(path):
        score = base(x, t)
        pushed, drawn = guided(score, x, t), noise.draw().projected(mask)
        x, change = _step(process, score, pushed, x, drawn, t, s)
        check_finite(x, mask, s)
        before, psi = psi, -(terminal if s == path[-1] else between)(x, s).double()
        log_weights = log_weights + change + psi - before
        if not bool(log_weights.isfinite().all()):
            raise SparringError(
                f"weights are not finite at t = {s:.4g}; is an energy infinite there?"
            )
        ess.append(float(kish(log_weights)))
        if ess[-1] < resample_below * len(mask) and s != path[-1]:
            assert generator is not None
            kept = systematic(log_weights, float(torch.rand((), generator=generator)))
            x, psi, ancestors = x[kept], psi[kept], ancestors[kept]
            log_weights = (log_weights.logsumexp(0) - math.log(len(mask))).expand(len(mask))
    last = guided(base(x, path[-1]), x, path[-1])
    return Population(x, last, log_weights, ancestors, ess)


def _nothing(x: Frames, t: float) -> Tensor:
    return x.translations.new_zeros(len(x.translations))


def _step(
    process: Process, base: Score, guided: Score, x: Frames, z: Tangent, t: float, s: float
) -> tuple[Frames, Tensor]:
    """x_s by the guided kernel with noise z, and log q(x_s | x_t) - log r(x_s | x_t), (B,)."""
    drift, scale = sde_step(process, x, guided, t, s)
    wanted, _ = sde_step(process, x, base, t, s)
    # In units of the noise: the base's kernel sees z + apart where the guided one sees z.
    apart = scale_each(drift.plus(wanted, -1.0), (1 / scale[0], 1 / scale[1]))
    change = -(apart.dot(z) + apart.dot(apart) / 2).double()
    return moved_along(x, drift.plus(scale_each(z, scale))), change
