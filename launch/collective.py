"""torch around a stage: its device, its threads, and the group of ranks that talk to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sparring.launch.processes import World


def device() -> Any:
    """This rank's accelerator as a torch device, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def free_memory() -> None:
    """Give back the accelerator's memory of models that are no longer used."""
    import gc

    import torch

    gc.collect()  # hooks on a model's layers refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def process_group(world: World, backend: str = "gloo") -> Iterator[None]:
    """Join the ranks of a stage into torch's default group; one rank alone needs none.

    The launcher has put the address of rank 0 into the environment.
    """
    if world.size == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: threads only wait for each other where matrices are small, and equal
    bytes need sums in an order that does not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
