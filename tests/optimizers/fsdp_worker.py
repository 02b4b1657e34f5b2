"""A rank of the FSDP checks: `fsdp_worker.py OUT CASES`, with RANK and so on in the environment."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from sparring.launch.processes import leave
from sparring.optimizers import MARS

STEPS = range(6)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    # Rows that three ranks cannot share evenly, and fewer rows than ranks.
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2), nn.Linear(2, 5, bias=False))


def batch(step: int, rows: int = 12) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(step))


def loss(network: nn.Module, x: Tensor) -> Tensor:
    # Large enough that the norm of some parameters' c exceeds one.
    return (network(x) ** 2 - x.sum(1, keepdim=True)).pow(2).mean() * 4


def given(step: int, parameter: Tensor) -> Tensor:
    """A gradient that no rank rounds in its own way, for bfloat16."""
    shape = tuple(parameter.shape)
    generator = torch.Generator().manual_seed(1000 * step + sum(shape))
    drawn = torch.randn(shape, generator=generator).to(parameter.dtype)
    if isinstance(parameter, DTensor):
        drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
    return drawn


def train(network: nn.Module, optimizer: MARS, rank: int, world: int, steps: range = STEPS) -> None:
    def gradients(step: int) -> None:
        optimizer.zero_grad()
        if next(network.parameters()).dtype == torch.bfloat16:
            for parameter in network.parameters():
                parameter.grad = given(step, parameter)
        else:
            loss(network, batch(step)[rank::world]).backward()

    for step in steps:
        gradients(step)
        if optimizer.param_groups[0]["exact"]:
            optimizer.step()
            gradients(step)
            with optimizer.moments():
                optimizer.step()
        else:
            optimizer.step()


def shard(network: nn.Sequential, meshes: Sequence[DeviceMesh]) -> None:
    for number, layer in enumerate((0, 2, 3)):
        fully_shard(network[layer], mesh=meshes[number % len(meshes)])
    fully_shard(network, mesh=meshes[0])


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def worst(sharded: Iterable[Tensor], plain: Iterable[Tensor]) -> float:
    return max(
        float((whole(a) - b).detach().abs().max()) for a, b in zip(sharded, plain, strict=True)
    )


def momenta(optimizer: MARS) -> list[Tensor]:
    return [state["exp_avg"] for state in optimizer.state.values()]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Train as the case says: `mesh` (a shape, or two), `swap`, `resume`, `dtype`."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options, dtype = case.get("options", {}), getattr(torch, case.get("dtype", "float32"))
    plain = model().to(dtype)
    alone = MARS(plain.named_parameters(), **options)
    train(plain, alone, 0, 1)

    shapes = case.get("meshes", [[world]])
    names = ("replicate", "shard")
    meshes = [init_device_mesh("cpu", tuple(s), mesh_dim_names=names[-len(s) :]) for s in shapes]
    network = model().to(dtype)
    if case.get("swap"):  # as accelerate does: the optimizer first, then its parameters exchanged
        optimizer = MARS(network.named_parameters(), **options)
        shard(network, meshes)
        optimizer.param_groups[0]["params"] = list(network.parameters())
    else:
        shard(network, meshes)
        optimizer = MARS(network.named_parameters(), **options)
    if case.get("resume"):
        train(network, optimizer, rank, world, STEPS[:3])
        saved = get_optimizer_state_dict(network, optimizer)
        optimizer = MARS(network.named_parameters(), **options)
        set_optimizer_state_dict(network, optimizer, saved)
        train(network, optimizer, rank, world, STEPS[3:])
    else:
        train(network, optimizer, rank, world)
    keys = 0
    if not case.get("swap"):  # distributed checkpoints need the same keys on all ranks
        state = get_optimizer_state_dict(network, optimizer)["state"]
        keys = sum(len(entry) for entry in state.values())
    return {
        "max_abs_diff": worst(momenta(optimizer), momenta(alone)),
        "weights_diff": worst(network.parameters(), plain.parameters()),
        "moved": worst(model().to(dtype).parameters(), plain.parameters()),
        "updates": dict(optimizer.updates),
        "state_keys": keys,
    }


def tensor_parallel(case: dict[str, Any]) -> dict[str, Any]:
    """Norms by sequence parallelism, matrices by columns and rows, over 2 ranks; FSDP2 over both.

    The gradient of a replicated norm comes as each rank's share of a sum; FSDP2's shards of what is
    split already have strides.
    """

    def fresh() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))

    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tp"))
    shard, part = mesh.get_local_rank("data"), mesh.get_local_rank("tp")
    options = {"lr": 0.05, **case.get("options", {})}
    plain, network = fresh(), fresh()
    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(network, mesh["tp"], plan)
    if mesh.size(0) > 1:
        fully_shard(network, mesh=mesh["data"])
    alone = MARS(plain.named_parameters(), **options)
    optimizer = MARS(network.named_parameters(), **options)
    for step in STEPS:
        x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(step))
        alone.zero_grad()
        (plain(x) - x.sum()).pow(2).mean().backward()
        alone.step()
        optimizer.zero_grad()
        mine = x.chunk(mesh.size(0))[shard]
        (network(mine.chunk(2, dim=1)[part]) - x.sum()).pow(2).mean().backward()
        optimizer.step()
    return {
        "weights_diff": worst(network.parameters(), plain.parameters()),
        "moved": worst(fresh().parameters(), plain.parameters()),
    }


def refused(case: dict[str, Any]) -> dict[str, Any]:
    """What a sharding that MARS does not know gets to hear."""
    network, options = model(), case.get("options", {})
    before = case["refused"] != "FSDP1, then MARS"
    optimizer = None
    try:
        if case["refused"] == "two dimensions":
            mesh = init_device_mesh("cpu", (2, 2))
            split = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])
            parameter = nn.Parameter(split)
            parameter.grad = split.clone()
            MARS([parameter], **options).step()
        else:
            if before:
                optimizer = MARS(network.named_parameters(), **options)
            wrapped = FullyShardedDataParallel(
                network, use_orig_params=True, device_id=torch.device("cpu")
            )
            if not before:
                optimizer = MARS(wrapped.named_parameters(), **options)
            wrapped(batch(0)).sum().backward()
            optimizer.step()
    except ValueError as error:
        return {"refused": str(error), "states": len(optimizer.state) if optimizer else 0}
    return {"refused": "nothing"}


def main() -> None:
    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    cases = json.loads(Path(sys.argv[2]).read_text())
    kinds = {"refused": refused, "tensor parallel": tensor_parallel}
    results = []
    for case in cases:
        kind = next((kind for kind in kinds if kind in case), None)
        results.append(kinds[kind](case) if kind else run(case))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
