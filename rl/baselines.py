"""Baselines that keep the gradient unbiased: leave-one-out, or the mean of earlier batches.

The mean of the batch itself contains the trajectory it is subtracted from and shrinks the estimate
by (N - 1) / N, so that is not offered.

Shape legend: N trajectories, H horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sparring.rl.ranks import sum_over_ranks

Kind = Literal["none", "loo", "running"]
KINDS: tuple[Kind, ...] = ("none", "loo", "running")
_DECAY = 0.9


class Baseline:
    """b_h for each trajectory of a batch, over all ranks.

        none      0
        loo       mean over the other trajectories of the batch, on all ranks; of each policy that
                  sampled them, weighted by its share, so that b has the same mean whichever policy
                  its trajectory is from: else importance weights of a mixture are biased with it
        running   exponential average, with decay 0.9, of the means of earlier batches; for batches
                  of a single trajectory

    Args:
        kind: its name.

    Raises:
        ValueError: no such baseline.
    """

    def __init__(self, kind: Kind = "loo") -> None:
        if kind not in KINDS:
            raise ValueError(f"baseline must be one of {list(KINDS)}, not {kind!r}")
        self.kind = kind
        self._average: Tensor | None = None
        self._next: Tensor | None = None

    def values(
        self, signal_NH: Tensor, counted_NH: Tensor, sources: Sequence[slice] = (slice(None),)
    ) -> Tensor:
        """(N, H) b_h; `advance` then takes the batch into the running average.

        Args:
            signal_NH: what b_h is the mean of, float64.
            counted_NH: bool, which entries count. All of them, unless h is indexed by actions: then
                the living ones, and b_h = 0 where no other trajectory lives.
            sources: rows of each policy that sampled, in the same order on all ranks.

        Raises:
            ValueError: "loo" of a policy's single trajectory.
        """
        if self.kind == "none":
            return torch.zeros_like(signal_NH)
        counted = counted_NH.to(signal_NH)
        own = signal_NH * counted
        parts = [(own[rows], counted[rows]) for rows in sources]
        flat = sum_over_ranks(
            [
                total
                for part, alive in parts
                for total in (part.sum(0), alive.sum(0), part.new_tensor([float(len(part))]))
            ]
        )
        sums, counts, sizes = (torch.stack(flat[n::3]) for n in range(3))
        if self.kind == "loo":
            if float(sizes.min()) < 2:
                raise ValueError(
                    "baseline 'loo' needs batches of at least 2 trajectories of each policy, not "
                    "1: raise the batch, or use baseline='running' or 'none'"
                )
            found = torch.zeros_like(own)
            for number, rows in enumerate(sources):
                mine, alive = torch.zeros_like(own), torch.zeros_like(own)
                mine[rows], alive[rows] = parts[number]
                others = (sums[number] - mine) / (counts[number] - alive).clamp(min=1)
                found += sizes[number] / sizes.sum() * others
            return found
        mean = sums.sum(0) / counts.sum(0).clamp(min=1)
        before = torch.zeros_like(mean) if self._average is None else self._average
        self._next = mean if self._average is None else torch.lerp(mean, before, _DECAY)
        return before.expand_as(signal_NH)

    def advance(self) -> None:
        """Take the batch of the last `values` into the running average."""
        self._average = self._next

    def state_dict(self) -> dict[str, Tensor | None]:
        """What `load_state_dict` needs to go on."""
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Go on from a state."""
        average = state["average"]
        self._average = self._next = None if average is None else average.clone()
