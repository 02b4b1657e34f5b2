"""A row's plan: when it calls the network, and how many of its tokens are clean after each call.

Shape legend: B rows, N positions, M predicted positions, E events of a row (calls that it needs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, ones_like, where, zeros_like

from sparring.diffusion.dndm.choices import Prediction, first
from sparring.diffusion.dndm.schedules import Schedule


@dataclass(frozen=True)
class Ranked:
    """A prediction whose positions are in order."""

    prediction: Prediction
    tokens_M: Tensor
    order_BN: Tensor
    """From first to last; noisy positions before the others."""


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """When each row calls the network, and how many of its tokens are clean afterwards."""

    priority_BN: Tensor
    """float64 in [0, 1): greater is revealed earlier where scores do not decide; -1 if fixed."""
    total_B: Tensor
    """Free positions."""
    schedule: Schedule

    @abstractmethod
    def active(self, call: int, clean_B: Tensor) -> Tensor:
        """(B,) bool: which rows take part in this call."""

    @abstractmethod
    def choose(self, call: int, held_B: Tensor, order_BN: Tensor, ranked: Ranked | None) -> Tensor:
        """(B, N) bool: which positions are clean after this call, beside those that are held.

        Args:
            call: its number, from 0.
            held_B: how many positions stay clean whatever happens.
            order_BN: positions from first to last, those that can be chosen before the others.
            ranked: what the network said; None where positions are chosen without it.
        """

    def time(self, call: int, clean_B: Tensor) -> Tensor:
        """(B,) float64 in (0, 1]: where the schedule expects the present share of clean tokens."""
        return self.schedule.quantile(1 - clean_B.double() / self.total_B)


@dataclass(frozen=True, kw_only=True)
class DrawnPlan(Plan):
    """Counts that are known before the first call."""

    clean_BE: Tensor
    """Clean positions after each event; the last one repeats after a row's end."""
    events_B: Tensor

    def active(self, call: int, clean_B: Tensor) -> Tensor:
        """Rows that have an event left."""
        return call < self.events_B

    def choose(self, call: int, held_B: Tensor, order_BN: Tensor, ranked: Ranked | None) -> Tensor:
        """(B, N) bool: the first in order, as many as are missing."""
        target = self.clean_BE[:, min(call, self.clean_BE.shape[1] - 1)]
        return first(order_BN, target - held_B)


@dataclass(frozen=True, kw_only=True)
class TimedPlan(DrawnPlan):
    """Counts and times that are known before the first call."""

    time_BE: Tensor
    """float64, decreasing; 0 after a row's end."""

    def time(self, call: int, clean_B: Tensor) -> Tensor:
        """(B,) the row's own time of this call; 0 after its end."""
        if call >= self.time_BE.shape[1]:
            return zeros_like(self.time_BE[:, 0])
        return self.time_BE[:, call]

    def repeated(self, rows: int) -> TimedPlan:
        """The plan of a single row, for a batch of rows."""
        parts = ("priority_BN", "total_B", "clean_BE", "events_B", "time_BE")
        return replace(self, **{p: getattr(self, p).repeat_interleave(rows, 0) for p in parts})


Rule = Callable[[Ranked], Tensor]
"""what the network said -> (B, N) bool: positions that may be revealed together."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePlan(Plan):
    """Counts that depend on what the network says."""

    rule: Rule

    def active(self, call: int, clean_B: Tensor) -> Tensor:
        """Rows that are not clean yet."""
        return clean_B < self.total_B

    def choose(self, call: int, held_B: Tensor, order_BN: Tensor, ranked: Ranked | None) -> Tensor:
        """(B, N) bool: what the rule says; where it says none, the first in order."""
        assert ranked is not None
        chosen = self.rule(ranked) & first(order_BN, self.total_B - held_B)
        return where(chosen.any(1)[:, None], chosen, first(order_BN, ones_like(held_B)))
