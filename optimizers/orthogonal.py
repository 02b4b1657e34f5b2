"""Orthogonal factors of momentum matrices, whole or in shards, for MARS-Shampoo.

Under sharding only the momentum travels: every split matrix is gathered on one rank, its owner, and
the orthogonal factor is scattered back, 2 numel elements a matrix instead of numel on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparring.optimizers.layouts import Layout, Original, Segment, collective_device

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""phi(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (K. Jordan's Muon), steep at 0, flat near 1."""


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """U phi^steps(S / |S|) V^T for U S V^T, close to U V^T: five steps of a quintic iteration.

    Small singular values stay small, large ones end between 0.7 and 1.2. bfloat16 on an
    accelerator, as in the authors' code; the matrix's own type, at least float32, on a CPU, where
    bfloat16 is the slower one.
    """
    if matrix.device.type == "cpu":
        x = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    else:
        x = matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = x.size(0) > x.size(1)
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    if tall:
        x = x.T
    return x.to(matrix.dtype)


def svd_factor(matrix: Tensor, steps: int = 0) -> Tensor:
    """U V^T by a singular value decomposition: exact and slow. `steps` has no meaning here."""
    u, _, vh = torch.linalg.svd(
        matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False
    )
    factor: Tensor = u @ vh
    return factor.to(matrix.dtype)


ORTHOGONALISERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "newton-schulz": newton_schulz,
    "svd": svd_factor,
}


def orthogonalise(momentum: Tensor, method: str, steps: int) -> Tensor:
    """sqrt(max(1, rows / columns)) times the orthogonal factor; more dimensions are columns."""
    matrix = momentum.reshape(momentum.size(0), -1)
    factor = ORTHOGONALISERS[method](matrix, steps)
    factor *= math.sqrt(max(1.0, matrix.size(0) / matrix.size(1)))
    return factor.view_as(momentum)


@dataclass(frozen=True)
class _Part:
    """A stretch of a split matrix and the rank that holds it."""

    rank: int
    start: int
    numel: int


class MatrixExchange:
    """Brings the parts of split matrices together on their owners, and back.

    Args:
        layouts: of the tensors of one optimizer call, all over the same process groups.
        originals: all parameters.
        members: which of them are to be orthogonalised.

    Raises:
        ValueError: the matrices are split over more than one group, or not into whole rows.

    Constructing and calling are collective over the process group.
    """

    _SCRATCH = 1 << 26
    """Elements in flight at once: 256 MB of float32."""

    def __init__(
        self, layouts: Sequence[Layout], originals: Sequence[Original], members: Sequence[int]
    ) -> None:
        groups = layouts[0].groups
        if len(groups) > 1:
            raise ValueError(
                f"the matrix of shape {originals[members[0]].shape} is split over {len(groups)} "
                "dimensions of its mesh; MARS-Shampoo needs one, Shard(0) (fully_shard without "
                "tensor parallelism)"
            )
        (self._group,) = groups
        self.members = tuple(members)
        self._originals = originals
        self._rank = dist.get_rank(self._group)
        self._size = dist.get_world_size(self._group)
        wanted = set(members)
        mine = [
            (segment.index, segment.start, segment.numel)
            for layout in layouts
            for segment in layout.segments
            if segment.index in wanted
        ]
        everywhere: list[Any] = [None] * self._size
        dist.all_gather_object(everywhere, mine, group=self._group)
        parts: dict[int, list[_Part]] = {index: [] for index in sorted(wanted)}
        for rank, found in enumerate(everywhere):
            for index, start, numel in found:
                parts[index].append(_Part(rank, start, numel))
        for index, held in parts.items():
            total = sum(part.numel for part in held)
            if total != originals[index].numel or any(part.start < 0 for part in held):
                raise ValueError(
                    f"the matrix of shape {originals[index].shape} is not split into whole rows "
                    "over the ranks; MARS-Shampoo needs that (ZeRO, fully_shard with Shard(0))"
                )
        self._parts = parts
        self._owner = self._choose_owners()
        self.split = {index for index, held in parts.items() if len(held) > 1}
        """Matrices that travel."""

    def _choose_owners(self) -> dict[int, int]:
        """Whole matrices stay; the others go, the dearest first, to the rank with least to do."""
        load = [0.0] * self._size
        owner: dict[int, int] = {}

        def cost(index: int) -> float:
            rows, columns = _matrix_shape(self._originals[index])
            return float(rows * columns * min(rows, columns))

        for index, held in self._parts.items():
            if len(held) == 1:
                owner[index] = held[0].rank
                load[held[0].rank] += cost(index)
        for index in sorted(self._parts, key=lambda i: (-cost(i), i)):
            if index not in owner:
                # Ties go to a holder of a part: that part does not travel.
                holders = {part.rank for part in self._parts[index]}
                owner[index] = min(
                    range(self._size), key=lambda rank: (load[rank], rank not in holders, rank)
                )
                load[owner[index]] += cost(index)
        return owner

    def __call__(
        self, pieces: dict[int, Tensor], factor: Callable[[Tensor], Tensor]
    ) -> dict[int, Tensor]:
        """Apply `factor` to whole matrices of which `pieces` are the local parts (flat).

        Args:
            pieces: by position of the original; those that this rank holds a part of.
            factor: from a matrix in its original shape to one of the same shape.
        """
        out: dict[int, Tensor] = {}
        for index, piece in pieces.items():
            if index not in self.split:
                shape = self._originals[index].shape
                out[index] = factor(piece.view(shape)).reshape(-1)
        for bucket in self._buckets():
            out |= self._exchange(bucket, pieces, factor)
        return out

    def _buckets(self) -> list[list[int]]:
        buckets: list[list[int]] = []
        size = 0
        for index in sorted(self.split):
            numel = self._originals[index].numel
            if not buckets or size + numel > self._SCRATCH:
                buckets.append([])
                size = 0
            buckets[-1].append(index)
            size += numel
        return buckets

    def _exchange(
        self,
        bucket: Sequence[int],
        pieces: dict[int, Tensor],
        factor: Callable[[Tensor], Tensor],
    ) -> dict[int, Tensor]:
        like = next(iter(pieces.values()), None)
        # A rank without a part takes part in the collectives all the same.
        dtype = torch.float32 if like is None else like.dtype
        device = collective_device(self._group)
        going = [
            [i for i in bucket if self._owner[i] == rank and i in pieces]
            for rank in range(self._size)
        ]
        coming = [
            [(i, p) for i in bucket if self._owner[i] == self._rank for p in self._parts[i]
             if p.rank == rank]
            for rank in range(self._size)
        ]  # fmt: skip
        send_sizes = [sum(pieces[i].numel() for i in row) for row in going]
        receive_sizes = [sum(part.numel for _, part in row) for row in coming]
        send = torch.cat(
            [torch.empty(0, dtype=dtype, device=device)]
            + [pieces[i].reshape(-1).to(device) for row in going for i in row]
        )
        received = torch.empty(sum(receive_sizes), dtype=dtype, device=device)
        dist.all_to_all_single(received, send, receive_sizes, send_sizes, group=self._group)

        whole = {
            i: torch.empty(self._originals[i].numel, dtype=dtype, device=device)
            for i in bucket
            if self._owner[i] == self._rank
        }
        arrived = [entry for row in coming for entry in row]
        chunks = torch.split(received, [part.numel for _, part in arrived]) if arrived else ()
        for (i, part), chunk in zip(arrived, chunks, strict=True):
            whole[i][part.start : part.start + part.numel] = chunk
        for i, matrix in whole.items():
            whole[i] = factor(matrix.view(self._originals[i].shape)).reshape(-1)
        back = torch.cat(
            [torch.empty(0, dtype=dtype, device=device)]
            + [whole[i][part.start : part.start + part.numel] for i, part in arrived]
        )
        returned = torch.empty_like(send)
        dist.all_to_all_single(returned, back, send_sizes, receive_sizes, group=self._group)
        sent = [i for row in going for i in row]
        parts = torch.split(returned, [pieces[i].numel() for i in sent]) if sent else ()
        return {i: chunk.to(pieces[i].device) for i, chunk in zip(sent, parts, strict=True)}


def _matrix_shape(original: Original) -> tuple[int, int]:
    return original.shape[0], math.prod(original.shape[1:])


def segment_view(tensor: Tensor, segment: Segment) -> Tensor:
    """The elements of a segment, as a flat view."""
    return tensor.view(-1).narrow(0, segment.offset, segment.numel)
