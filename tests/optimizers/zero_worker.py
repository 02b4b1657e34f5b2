"""A rank of the DeepSpeed checks: `zero_worker.py OUT CASES`, with RANK and so on in the environment.

Every case trains a few steps under DeepSpeed and prints how far the weights are from plain torch in
one process. Gradients are given, in numbers of few bits: sums over ranks and micro-batches are then
exact in bfloat16 too, and any difference is the optimizer's.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch import Tensor, nn

SHAPES = {"a": (5, 7), "b": (11,), "c": (9, 3), "embed": (6, 5), "d": (3, 8), "e": (2,), "f": (2, 2)}
STEPS = 8


def draw(shape: tuple[int, ...], seed: int, most: int = 7) -> Tensor:
    """Odd multiples of 3/8, none above 3 most / 8.

    Few bits and a factor of three: sums over two or three ranks and their means are exact in
    bfloat16. No zeros: AdamW would turn the rounding of a zero gradient into a full step.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = 2 * torch.randint(-(most + 1) // 2, (most + 1) // 2, shape, generator=generator) + 1
    return odd.float() * 3 / 8


def given(step: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient: large in two tensors, whose clip binds, and of a norm below one in others."""
    return draw(shape, 100 * (step + 1) + number) * scale(number)


def scale(number: int) -> float:
    return 1.0 if number in (0, 6) else 1 / 16


class Model(nn.Module):
    """A loss whose gradient at step t is given: sum over parameters of <p, G_t>."""

    def __init__(self) -> None:
        super().__init__()
        for number, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(draw(shape, number)))

    def forward(self, step: Tensor, part: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for number, (name, shape) in enumerate(SHAPES.items()):
            gradient = given(step.item(), number, shape)
            # Ranks and micro-batches differ, and average to the gradient given.
            noise = draw(shape, 9000 + number, most=1) * scale(number) * part.item()
            total = total + (getattr(self, name).float() * (gradient + noise)).sum()
        return total


def plain(options: dict[str, Any], clip: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same training in one process, in float32."""
    from sparring.optimizers import MARS

    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
    optimizer = MARS(groups(model), **options)
    for step in range(STEPS):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = given(step, number, tuple(parameter.shape))
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if options.get("exact"):
            if step:
                optimizer.step()
            with optimizer.moments():
                optimizer.step()
        else:
            optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, both of mixed kinds: a flat partition then holds matrices and vectors."""
    named = list(model.named_parameters())
    first, second = named[:4], named[4:]
    return [{"params": first, "weight_decay": 0.1}, {"params": second, "weight_decay": 0.0}]


def run(case: dict[str, Any]) -> dict[str, Any]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from sparring.optimizers import MARS

    rank, world = dist.get_rank(), dist.get_world_size()
    stage, micro = case["stage"], case["accumulation"]
    dtype = torch.float32 if case["precision"] == "fp32" else torch.bfloat16
    zero: dict[str, Any] = {"stage": stage}
    if case["offload"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["sub_group_size"] = 60  # several sub-groups: a call of step() each
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro,
        "gradient_clipping": case["clip"],
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
        if case["precision"] == "bf16+fp32":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.get("zero_init"):
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = Model()
    else:
        model = Model()
    options = case["options"]
    optimizer = MARS(groups(model), **options)
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(step: int, then: Callable[[], None]) -> None:
        for number in range(micro):
            # These parts sum to zero over ranks and micro-batches.
            part = rank * micro + number - (world * micro - 1) / 2
            engine.set_gradient_accumulation_boundary(number == micro - 1)
            engine.backward(engine(torch.tensor(step), torch.tensor(part)))
            if number == micro - 1:
                then()

    def take_moments() -> None:
        with optimizer.moments():
            engine.optimizer.step()
        engine.optimizer.zero_grad()

    for step in range(STEPS):
        if not options.get("exact") or step:
            backward(step, engine.step)
        if options.get("exact"):
            backward(step, take_moments)
    expected = plain(options, case["clip"], dtype)
    start = Model()
    worst = moved = 0.0
    masters: dict[str, Tensor] = {}
    if stage == 0 and dtype == torch.bfloat16 and hasattr(wrapped, "fp32_groups"):
        masters = dict(
            zip(SHAPES, (p for group in wrapped.fp32_groups for p in group), strict=True)
        )
    for name, parameter in model.named_parameters():
        value = masters.get(name)
        if value is None:
            value = (
                parameter
                if stage == 0 and dtype == torch.float32
                else safe_get_full_fp32_param(parameter)
            )
        worst = max(worst, float((value.detach().float() - expected[name]).abs().max()))
        moved = max(moved, float((expected[name] - getattr(start, name)).abs().max()))
    facts = {
        "wrapper": type(wrapped).__name__,
        "updates": dict(optimizer.updates),
        "max_abs_diff": worst,
        "moved": moved,
    }
    engine.destroy()
    return facts


def main() -> None:
    logging.disable(logging.INFO)
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    import deepspeed.ops

    # Compiling it takes minutes, and leaves a stale lock when killed; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    results = []
    for case in cases:
        try:
            results.append(run(case))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered))
    dist.barrier()


if __name__ == "__main__":
    main()
