"""The forward process, de-randomised and Markov, and its exact posterior.

De-randomised (arXiv 2312.09193): a token has one noise w and one transition time tau, and
x_t = x_0 while t < tau, w from then on. Markov (D3PM, arXiv 2107.03006): w is drawn anew whenever
the token is hit. Both have q(x_t | x_0) = alpha_t 1[x_t = x_0] + (1 - alpha_t) q_noise(x_t). For
absorbing noise they are one process; for multinomial noise their laws over several times differ.

Shape legend: B rows, N positions, K tokens, T steps.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.diffusion.dndm.noise import Noise
from sparring.diffusion.dndm.schedules import Schedule

_TINY = 1e-300


@dataclass(frozen=True)
class Corrupted:
    """A noised batch."""

    x_BN: Tensor
    """x_t, integer."""
    noisy_BN: Tensor
    """bool: t >= tau. With multinomial noise such a token can equal x_0 by chance."""
    t_B: Tensor
    """float64 in [0, 1]."""


def uniform_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """float64 in [0, 1) of the same shape, made where the generator is."""
    u = torch.rand(like.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return u.to(like.device)


def corrupt(
    x0_BN: Tensor,
    *times_B: Tensor,
    schedule: Schedule,
    noise: Noise,
    generator: torch.Generator,
    free_BN: Tensor | None = None,
) -> tuple[Corrupted, ...]:
    """x_t ~ q(x_t | x_0) at one or several times, with the same tau and w for all of them.

    Two times a sequence are coupled sampling: RDM (arXiv 2302.05737) averages the loss over them.
    There x_s comes from the Markov posterior given x_t; here both lie on one de-randomised path.

    Args:
        x0_BN: clean tokens.
        times_B: each (B,) in [0, 1].
        schedule: alpha.
        noise: q_noise.
        generator: of tau and w.
        free_BN: bool, which tokens may be noised; None for all.

    Returns:
        One `Corrupted` a time.

    Raises:
        ValueError: a time outside [0, 1], or of another shape.
    """
    u = uniform_like(x0_BN, generator)
    w = noise.from_uniform(uniform_like(x0_BN, generator))
    made = []
    for t in times_B:
        t = t.to(x0_BN.device)
        noisy = hit(u, t, schedule)
        if free_BN is not None:
            noisy = noisy & free_BN
        made.append(Corrupted(torch.where(noisy, w, x0_BN), noisy, t.double()))
    return tuple(made)


def hit(u_BN: Tensor, t_B: Tensor, schedule: Schedule) -> Tensor:
    """(B, N) bool: tau <= t, of tokens whose tau has the rank u.

    Args:
        u_BN: float64 in [0, 1).
        t_B: in [0, 1].
        schedule: alpha.

    Raises:
        ValueError: a time outside [0, 1], or of another shape.
    """
    if t_B.shape != u_BN.shape[:1] or not bool(((t_B >= 0) & (t_B <= 1)).all()):
        raise ValueError(
            f"times must have shape ({len(u_BN)},) and lie in [0, 1], got shape "
            f"{tuple(t_B.shape)} and values {t_B.flatten()[:4].tolist()}; divide steps by T"
        )
    return u_BN < schedule.cdf(t_B)[:, None]


def frozen_path(
    x0_BN: Tensor, steps: int, *, schedule: Schedule, noise: Noise, generator: torch.Generator
) -> Tensor:
    """(T + 1, B, N) x_0..x_T of the de-randomised process.

    Args:
        x0_BN: clean tokens.
        steps: T.
        schedule, noise: alpha and q_noise.
        generator: of tau and w.

    Raises:
        ValueError: as `Schedule.grid`.
    """
    schedule.grid(steps)
    grid = torch.arange(steps + 1, dtype=torch.float64) / steps
    times = [t.expand(len(x0_BN)).to(x0_BN.device) for t in grid]
    path = corrupt(x0_BN, *times, schedule=schedule, noise=noise, generator=generator)
    return torch.stack([each.x_BN for each in path])


def markov_path(
    x0_BN: Tensor, steps: int, *, schedule: Schedule, noise: Noise, generator: torch.Generator
) -> Tensor:
    """(T + 1, B, N) x_0..x_T of the Markov chain: each step keeps x with chance a_t.

    Arguments as of `frozen_path`; a_t = alpha_t / alpha_{t-1}.
    """
    alpha = schedule.grid(steps).tolist()
    path = [x0_BN]
    for before, after in itertools.pairwise(alpha):
        keep = after / before if before > 0 else 1.0
        fresh = noise.from_uniform(uniform_like(x0_BN, generator))
        renewed = uniform_like(x0_BN, generator) >= keep
        path.append(torch.where(renewed, fresh, path[-1]))
    return torch.stack(path)


def posterior_mean(
    p_MK: Tensor, x_M: Tensor, alpha_s_M: Tensor, alpha_t_M: Tensor, noise: Noise
) -> Tensor:
    """(M, K) sum_{x_0} p(x_0) q(x_s | x_t, x_0), D3PM's reverse step (arXiv 2107.03006).

    With a = alpha_t / alpha_s and b = alpha_s,

        q(x_s = j | x_t = i, x_0) = [a 1(i=j) + (1-a) q_i] [b 1(j=x_0) + (1-b) q_j] / d(x_0),
        d(x_0) = alpha_t 1(i=x_0) + (1 - alpha_t) q_i,

    and the sum over x_0 costs O(K). Where q_i = 0, noise cannot be i, so the token is clean and
    stays: that is what predictions of the network for clean tokens are replaced by.

    Args:
        p_MK: float64 law of x_0 at each position.
        x_M: x_t.
        alpha_s_M, alpha_t_M: float64, alpha_s >= alpha_t.
        noise: q_noise.
    """
    law, here = noise.law_K.to(p_MK.device), x_M[:, None]
    alpha_s, alpha_t = alpha_s_M[:, None], alpha_t_M[:, None]
    a = torch.where(alpha_s > 0, alpha_t / alpha_s.clamp(min=_TINY), torch.ones_like(alpha_s))
    q_i = law[here]
    # d and the first bracket are the same for all tokens but x_t: a column apart, few passes.
    d = (1 - alpha_t) * q_i
    share = p_MK * torch.where(d > 0, 1 / d.clamp(min=_TINY), torch.zeros_like(d))
    at_x = torch.where(q_i > 0, p_MK.gather(1, here) / (d + alpha_t).clamp(min=_TINY), 0.0)
    share = share.scatter(1, here, at_x)
    mixed = alpha_s * share + (1 - alpha_s) * share.sum(1, keepdim=True) * law
    stays = torch.where(q_i > 0, (a + (1 - a) * q_i) * mixed.gather(1, here), 1.0)
    return ((1 - a) * q_i * mixed).scatter(1, here, stays)


def posterior(
    x_M: Tensor, x0_M: Tensor, alpha_s_M: Tensor, alpha_t_M: Tensor, noise: Noise
) -> Tensor:
    """(M, K) q(x_s | x_t, x_0), exact, of the Markov chain; arguments as of `posterior_mean`.

    Args:
        x_M: x_t.
        x0_M: x_0.
        alpha_s_M, alpha_t_M: float64, alpha_s >= alpha_t.
        noise: q_noise.
    """
    clean = torch.nn.functional.one_hot(x0_M, noise.vocab_size).double()
    return posterior_mean(clean, x_M, alpha_s_M, alpha_t_M, noise)
