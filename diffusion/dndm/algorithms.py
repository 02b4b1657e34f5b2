"""The algorithms by name, each a composition of counts, position and token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from sparring.diffusion.dndm.ancestral import Ancestral
from sparring.diffusion.dndm.choices import Position, Token
from sparring.diffusion.dndm.counts import (
    CosineCounts,
    EntropyBoundCounts,
    FirstHitting,
    LinearCounts,
    ThresholdCounts,
    TransitionTimes,
)
from sparring.diffusion.dndm.denoisers import Denoiser, Sampled
from sparring.diffusion.dndm.draws import Generators
from sparring.diffusion.dndm.noise import Noise
from sparring.diffusion.dndm.reveal import Reveal
from sparring.diffusion.dndm.schedules import Function, Schedule, as_schedule

AnySchedule = Schedule | str | Function


class Sampler(Protocol):
    """What all of them are: `Reveal` and `Ancestral`."""

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
        """Generate the free positions."""


def dndm(
    steps: float,
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """DNDM, Algorithm 1 of arXiv 2312.09193: x_{t-1,n} = x~_{0,n} iff tau_n = t.

    Args:
        steps: T, or math.inf.
        schedule: of the transition times.
        token: "sample" or "argmax", as the authors' code always does.
        schedule_conditioning: as of `Reveal`.
    """
    return Reveal(
        counts=TransitionTimes(steps, as_schedule(schedule)),
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def dndm_v2(
    steps: float,
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """DNDM version 2: tokens with tau_n >= t are all overwritten, so earlier ones anew."""
    return replace(
        dndm(steps, schedule, token=token, schedule_conditioning=schedule_conditioning),
        revise="rewrite",
    )


def dndm_k(
    steps: float,
    schedule: AnySchedule = "linear",
    *,
    position: str | Position = "confidence",
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """DNDM-k: of the transition times only the counts K_t = #{n: tau_n >= t}; the surest first.

    Args:
        steps: T, or math.inf.
        schedule: of the transition times.
        position, token, schedule_conditioning: as of `Reveal`.
    """
    return replace(
        dndm(steps, schedule, token=token, schedule_conditioning=schedule_conditioning),
        position=position,
    )


def dndm_c(
    schedule: AnySchedule = "linear",
    *,
    position: str | Position = "random",
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """DNDM-C, Algorithm 2 of arXiv 2312.09193: infinitely many steps, N calls for N tokens.

    Args:
        schedule: tau has density -alpha'.
        position: "random", or "confidence" for its top-k variant.
        token, schedule_conditioning: as of `Reveal`.
    """
    return dndm_k(
        math.inf,
        schedule,
        position=position,
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def first_hitting(
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """The first-hitting sampler (arXiv 2409.02908): DNDM-C with times drawn one by one."""
    return Reveal(
        counts=FirstHitting(as_schedule(schedule)),
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def d3pm(steps: int, schedule: AnySchedule = "linear") -> Ancestral:
    """D3PM's ancestral sampling (arXiv 2107.03006): a call at each of T steps."""
    return Ancestral(steps=steps, schedule=as_schedule(schedule))


def mdlm_cache(steps: int, schedule: AnySchedule = "linear") -> Ancestral:
    """D3PM's law, with MDLM's cache (arXiv 2406.07524); for networks that ignore t."""
    return Ancestral(steps=steps, schedule=as_schedule(schedule), cache=True)


def rdm(
    steps: int,
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """RDM (arXiv 2302.05737) with random routing: T calls, each noisy token clean with chance
    (alpha_{t-1} - alpha_t) / (1 - alpha_t), the others' noise renewed."""
    return Reveal(
        counts=TransitionTimes(steps, as_schedule(schedule), skip=False),
        token=token,
        schedule_conditioning=schedule_conditioning,
        path="renewed",
    )


def rdm_k(
    steps: int,
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """RDM-k (arXiv 2302.05737): T calls; after call e the ceil(n e/T) surest of all are clean."""
    return Reveal(
        counts=LinearCounts(steps, as_schedule(schedule), skip=False),
        position="confidence",
        token=token,
        revise="rerank",
        schedule_conditioning=schedule_conditioning,
        path="renewed",
    )


def maskgit(
    steps: int,
    schedule: AnySchedule = "linear",
    *,
    position: str | Position = "confidence",
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """MaskGIT's decoding (arXiv 2202.04200) without its Gumbel noise: `CosineCounts` in S calls.

    Args:
        steps: S.
        schedule: for the time that the network is told.
        position, token, schedule_conditioning: as of `Reveal`.
    """
    return Reveal(
        counts=CosineCounts(steps, as_schedule(schedule)),
        position=position,
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def threshold(
    schedule: AnySchedule = "linear",
    *,
    threshold: float = 0.9,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """Threshold decoding (arXiv 2505.22618): all tokens above a chance, else the surest one.

    Args:
        schedule: for the time that the network is told.
        threshold: as of `ThresholdCounts`.
        token, schedule_conditioning: as of `Reveal`.
    """
    return Reveal(
        counts=ThresholdCounts(threshold, as_schedule(schedule)),
        position="confidence",
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def entropy_bound(
    schedule: AnySchedule = "linear",
    *,
    bound: float = 0.1,
    token: str | Token = "sample",
    schedule_conditioning: bool = False,
) -> Reveal:
    """Entropy-bound decoding (arXiv 2505.24857): as many of least entropy as the bound allows.

    Args:
        schedule: for the time that the network is told.
        bound: nats, as of `EntropyBoundCounts`.
        token, schedule_conditioning: as of `Reveal`.
    """
    return Reveal(
        counts=EntropyBoundCounts(bound, as_schedule(schedule)),
        position="entropy",
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


def autoregressive(
    schedule: AnySchedule = "linear",
    *,
    token: str | Token = "argmax",
    schedule_conditioning: bool = False,
) -> Reveal:
    """One token a call from left to right: greedy decoding by a denoiser."""
    return Reveal(
        counts=LinearCounts(schedule=as_schedule(schedule)),
        position="left-to-right",
        token=token,
        schedule_conditioning=schedule_conditioning,
    )


ALGORITHMS: dict[str, Callable[..., Sampler]] = {
    "dndm": dndm,
    "dndm-v2": dndm_v2,
    "dndm-k": dndm_k,
    "dndm-c": dndm_c,
    "first-hitting": first_hitting,
    "d3pm": d3pm,
    "mdlm-cache": mdlm_cache,
    "rdm": rdm,
    "rdm-k": rdm_k,
    "maskgit": maskgit,
    "threshold": threshold,
    "entropy-bound": entropy_bound,
    "autoregressive": autoregressive,
}


def settings_of(name: str) -> Mapping[str, inspect.Parameter]:
    """The settings that an algorithm takes, by name.

    Raises:
        ValueError: no such algorithm.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {list(ALGORITHMS)} or a sampler, not {name!r}")
    return inspect.signature(ALGORITHMS[name]).parameters


def algorithm(name: str, **settings: Any) -> Sampler:
    """The sampler of this name.

    Args:
        name: one of `ALGORITHMS`.
        settings: the arguments of its function.

    Raises:
        ValueError: no such name, or a setting that it does not take or lacks.
    """
    known = settings_of(name)
    try:
        inspect.signature(ALGORITHMS[name]).bind(**settings)
    except TypeError as error:
        raise ValueError(
            f"algorithm {name!r} does not take the settings {sorted(settings)}: {error}; it has "
            f"{list(known)}"
        ) from None
    return ALGORITHMS[name](**settings)
