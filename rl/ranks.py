"""Ranks as rollout workers: sums over them, and their share of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Found = TypeVar("Found")


def place() -> tuple[int, int]:
    """(rank, world size); (0, 1) where torch.distributed is not initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _device() -> str:
    """Where the backend reduces: NCCL knows no tensors on the CPU."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def sum_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of each tensor over all ranks, in its own type, by one all-reduce in float64."""
    if place()[1] == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors]).to(_device())
    dist.all_reduce(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view_as(like).to(like) for part, like in zip(parts, tensors, strict=True)]


def max_over_ranks(value: float) -> float:
    """The largest of the ranks' values."""
    if place()[1] == 1:
        return value
    held = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return float(held)


def together(work: Callable[[], Found]) -> Found:
    """What `work` gives. Where it diverges on one rank, it does on all, so that none is waited for.

    Raises:
        FloatingPointError: on every rank, if on any.
    """
    if place()[1] == 1:
        return work()
    failure: FloatingPointError | None = None
    try:
        found = work()
    except FloatingPointError as error:
        failure = error
    if max_over_ranks(float(failure is not None)):
        raise failure or FloatingPointError("the run diverged on another rank")
    return found


def share(numbers: Sequence[int]) -> Sequence[int]:
    """Every world-size-th number, from this rank's on."""
    rank, world = place()
    return numbers[rank::world]


def check_share(name: str, value: object, trajectories: int) -> None:
    """Refuse a part of a batch that would leave a rank without a trajectory.

    Raises:
        ValueError: it has fewer trajectories than there are ranks.
    """
    world = place()[1]
    if trajectories < world:
        raise ValueError(
            f"{name} = {value!r} makes a part of {trajectories} trajectories for {world} ranks: "
            "each needs one; raise the batch, or use fewer ranks"
        )


def same_parameters(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, wherever they lie."""
    if place()[1] > 1:
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                held = tensor.to(_device())
                dist.broadcast(held, src=0)
                tensor.copy_(held)
