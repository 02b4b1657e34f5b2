"""Time and memory of a MARS step against torch's AdamW, fused and foreach, in one run.

Rounds alternate between the optimizers, so that what else the machine does hits all alike; a
ratio is taken within a round, and medians and quartiles over rounds are reported. Nothing but
`step()` is timed. Ends with one JSON line.

    python scripts/benchmarks/mars_step.py                 # GPT-2 small's 124 M parameters
    python scripts/benchmarks/mars_step.py --quick
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparring.optimizers import MARS

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Build] = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "MARS": lambda p: MARS(p),
    "MARS without clip": lambda p: MARS(p, clip_c=False),
    "MARS foreach": lambda p: MARS(p, foreach=True),
    "MARS-Lion": lambda p: MARS(p, variant="lion"),
}


def shapes(layers: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Parameters of a GPT-2 without biases."""
    found: list[tuple[int, ...]] = [(vocabulary, width), (1024, width)]
    for _ in range(layers):
        found += [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
        found += [(width,), (width,)]
    return found


def seconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state a parameter, steps aside."""
    values = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim()]
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(v.numel() * v.element_size() for v in tensors) / count


def quartiles(values: list[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return [round(x, 3) for x in (middle, low, high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="torch's own number if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="4 layers of width 256, 10 rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.width, arguments.vocabulary = 4, 256, 8192
        arguments.rounds = 10
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    listed = shapes(arguments.layers, arguments.width, arguments.vocabulary)
    # One model for all: only the state differs.
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in listed]
    size = sum(p.numel() for p in params)
    norm = size**0.5
    for parameter in params:
        parameter.grad = torch.randn_like(parameter) / norm  # as after a global clip at 1
    times: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    memory: dict[str, float] = {}
    baseline = OPTIMIZERS["AdamW fused"](params)
    ratios: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for name, build in OPTIMIZERS.items():
        optimizer = build(params)
        for warm in (baseline, optimizer, baseline, optimizer):
            warm.step()
        for _ in range(arguments.rounds):
            reference, mine = seconds(baseline, device), seconds(optimizer, device)
            times[name].append(mine)
            ratios[name].append(mine / reference)
        memory[name] = round(state_bytes(optimizer), 3)
        middle, low, high = quartiles(ratios[name])
        print(
            f"{name:18} {statistics.median(times[name]) * 1e3:8.1f} ms   "
            f"{middle:.2f} x fused AdamW [{low:.2f}, {high:.2f}]   {memory[name]:.1f} B/parameter",
            flush=True,
        )
    mars, foreach = statistics.median(ratios["MARS"]), statistics.median(ratios["AdamW foreach"])
    summary: dict[str, Any] = {
        "benchmark": "mars_step",
        "parameters": size,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "rounds": arguments.rounds,
        "ratio_vs_fused_adamw": round(mars, 3),
        "ratio_vs_fused_adamw_quartiles": quartiles(ratios["MARS"])[1:],
        "ratio_vs_foreach_adamw": round(mars / foreach, 3),
        "state_bytes_per_param": memory["MARS"],
        "all_ratios": {name: quartiles(values) for name, values in ratios.items()},
        "all_state_bytes_per_param": memory,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
