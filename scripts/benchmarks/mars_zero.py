"""MARS under ZeRO 0 to 3 against one process: differences of the weights, and bytes it sends.

Starts its own processes (gloo on a CPU, NCCL on GPUs) and trains a small GPT-2 on random tokens in
float32. `extra_bytes_per_step` counts what a rank hands to collectives inside MARS's own step, on
top of DeepSpeed's. Ends with one JSON line.

    python scripts/benchmarks/mars_zero.py --ranks 2
    python scripts/benchmarks/mars_zero.py --quick
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("adamw", "shampoo")


def model(layers: int, width: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=width, n_layer=layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokens(step: int, ranks: int) -> Any:
    """A batch of 2 rows a rank, the same for every number of processes."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 512, (2 * ranks, 64), generator=generator)


def optimizer(network: Any, variant: str) -> Any:
    from sparring.optimizers import MARS

    return MARS(network.named_parameters(), lr=1e-3, weight_decay=0.01, variant=variant)


def single(arguments: argparse.Namespace, variant: str) -> dict[str, Any]:
    import torch

    network = model(arguments.layers, arguments.width)
    mars = optimizer(network, variant)
    for step in range(arguments.steps):
        ids = tokens(step, arguments.ranks)
        network(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        mars.step()
        mars.zero_grad()
    return {name: p.detach().clone() for name, p in network.named_parameters()}


class Meter:
    """Bytes that pass through the collectives which MARS's step calls."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self.bytes = 0
        self.inside = False
        for name in ("all_reduce", "all_to_all_single"):
            setattr(dist, name, self._counted(getattr(dist, name), name))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                sent = args[1] if name == "all_to_all_single" else args[0]
                self.bytes += sent.numel() * sent.element_size()
            return call(*args, **kwargs)

        return counted

    def watch(self, mars: Any) -> None:
        step = mars.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.inside = True
            try:
                return step(*args, **kwargs)
            finally:
                self.inside = False

        mars.step = watched


def sharded(arguments: argparse.Namespace, stage: int, variant: str) -> tuple[dict[str, Any], int]:
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    rank = dist.get_rank()
    network = model(arguments.layers, arguments.width)
    mars = optimizer(network, variant)
    meter = Meter()
    meter.watch(mars)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 2**31,
    }
    engine = deepspeed.initialize(model=network, optimizer=mars, config=config)[0]
    for step in range(arguments.steps):
        ids = tokens(step, arguments.ranks)[2 * rank : 2 * rank + 2].to(engine.device)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    found = {
        name: (p if stage == 0 else safe_get_full_fp32_param(p)).detach().float().cpu().clone()
        for name, p in network.named_parameters()
    }
    sent = torch.tensor(float(meter.bytes), device=engine.device)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    engine.destroy()
    return found, int(sent.item() / arguments.steps)


def work(arguments: argparse.Namespace) -> None:
    """One rank."""
    import torch

    if not torch.cuda.is_available():
        import deepspeed.ops

        # Compiling it takes minutes, and gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    from sparring.optimizers import register_deepspeed

    register_deepspeed()
    deepspeed.init_distributed(verbose=False)
    results: dict[str, Any] = {}
    first = int(os.environ["RANK"]) == 0
    for variant in VARIANTS:
        expected = single(arguments, variant)
        diffs, sent = {}, {}
        for stage in range(4):
            found, sent[str(stage)] = sharded(arguments, stage, variant)
            diffs[str(stage)] = max(
                float((found[name] - expected[name]).abs().max()) for name in expected
            )
        results[variant] = {"max_abs_diff": diffs, "extra_bytes_per_step": sent}
    results["tensors"] = len(expected)
    results["parameters"] = sum(p.numel() for p in expected.values())
    if first:
        Path(arguments.worker).write_text(json.dumps(results))
    torch.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--quick", action="store_true", help="1 layer of width 32, 5 steps")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.width, arguments.steps = 1, 32, 5
    if arguments.worker:
        work(arguments)
        return
    from sparring.launch.processes import free_port

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(arguments.ranks),
            "OMP_NUM_THREADS": "1",
        }
        import torch

        if not torch.cuda.is_available():
            place["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, *sys.argv, "--worker", str(out)]
        logs = [(Path(folder) / f"rank{rank}.log").open("w") for rank in range(arguments.ranks)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(arguments.ranks)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit((Path(folder) / "rank0.log").read_text()[-3000:])
        results = json.loads(out.read_text())
    for variant in VARIANTS:
        for stage, diff in results[variant]["max_abs_diff"].items():
            sent = results[variant]["extra_bytes_per_step"][stage]
            print(f"MARS-{variant:8} ZeRO {stage}: {diff:.1e}, {sent} bytes a step more")
    summary = {
        "benchmark": "mars_zero",
        "ranks": arguments.ranks,
        "steps": arguments.steps,
        "tensors": results["tensors"],
        "parameters": results["parameters"],
        "max_abs_diff": results["adamw"]["max_abs_diff"],
        "extra_bytes_per_step": results["adamw"]["extra_bytes_per_step"],
        "shampoo": results["shampoo"],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
