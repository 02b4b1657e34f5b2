"""Randomness by row: each row of a batch has its own stream, so its result ignores the batch.

Shape legend: B rows, N positions, M chosen positions (those of a mask, row by row), K tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def inverse_cdf(weights_MK: Tensor, u_M: Tensor) -> Tensor:
    """(M,) draws from rows of weights, by inversion in float64.

    One uniform a draw, and a token without weight is never drawn. Gumbel-max in float32, the usual
    way, lowers the temperature unnoticed (arXiv 2409.02908).

    Args:
        weights_MK: non-negative, not necessarily with sum 1.
        u_M: float64 in [0, 1).
    """
    cdf = weights_MK.to(torch.float64, copy=True).cumsum_(1)
    found = torch.searchsorted(cdf, (u_M * cdf[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=weights_MK.shape[1] - 1)


class Draws:
    """One stream a row.

    Args:
        generator: one a row; or one, from which a seed for each row is drawn in order, so that row
            b has the same stream in every batch of more than b rows.
        rows: B.
        device: where the draws go. They are made where the generators are.

    Raises:
        ValueError: as many generators as rows are wanted, or one.
    """

    def __init__(self, generator: Generators, rows: int, device: torch.device) -> None:
        self.device = device
        if isinstance(generator, torch.Generator):
            seeds = torch.randint(
                2**62, (rows,), generator=generator, device=generator.device, dtype=torch.int64
            ).tolist()
            self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        else:
            self._streams = list(generator)
        if len(self._streams) != rows:
            raise ValueError(
                f"{rows} rows need one generator, or one each, not {len(self._streams)}"
            )

    def uniform(self, mask_BN: Tensor) -> Tensor:
        """(M,) float64 in [0, 1), one for each True, row by row.

        A row draws as many numbers as it has True, so padding does not change them.
        """
        parts = [
            torch.rand(count, generator=stream, dtype=torch.float64, device=stream.device).cpu()
            for count, stream in zip(mask_BN.sum(1).tolist(), self._streams, strict=True)
        ]
        return torch.cat(parts).to(self.device)

    def categorical(self, weights_MK: Tensor, mask_BN: Tensor) -> Tensor:
        """(M,) one draw for each True of the mask, from its row of weights."""
        return inverse_cdf(weights_MK, self.uniform(mask_BN))
