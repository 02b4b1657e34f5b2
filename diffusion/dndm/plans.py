"""A row's plan: when it calls the network, and how many of its tokens are clean after each call.

Shape legend: B rows, N positions, M predicted positions, E events of a row (calls that it needs).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, zeros_like

from sparring.diffusion.dndm.choices import Prediction
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
    def target(self, call: int, clean_B: Tensor, ranked: Ranked | None) -> Tensor:
        """(B,) free positions that are clean after this call.

        Args:
            call: its number, from 0.
            clean_B: free positions that are clean now.
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

    def target(self, call: int, clean_B: Tensor, ranked: Ranked | None) -> Tensor:
        """(B,)"""
        return self.clean_BE[:, min(call, self.clean_BE.shape[1] - 1)]


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


Rule = Callable[[Ranked, Tensor], Tensor]
"""what the network said, (B,) noisy positions -> (B,) how many of them are revealed."""


@dataclass(frozen=True, kw_only=True)
class AdaptivePlan(Plan):
    """Counts that depend on what the network says."""

    rule: Rule

    def active(self, call: int, clean_B: Tensor) -> Tensor:
        """Rows that are not clean yet."""
        return clean_B < self.total_B

    def target(self, call: int, clean_B: Tensor, ranked: Ranked | None) -> Tensor:
        """(B,), at least one more than now."""
        assert ranked is not None
        more = self.rule(ranked, self.total_B - clean_B)
        return clean_B + more.clamp(min=1)
