"""SPIN-Diffusion's comparison sampled without guidance: figures of docs/diffusion/spin.md.

Guidance trades variety for captions, so an arm that follows captions better may only have more of
it. Reads the networks that spin_diffusion.py left in its --out and samples the held-out captions
again, with the same noise for all: the start, and the last iterate of every arm.

    python scripts/benchmarks/spin_diffusion_guidance.py --runs runs/spin-diffusion
    python scripts/benchmarks/spin_diffusion_guidance.py --runs runs/spin-diffusion --guidance 1 3

Some 20 seconds of a CPU core a network and strength. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from spin_diffusion import ARMS, cell

from sparring.launch.calls import run_stage
from sparring.launch.comparison import interval

SHOWN = ("accuracy", "frechet", "kernel_distance", "coverage")
Figures = dict[str, float]


def measure(run: Path, network: Path, guidance: float) -> Figures:
    """Figures of a network on the held-out captions of a run; both stay in a folder beside it."""
    name = f"{run.name}-{network.parent.name}-{guidance:g}"
    images, out = run / "images", run.parent / "guidance" / name
    sampling = {"scheduler": "ddim", "steps": 25, "batch": 64, "chunk": 320, "part": "heldout"}
    made = run_stage(
        "generate-images",
        out / "generate-images",
        {"model": network, "images": images},
        guidance=guidance,
        quiet=True,
        **sampling,
    )
    inputs = {"images": images, "current": made}
    scored = run_stage(
        "evaluate-images", out / "evaluate-images", inputs, scorers=["classifier"], quiet=True
    )
    values = {name: scored.figures[name] for name in SHOWN}
    return {name: float(v[0] if isinstance(v, list) else v) for name, v in values.items()}


def networks(
    runs: Path, seeds: Sequence[int], iterations: int
) -> dict[str, list[tuple[Path, Path]]]:
    """By arm: a run and the network in it, a seed each.

    Raises:
        SystemExit: none of the arms is there.
    """
    found: dict[str, list[tuple[Path, Path]]] = {}
    for arm in ARMS:
        for folder in (runs / f"{arm}-seed{seed}" for seed in seeds):
            last = folder / f"iter{iterations - 1}" / "train-images"
            if last.is_dir():
                found.setdefault(arm, []).append((folder, last))
                if arm == "spin":
                    start = (folder, folder / "start" / "train-images")
                    found.setdefault("base", []).append(start)
    if not found:
        raise SystemExit(f"{runs} has no run of {', '.join(ARMS)}; run spin_diffusion.py first")
    return found


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/spin-diffusion"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0])
    options = parser.parse_args()
    found = networks(options.runs, options.seeds, options.iterations)
    print("| network | guidance | " + " | ".join(SHOWN) + " |")
    print("|---" * (2 + len(SHOWN)) + "|")
    result: dict[str, dict[str, object]] = {}
    for arm, places in found.items():
        for guidance in options.guidance:
            rows = [measure(run, network, guidance) for run, network in places]
            values = {name: [row[name] for row in rows] for name in SHOWN}
            cells = [cell(values[name]) for name in SHOWN]
            print(f"| {arm} | {guidance:g} | " + " | ".join(cells) + " |", flush=True)
            result[f"{arm} at {guidance:g}"] = {name: interval(v) for name, v in values.items()}
    sys.stdout.flush()
    print(json.dumps({"benchmark": "spin_diffusion_guidance", "seeds": options.seeds, **result}))


if __name__ == "__main__":
    main()
