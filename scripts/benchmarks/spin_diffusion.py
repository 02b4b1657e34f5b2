"""SPIN-Diffusion against its baselines at equal gradient steps: figures of docs/diffusion/spin.md.

Every arm is the recipe spin-diffusion-digits with other settings, run once a seed in a folder of
its own; a call goes on where the last one stopped. All arms of a seed start from the same weights.

    spin         three iterations
    one          the first iteration kept going: one generation, three times the steps
    frozen       three iterations, the opponent's network stays the start (as in DPO)
    sft          the real images alone, as many steps

    python scripts/benchmarks/spin_diffusion.py --out runs/spin-diffusion       # hours
    python scripts/benchmarks/spin_diffusion.py --out runs/spin-diffusion --table-only
    python scripts/benchmarks/spin_diffusion.py --quick                         # the machinery

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sparring.diffusion.spin.results import evaluations
from sparring.launch.cli import find_recipe
from sparring.launch.metrics import read_metrics
from sparring.launch.runs import load_recipe

RECIPE = "spin-diffusion-digits"
ARMS: dict[str, list[str]] = {
    "spin": [],
    "one": ["--iterations", "1", "--train.steps", "600"],
    "frozen": ["--algorithm", "frozen-reference"],
    "sft": ["--algorithm", "sft-diffusion"],
}
QUICK = ["--images.train", "64", "--images.heldout", "16", "--pretrain.steps", "3",
         "--train.steps", "2", "--generate.steps", "2", "--model.widths", "8", "16"]  # fmt: skip
SHOWN = ("accuracy", "classifier", "classifier_win_rate_base", "frechet", "coverage")


def run(out: Path, arm: str, seed: int, options: list[str]) -> Path:
    """Run or resume one arm with one seed; returns its folder.

    Raises:
        subprocess.CalledProcessError: the run failed; its message is on standard error.
    """
    folder = out / f"{arm}-seed{seed}"
    command = [sys.executable, "-m", "sparring.launch.cli", "run", RECIPE, *ARMS[arm], *options]
    subprocess.run([*command, "--seed", str(seed), "--out", str(folder)], check=True)
    return folder


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Mean figures of a run by number of iterations."""
    recipe: Any = load_recipe(find_recipe(RECIPE))[1]
    found = {}
    for t, values in evaluations(recipe, folder):
        shown = {name: values[name] for name in SHOWN if name in values}
        found[t] = {n: float(v[0] if isinstance(v, list) else v) for n, v in shown.items()}
    return found


def start_gap(folder: Path) -> float:
    """The first loss of the first iteration less log 2."""
    rows = read_metrics(folder / "iter0" / "train-images" / "metrics.jsonl")
    return float(rows[0]["loss"]) - math.log(2)


def table(found: Mapping[tuple[str, int], dict[int, dict[str, float]]]) -> list[str]:
    """Markdown: a line an arm and iterate, mean and standard deviation over seeds."""
    lines = ["| arm | after | " + " | ".join(n.replace("_", " ") for n in SHOWN) + " |"]
    lines.append("|---" * (2 + len(SHOWN)) + "|")
    for arm in dict.fromkeys(arm for arm, _ in found):
        mine = [rows for (name, _), rows in found.items() if name == arm]
        for t in sorted({t for rows in mine for t in rows}):
            cells = []
            for name in SHOWN:
                values = [rows[t][name] for rows in mine if name in rows.get(t, {})]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{spread}" if values else "-")
            lines.append(f"| {arm} | {t or 'start'} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/spin-diffusion"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="one arm, a tiny network, two steps")
    options = parser.parse_args()
    extra: list[str] = []
    if options.quick:
        options.arms, options.seeds, extra = ["one"], [0], QUICK
        options.out = Path(tempfile.mkdtemp(prefix="spin-diffusion-"))
    jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
    if not options.table_only:
        for arm, seed in jobs:
            # The last of two equal options counts, so that --quick wins over an arm's steps.
            run(options.out, arm, seed, extra)
    found = {(arm, seed): figures(options.out / f"{arm}-seed{seed}") for arm, seed in jobs}
    print("\n".join(table(found)))
    spin = [arm for arm in options.arms if arm != "sft"]
    gaps = [start_gap(options.out / f"{arm}-seed{s}") for arm in spin for s in options.seeds]
    summary = {
        "benchmark": "spin_diffusion",
        "seeds": options.seeds,
        "loss_at_start_minus_log2": max(gaps, key=abs) if gaps else None,
        "last": {
            f"{arm}-seed{seed}": rows[max(rows)] for (arm, seed), rows in found.items() if rows
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
