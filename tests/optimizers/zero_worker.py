"""A rank of the DeepSpeed checks: `zero_worker.py OUT CASES`, RANK etc. in the environment.

Every case trains a few steps under DeepSpeed and writes how far the weights are from plain torch in
one process. Gradients are given, in numbers of few bits: sums over ranks and micro-batches are then
exact in bfloat16 too, and any difference is the optimizer's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparring.launch.processes import leave
from sparring.optimizers import MARS
from sparring.optimizers.deepspeed import register_deepspeed, take_moments, unwrap

SHAPES = {
    "a": (5, 7),
    "b": (11,),
    "c": (9, 3),
    "embed": (6, 5),
    "d": (3, 8),
    "e": (2,),
    "f": (2, 2),
}
# Of mixed kinds, so that a flat partition holds matrices and vectors; on three ranks the last is
# smaller than its padding.
GROUPS = (["a", "b", "c", "embed"], ["d", "e"], ["f"])
STEPS = 8
PREVIOUS = 50
"""Exact mode's gradients at the previous weights are those of a step 50 later."""


def draw(shape: tuple[int, ...], seed: int, most: int = 7) -> Tensor:
    """Odd multiples of 3/8, none above 3 most / 8.

    Few bits and a factor of three: sums over two or three ranks and their means are exact in
    bfloat16. No zeros: AdamW would turn the rounding of a zero gradient into a full step.
    """
    generator = torch.Generator().manual_seed(seed)
    odd = 2 * torch.randint(-(most + 1) // 2, (most + 1) // 2, shape, generator=generator) + 1
    return odd.float() * 3 / 8


def given(step: int, number: int, shape: tuple[int, ...], lora: bool = False) -> Tensor:
    """The gradient: large in two tensors, whose clip binds, and of a norm below one in others.

    In the shape of LoRA every second tensor is an A, whose first gradient is zero, as B is.
    """
    if lora and step == 0 and number % 2 == 0:
        return torch.zeros(shape)
    return draw(shape, 100 * (step + 1) + number) * scale(number)


def scale(number: int) -> float:
    return 1.0 if number in (0, 6) else 1 / 16


class Model(nn.Module):
    """A loss whose gradient at step t is given: sum over parameters of <p, G_t>."""

    def __init__(self, lora: bool = False) -> None:
        super().__init__()
        self.lora = lora
        for number, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(draw(shape, number)))
        self.frozen = nn.Parameter(torch.ones(3, 3), requires_grad=False)

    def forward(self, step: Tensor, part: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        for number, (name, shape) in enumerate(SHAPES.items()):
            gradient = given(step.item(), number, shape, self.lora)
            # Ranks and micro-batches differ, and average to the gradient given.
            noise = draw(shape, 9000 + number, most=1) * scale(number) * part.item()
            total = total + (getattr(self, name).float() * (gradient + noise)).sum()
        return total


def plain(case: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """The same training in one process, in float32; and how often the norm of a c was above 1."""
    options, clip = case["options"], case["clip"]
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).float())
    optimizer = MARS(groups(model) if not case.get("by_name") else trained(model), **options)

    def put_gradients(step: int) -> None:
        for number, name in enumerate(SHAPES):
            getattr(model, name).grad = given(step, number, SHAPES[name], bool(case.get("lora")))
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)

    clipped = 0

    def count_clips() -> None:
        nonlocal clipped
        for name in matrices(case):
            parameter = getattr(model, name)
            g = parameter.grad
            h = optimizer.state[parameter].get("last_grad", torch.zeros_like(g))
            clipped += bool((g + 0.475 * (g - h)).norm() > 1)

    for step in range(STEPS):
        if step == case.get("overflow"):
            continue
        if step == STEPS // 2 and "universal" in case:
            for state in optimizer.state.values():  # such a checkpoint has no last_grad
                state.pop("last_grad", None)
        if options.get("exact"):
            if step:
                put_gradients(step + PREVIOUS)
                if step == case.get("lost_update"):
                    optimizer.found_inf = torch.ones(())  # a GradScaler's way to skip it
                optimizer.step()
                vars(optimizer).pop("found_inf", None)
            put_gradients(step)
            count_clips()
            with optimizer.moments():
                optimizer.step()
        else:
            put_gradients(step)
            count_clips()
            optimizer.step()
    return {name: getattr(model, name).detach() for name in SHAPES}, clipped


def matrices(case: dict[str, Any]) -> list[str]:
    """The parameters that get MARS."""
    options = case["options"]
    tables = options.get("variant") != "shampoo" or options.get("shampoo_embeddings")
    vectors = options.get("optimize_1d")
    return [
        name
        for name, shape in SHAPES.items()
        if (vectors or len(shape) == 2) and (tables or name != "embed")
    ]


def held(case: dict[str, Any]) -> list[str]:
    """The parameters of which this rank holds a part under the case's sharding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [list(SHAPES)] if case.get("by_name") else GROUPS
    found = []
    for names in parts:
        sizes = {name: math.prod(SHAPES[name]) for name in names}
        if case["stage"] == 0:
            found += names
        elif case["stage"] == 3:  # every parameter is split into equal stretches
            found += [name for name, size in sizes.items() if rank * -(-size // world) < size]
        else:  # the whole group is, padded to a multiple of twice the ranks
            stretch = 2 * -(-sum(sizes.values()) // (2 * world))
            end = 0
            for name, size in sizes.items():
                start, end = end, end + size
                if start < (rank + 1) * stretch and end > rank * stretch:
                    found.append(name)
    return found


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [getattr(model, name) for name in SHAPES]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {"params": [(name, getattr(model, name)) for name in names], "weight_decay": decay}
        for names, decay in zip(GROUPS, (0.1, 0.0, 0.0), strict=True)
    ]


def configuration(case: dict[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"]}
    if case["offload"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["sub_group_size"] = 60  # several sub-groups: a call of step() each
    unregistered = bool(case.get("round_robin"))
    if unregistered:
        zero["round_robin_gradients"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": case["clip"],
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": unregistered,
        "steps_per_print": 2**31,
    }
    if case["precision"].startswith("bf16"):
        config["bf16"] = {"enabled": True}
    if case["precision"] == "bf16+fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if "universal" in case:
        config["checkpoint"] = {"load_universal": True}
    if case.keys() & {
        "overflow",
        "lost_update",
    }:  # fp16, which always looks for overflows, does not run on a CPU
        config["bf16"]["check_grad_overflow"] = True
    if case.get("by_name"):
        config["optimizer"] = {"type": "MARS", "params": case["options"]}
    return config


class Training:
    """An engine and what the checks do with it."""

    def __init__(self, case: dict[str, Any]) -> None:
        import deepspeed

        self.case = case
        config = configuration(case)
        if case.get("zero_init"):
            with deepspeed.zero.Init(config_dict_or_path=config):
                self.model = Model()
        else:
            self.model = Model(lora=bool(case.get("lora")))
        if case.get("by_name"):
            optimizer, parameters = None, trained(self.model)
        else:
            optimizer, parameters = MARS(groups(self.model), **case["options"]), None
        self.engine, self.wrapped, _, _ = deepspeed.initialize(
            model=self.model, optimizer=optimizer, model_parameters=parameters, config=config
        )
        self.mars = unwrap(self.engine)

    def backward(self, step: int, then: Callable[[], None]) -> None:
        rank, world, micro = dist.get_rank(), dist.get_world_size(), self.case["accumulation"]
        for number in range(micro):
            # These parts sum to zero over ranks and micro-batches.
            part = rank * micro + number - (world * micro - 1) / 2
            if step in (self.case.get("overflow"), self.case.get("lost_update", 0) + PREVIOUS):
                part = float("inf")
            self.engine.set_gradient_accumulation_boundary(number == micro - 1)
            self.engine.backward(self.engine(torch.tensor(step), torch.tensor(part)))
            if number == micro - 1:
                then()

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            if not self.case["options"].get("exact"):
                self.backward(step, self.engine.step)
                continue
            if step:
                self.backward(step + PREVIOUS, self.engine.step)
            self.backward(step, lambda: take_moments(self.engine))

    def weights(self) -> dict[str, Tensor]:
        """Float32 weights, from DeepSpeed's masters where it has any."""
        from deepspeed.utils import safe_get_full_fp32_param

        case = self.case
        if case["stage"] == 0 and case["precision"] == "fp32":
            found = {name: getattr(self.model, name) for name in SHAPES}
        elif case["stage"] == 0:
            masters = [p for group in self.wrapped.fp32_groups for p in group]
            found = dict(zip(SHAPES, masters, strict=True))
        else:
            found = {name: safe_get_full_fp32_param(getattr(self.model, name)) for name in SHAPES}
        return {name: value.detach().float().clone() for name, value in found.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in SHAPES)


def run(case: dict[str, Any], scratch: Path) -> dict[str, Any]:
    dtype = torch.float32 if case["precision"] == "fp32" else torch.bfloat16
    training = Training(case)
    if "save" in case:
        training.train(0, STEPS // 2)
        training.engine.save_checkpoint(case["save"], tag="half")
        training.engine.destroy()
        return {}
    if "universal" in case:
        training.engine.load_checkpoint(case["universal"], tag="half")
        training.train(STEPS // 2, STEPS)
    elif case.get("resume"):
        folder = str(scratch / f"{case['stage']}-{case['precision']}-{case['resume']}")
        training.train(0, STEPS // 2)
        training.engine.save_checkpoint(folder)
        training.engine.destroy()
        training = Training(case)
        training.engine.load_checkpoint(folder)
        training.train(STEPS // 2, STEPS)
    else:
        training.train(0, STEPS)
    found, (expected, clipped) = training.weights(), plain(case, dtype)
    steps = STEPS // 2 if case.get("resume") or "universal" in case else STEPS
    # Exact mode's last update is not made here, an overflow's is skipped.
    steps -= ("overflow" in case) + ("lost_update" in case)
    steps -= bool(case["options"].get("exact") and not case.get("resume"))
    facts = {
        "wrapper": type(training.wrapped).__name__,
        "updates": sum(n for rule, n in training.mars.updates.items() if rule != "AdamW"),
        "updates_due": steps * len([name for name in held(case) if name in matrices(case)]),
        "clipped": clipped / (len(matrices(case)) * STEPS),
        "max_abs_diff": difference(found, expected),
        "moved": difference(expected, {name: getattr(Model(), name) for name in SHAPES}),
    }
    if case.get("resume"):
        whole = Training(case)
        whole.train(0, STEPS)
        facts["resumed_diff"] = difference(found, whole.weights())
        whole.engine.destroy()
    training.engine.destroy()
    return facts


def main() -> None:
    logging.disable(logging.INFO)
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    import deepspeed.ops

    # Compiling it takes minutes, and leaves a stale lock when killed; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    if not any(case.get("round_robin") for case in cases):  # which it refuses
        register_deepspeed()
    results = []
    for case in cases:
        try:
            results.append(run(case, out.parent))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered))
    dist.barrier()
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
