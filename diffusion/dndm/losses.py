"""Training losses for networks that predict x_0, as pure functions.

DNDM needs no training of its own: q(x_t | x_0) is that of D3PM and RDM, and so is the loss. With
t ~ U, an unbiased estimate of the bound is weight(t) times the cross-entropy of noisy tokens:

    absorbing, T steps      sum_t (alpha_{t-1} - alpha_t) / (1 - alpha_t) E CE    (arXiv 2406.07524)
    absorbing, T = inf      int -alpha'(t) / (1 - alpha(t)) E CE dt
    any noise, T steps      sum_t E KL(q(x_{t-1} | x_t, x_0) || p_theta(x_{t-1} | x_t))

Losses are sums over tokens, (B,) in nats; whoever trains divides by global counts.

Shape legend: B rows, N positions, K tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sparring.diffusion.dndm.forward import posterior, posterior_mean
from sparring.diffusion.dndm.noise import Noise
from sparring.diffusion.dndm.schedules import Schedule, check_steps

Weighting = Literal["linear", "reciprocal", "none"]
WEIGHTINGS: tuple[Weighting, ...] = ("linear", "reciprocal", "none")


def draw_times(
    rows: int, steps: float, generator: torch.Generator, *, times: int = 1
) -> tuple[Tensor, ...]:
    """Times t ~ U{1/T, .., 1}, or U(0, 1] for infinitely many steps; several fall.

    Args:
        rows: B.
        steps: T, or math.inf.
        generator: of the draws; they are on its device.
        times: how many for each row; 2 for coupled sampling.

    Returns:
        `times` tensors (B,), float64, the later time first.

    Raises:
        ValueError: steps < 1 and the like.
    """
    check_steps(steps)
    u = torch.rand((rows, times), generator=generator, dtype=torch.float64, device=generator.device)
    t = 1 - u if steps == math.inf else ((u * steps).floor() + 1) / steps
    return t.sort(1, descending=True).values.unbind(1)


def weight(t_B: Tensor, *, steps: float, schedule: Schedule, kind: Weighting) -> Tensor:
    """(B,) lambda_t.

        linear        1 - (t - 1/T): RDM's default, 1 - t for infinitely many steps
        reciprocal    T (alpha_{t-1/T} - alpha_t) / (1 - alpha_t), -alpha'/(1 - alpha) for them: the
                      bound of absorbing noise; 1/t for the linear schedule; 0 where 1 - alpha is
                      0, since no token is noisy there
        none          1

    Args:
        t_B: in (0, 1].
        steps: T, or math.inf.
        schedule: alpha.
        kind: its name.

    Raises:
        ValueError: no such weighting, or a time outside (0, 1].
    """
    if kind not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {list(WEIGHTINGS)}, not {kind!r}")
    check_steps(steps)
    t = t_B.double()
    if not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError(f"times must lie in (0, 1], not {t.flatten()[:4].tolist()}")
    if kind == "none":
        return torch.ones_like(t)
    before = t if steps == math.inf else t - 1 / steps
    if kind == "linear":
        return 1 - before
    noisy = schedule.cdf(t)
    gone = schedule.density(t) if steps == math.inf else steps * (noisy - schedule.cdf(before))
    return torch.where(noisy > 0, gone / noisy, 0.0)


def cross_entropy(
    logits_BNK: Tensor,
    x0_BN: Tensor,
    counted_BN: Tensor,
    *,
    noise: Noise,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(B,) sum over counted tokens of (1 - e) (-log p(x_0)) + e mean_k (-log p(k)).

    Args:
        logits_BNK: of x_0.
        x0_BN: clean tokens.
        counted_BN: bool. Absorbing: the masked ones. Multinomial: x_t != x_0 (RDM), or
            `Corrupted.noisy_BN` if the network is given it (schedule conditioning).
        noise: its mask is no token that x_0 can be, so it has no part in the mean.
        label_smoothing: e, in [0, 1).

    Raises:
        ValueError: e outside its range, or another vocabulary.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing!r}")
    if logits_BNK.shape[-1] != noise.vocab_size:
        raise ValueError(
            f"logits have {logits_BNK.shape[-1]} tokens, the noise has {noise.vocab_size}"
        )
    allowed = noise.predictable.to(logits_BNK.device)
    logits = logits_BNK.masked_fill(~allowed, -torch.inf)
    # float32 at least, as float64 where the network is.
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    loss = -logp.gather(-1, x0_BN[..., None])[..., 0]
    if label_smoothing:
        even = -logp.masked_fill(~allowed, 0).sum(-1) / allowed.sum()
        loss = (1 - label_smoothing) * loss + label_smoothing * even
    return torch.where(counted_BN, loss, torch.zeros_like(loss)).sum(1)


def variational_term(
    logits_BNK: Tensor,
    x_BN: Tensor,
    x0_BN: Tensor,
    alpha_s_B: Tensor,
    alpha_t_B: Tensor,
    *,
    noise: Noise,
    free_BN: Tensor | None = None,
) -> Tensor:
    """(B,) KL(q(x_s | x_t, x_0) || p_theta(x_s | x_t)) summed over free tokens, nats, float64.

    The sum over t = 1..T, with q(x_T) = p(x_T), bounds -log p_theta(x_0) from above (D3PM,
    arXiv 2107.03006). For absorbing noise it is weight / T times the cross-entropy.

    Args:
        logits_BNK: of x_0.
        x_BN: x_t.
        x0_BN: clean tokens.
        alpha_s_B, alpha_t_B: s before t.
        noise: q_noise.
        free_BN: bool; None for all.
    """
    size = logits_BNK.shape[:2]
    flat = logits_BNK.reshape(-1, logits_BNK.shape[-1])
    alpha_s, alpha_t = (
        a.to(flat.device, torch.float64)[:, None].expand(size).reshape(-1)
        for a in (alpha_s_B, alpha_t_B)
    )
    x = x_BN.reshape(-1)
    p = posterior_mean(noise.log_probabilities(flat).exp(), x, alpha_s, alpha_t, noise)
    q = posterior(x, x0_BN.reshape(-1), alpha_s, alpha_t, noise)
    # Where q is 0 its term is 0, and log p may be -infinity with a gradient of NaN.
    ratio = torch.where(q > 0, q.clamp(min=1e-300).log() - torch.where(q > 0, p, 1.0).log(), 0.0)
    kl = (q * ratio).sum(1).view(size)
    return kl.sum(1) if free_BN is None else torch.where(free_BN, kl, 0.0).sum(1)
