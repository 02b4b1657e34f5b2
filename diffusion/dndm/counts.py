"""The first of a sampler's three choices: how many tokens a call reveals, and at which time.

Drawn before the first call: `TransitionTimes`, `FirstHitting`, `LinearCounts`, `CosineCounts`.
Decided at each call: `ThresholdCounts`, `EntropyBoundCounts`. Each gives a `Plan`, by row: at call
k every row has a time of its own, its k-th largest. Rows are thus aligned by rank and not by a
common clock, and a batch needs max_b, not the union, of the rows' calls.

Shape legend: B rows, N positions, E events of a row (calls that it needs).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.diffusion.dndm.draws import Draws
from sparring.diffusion.dndm.plans import AdaptivePlan, DrawnPlan, Plan, Ranked, TimedPlan
from sparring.diffusion.dndm.schedules import LinearSchedule, Schedule, check_steps

_TINY = torch.finfo(torch.float64).tiny


class Counts(ABC):
    """How many tokens each call reveals."""

    drawn = True
    """Whether the counts are known before the first call."""

    @abstractmethod
    def plan(self, free_BN: Tensor, draws: Draws) -> Plan:
        """A plan for each row, for its free positions."""


def _priorities(free_BN: Tensor, draws: Draws) -> Tensor:
    """(B, N) uniform random numbers at free positions, -1 elsewhere."""
    priority = torch.full(free_BN.shape, -1.0, dtype=torch.float64, device=free_BN.device)
    priority[free_BN] = draws.uniform(free_BN)
    return priority


def _one_by_one(free_BN: Tensor) -> tuple[Tensor, Tensor]:
    """(B, E) clean positions after events that reveal one token each, and (B,) the events."""
    total = free_BN.sum(1)
    event = torch.arange(1, int(total.max()) + 1, device=free_BN.device)
    return event.minimum(total[:, None]), total


def _falling_events(time_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct positive times by row: time_BE falling, how many positions had it or a later one."""
    falling = time_BN.sort(1, descending=True).values
    begins = torch.ones_like(falling, dtype=torch.bool)
    begins[:, 1:] = falling[:, 1:] != falling[:, :-1]
    begins &= falling > 0
    event = (begins.cumsum(1) - 1).clamp(min=0)
    events_B = begins.sum(1)
    width = int(events_B.max())
    positive = falling > 0
    time = torch.zeros_like(falling).scatter_reduce(
        1, event, falling.where(positive, torch.zeros_like(falling)), "amax"
    )
    group = torch.zeros_like(event).scatter_add(1, event, positive.long())
    return time[:, :width], group[:, :width].cumsum(1), events_B


@dataclass(frozen=True)
class TransitionTimes(Counts):
    """DNDM's counts (arXiv 2312.09193, Algorithms 1 and 2): tau_n ~ D_tau for each free position.

    A row has an event at each of its distinct tau, and K_t = #{n: tau_n >= t} tokens are clean
    after it. With infinitely many steps all tau differ, and every event reveals one token.

    Args:
        steps: T, or math.inf.
        schedule: 1 - alpha is the distribution function of tau. Not necessarily the schedule of
            the training.
        skip: whether to leave out the steps at which no tau lies. False makes T calls a row, the
            cost of ancestral sampling, for the same law.

    Raises:
        ValueError: steps < 1; or infinitely many of them, none to be skipped.
    """

    steps: float
    schedule: Schedule = field(default_factory=LinearSchedule)
    skip: bool = True

    def __post_init__(self) -> None:
        check_steps(self.steps)
        if self.steps == math.inf and not self.skip:
            raise ValueError("skip=False makes one call a step, so steps must not be math.inf")

    def plan(self, free_BN: Tensor, draws: Draws) -> TimedPlan:
        """The plan."""
        u = _priorities(free_BN, draws)
        tau = self.schedule.times(u.clamp(min=0), self.steps)
        tau = tau.clamp(min=_TINY).where(free_BN, torch.zeros_like(tau))
        if self.steps == math.inf:
            # By rank and not by value: rounding makes no two tokens one event.
            clean, events = _one_by_one(free_BN)
            time = tau.sort(1, descending=True).values[:, : clean.shape[1]]
        elif self.skip:
            time, clean, events = _falling_events(tau)
        else:
            steps = int(self.steps)
            grid = torch.arange(steps, 0, -1, dtype=torch.float64, device=tau.device) / steps
            time = grid.expand(len(tau), -1)
            clean = (tau[:, None, :] >= grid[:, None]).sum(2)
            events = torch.full_like(clean[:, 0], steps)
        return TimedPlan(
            priority_BN=u,
            total_B=free_BN.sum(1),
            schedule=self.schedule,
            time_BE=time,
            clean_BE=clean,
            events_B=events,
        )


@dataclass(frozen=True)
class FirstHitting(Counts):
    """One token a call, at times drawn one after the other (arXiv 2409.02908).

    With n tokens noisy at t the next is revealed at s with 1 - alpha(s) = (1 - alpha(t)) u^(1/n):
    the largest of n transition times below t. In law it is `TransitionTimes(math.inf)`, for any
    noise.

    Args:
        schedule: alpha.
    """

    schedule: Schedule = field(default_factory=LinearSchedule)

    def plan(self, free_BN: Tensor, draws: Draws) -> TimedPlan:
        """The plan."""
        priority = _priorities(free_BN, draws)
        clean, total = _one_by_one(free_BN)
        places = torch.arange(clean.shape[1], device=free_BN.device)
        lives, left = places < total[:, None], total[:, None] - places
        log = torch.zeros(lives.shape, dtype=torch.float64, device=lives.device)
        # 1 - u lies in (0, 1], so the logarithm is finite.
        log[lives] = torch.log1p(-draws.uniform(lives))
        time = self.schedule.quantile((log / left.clamp(min=1)).cumsum(1).exp())
        time = time.clamp(min=_TINY)
        return TimedPlan(
            priority_BN=priority,
            total_B=total,
            schedule=self.schedule,
            time_BE=time.where(lives, torch.zeros_like(time)),
            clean_BE=clean,
            events_B=total,
        )


@dataclass(frozen=True)
class _PacedCounts(Counts):
    """Clean after event e of S: n minus the noisy tokens left, by a pace that a subclass gives.

    The network is told the time at which the schedule expects the present share of clean tokens.

    Args:
        steps: S; None for as many as tokens.
        schedule: alpha, for that time.
        skip: whether to leave out steps that reveal nothing.

    Raises:
        ValueError: steps < 1.
    """

    steps: int | None = None
    schedule: Schedule = field(default_factory=LinearSchedule)
    skip: bool = True

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_steps(self.steps)
            if self.steps == math.inf:
                raise ValueError("steps must be finite; None reveals one token a call")

    @abstractmethod
    def _noisy(self, total_B1: Tensor, event_BE: Tensor, steps_B1: Tensor) -> Tensor:
        """(B, E) noisy tokens left."""

    def plan(self, free_BN: Tensor, draws: Draws) -> DrawnPlan:
        """The plan."""
        priority, total = _priorities(free_BN, draws), free_BN.sum(1)
        events = total if self.steps is None else torch.full_like(total, self.steps)
        event = torch.arange(1, int(events.max()) + 1, device=free_BN.device).expand(len(total), -1)
        clean = total[:, None] - self._noisy(
            total[:, None], event.minimum(events[:, None]), events[:, None]
        )
        if self.skip:
            clean, events = _without_idle(clean)
        return DrawnPlan(
            priority_BN=priority,
            total_B=total,
            schedule=self.schedule,
            clean_BE=clean,
            events_B=events,
        )


def _without_idle(clean_BE: Tensor) -> tuple[Tensor, Tensor]:
    """Only the events at which the count of clean positions rises, and how many they are."""
    rises = clean_BE > torch.nn.functional.pad(clean_BE, (1, 0))[:, :-1]
    events = rises.sum(1)
    target = (rises.cumsum(1) - 1).clamp(min=0)
    packed = torch.zeros_like(clean_BE).scatter_reduce(1, target, clean_BE, "amax")
    return packed[:, : int(events.max())].cummax(1).values, events


@dataclass(frozen=True)
class LinearCounts(_PacedCounts):
    """Equal shares: floor(n (S - e) / S) tokens are noisy after call e (RDM, LLaDA)."""

    def _noisy(self, total_B1: Tensor, event_BE: Tensor, steps_B1: Tensor) -> Tensor:
        return total_B1 * (steps_B1 - event_BE) // steps_B1


@dataclass(frozen=True)
class CosineCounts(_PacedCounts):
    """Few first, then more: floor(n cos(pi/2 e/S)) are noisy after call e (MaskGIT, 2202.04200)."""

    def _noisy(self, total_B1: Tensor, event_BE: Tensor, steps_B1: Tensor) -> Tensor:
        share = torch.cos(math.pi / 2 * event_BE.double() / steps_B1)
        # cos(pi/2) is 6e-17 and cos(pi/3) a little less than a half: rounding, not a token.
        return (total_B1 * share + 1e-9).floor().long()


@dataclass(frozen=True)
class ThresholdCounts(Counts):
    """Every token that the network gives more than a chance (2505.22618).

    The sampler's order matters only where there is none: its first position is then revealed.

    Args:
        threshold: in (0, 1].
        schedule: for the time that the network is told.

    Raises:
        ValueError: threshold outside its range.
    """

    threshold: float
    schedule: Schedule = field(default_factory=LinearSchedule)
    drawn = False

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(
                f"threshold must lie in (0, 1], not {self.threshold!r}; 1 reveals one token a call"
            )

    def _rule(self, ranked: Ranked) -> Tensor:
        sure = ranked.prediction.logp_of(ranked.tokens_M).exp() > self.threshold
        return ranked.prediction.spread(sure, False)

    def plan(self, free_BN: Tensor, draws: Draws) -> AdaptivePlan:
        """The plan."""
        return AdaptivePlan(
            priority_BN=_priorities(free_BN, draws),
            total_B=free_BN.sum(1),
            schedule=self.schedule,
            rule=self._rule,
        )


@dataclass(frozen=True)
class EntropyBoundCounts(Counts):
    """The longest run of positions with sum of entropies - largest entropy <= bound (2505.24857).

    That difference bounds the information the revealed tokens share, which is what revealing them
    together ignores. The paper takes positions by entropy; here they come in the sampler's order.

    Args:
        bound: non-negative, nats; 0 reveals one token a call unless tokens are certain.
        schedule: for the time that the network is told.

    Raises:
        ValueError: a negative bound.
    """

    bound: float
    schedule: Schedule = field(default_factory=LinearSchedule)
    drawn = False

    def __post_init__(self) -> None:
        if not self.bound >= 0:
            raise ValueError(f"bound must be at least 0 nats, not {self.bound!r}")

    def _rule(self, ranked: Ranked) -> Tensor:
        prediction, order = ranked.prediction, ranked.order_BN
        entropy = prediction.spread(prediction.entropy, 0.0).gather(1, order)
        # It does not fall along the order, so what is within the bound is a run from its start.
        within = entropy.cumsum(1) - entropy.cummax(1).values <= self.bound
        return torch.zeros_like(within).scatter(1, order, within)

    def plan(self, free_BN: Tensor, draws: Draws) -> AdaptivePlan:
        """The plan."""
        return AdaptivePlan(
            priority_BN=_priorities(free_BN, draws),
            total_B=free_BN.sum(1),
            schedule=self.schedule,
            rule=self._rule,
        )
