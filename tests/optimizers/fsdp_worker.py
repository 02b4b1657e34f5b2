"""A rank of the FSDP2 checks: `fsdp_worker.py OUT`, with RANK and so on in the environment."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparring.optimizers import MARS

STEPS = 6


def model() -> nn.Sequential:
    torch.manual_seed(0)
    # Rows that three ranks cannot share evenly, and fewer rows than ranks.
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2), nn.Linear(2, 5, bias=False))


def batch(step: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step))


def loss(network: nn.Module, x: Tensor) -> Tensor:
    # Large enough that the norm of some parameters' c exceeds one.
    return (network(x) ** 2 - x.sum(1, keepdim=True)).pow(2).mean() * 4


def train(network: nn.Module, optimizer: MARS, rank: int, world: int) -> None:
    for step in range(STEPS):
        x = batch(step)
        if optimizer.param_groups[0]["exact"]:
            loss(network, x[rank::world]).backward()
            optimizer.step()
            optimizer.zero_grad()
        loss(network, x[rank::world]).backward()
        if optimizer.param_groups[0]["exact"]:
            with optimizer.moments():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()


def run(options: dict[str, Any], mesh_shape: tuple[int, ...], swap: bool) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = model()
    train(plain, MARS(plain.named_parameters(), **options), 0, 1)

    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    network = model()
    if swap:  # as accelerate does: the optimizer first, then its parameters are exchanged
        optimizer = MARS(network.named_parameters(), **options)
    for layer in (0, 2, 3):
        fully_shard(network[layer], mesh=mesh)
    fully_shard(network, mesh=mesh)
    if swap:
        optimizer.param_groups[0]["params"] = list(network.parameters())
    else:
        optimizer = MARS(network.named_parameters(), **options)
    train(network, optimizer, rank, world)
    worst = max(
        float((sharded.full_tensor() - whole).detach().abs().max())  # type: ignore[attr-defined]
        for sharded, whole in zip(network.parameters(), plain.parameters(), strict=True)
    )
    start = model()
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(start.parameters(), plain.parameters(), strict=True)
    )
    keys = 0
    if not swap:  # distributed checkpoints need the same keys on all ranks
        state = get_optimizer_state_dict(network, optimizer)["state"]
        keys = sum(len(entry) for entry in state.values())
    return {
        "max_abs_diff": worst,
        "moved": moved,
        "updates": dict(optimizer.updates),
        "state_keys": keys,
    }


def main() -> None:
    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    cases: list[tuple[dict[str, Any], tuple[int, ...], bool]] = [
        ({}, (world,), False),
        ({}, (world,), True),
        ({"fused": False, "optimize_1d": True, "amsgrad": True}, (world,), False),
        ({"variant": "lion"}, (world,), False),
        ({"variant": "shampoo"}, (world,), False),
        ({"exact": True}, (world,), False),
    ]
    if world == 4:
        cases = [({}, (2, 2), False), ({"variant": "shampoo"}, (2, 2), False)]
    results = [run(*case) for case in cases]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
