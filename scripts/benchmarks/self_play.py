"""Measure self-play recipes over seeds: the figures of docs/alignment.

Each recipe is run once a seed, one after the other, in its own folder; an interrupted call goes on
when it is made again. Then a Markdown table a figure is printed: a line a recipe and seed with the
bootstrap interval over base questions, and a line a recipe with mean and range over seeds.

    python scripts/benchmarks/self_play.py sppo-smollm2 dpo-smollm2 --seeds 0 1
    python scripts/benchmarks/self_play.py sppo-smollm2 dpo-smollm2 --seeds 0 1 --table-only
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from sparring.alignment.results import LABELS, evaluations
from sparring.launch.cli import find_recipe
from sparring.launch.runs import load_recipe


def folder(out: Path, recipe: str, seed: int) -> Path:
    return out / f"{recipe.replace('/', '-')}-seed{seed}"


def run(out: Path, recipe: str, seed: int) -> None:
    """Run or resume one recipe with one seed.

    Raises:
        subprocess.CalledProcessError: the run failed; its message is on standard error.
    """
    command = [sys.executable, "-m", "sparring.launch.cli", "run", recipe, "--seed", str(seed)]
    subprocess.run([*command, "--out", str(folder(out, recipe, seed))], check=True)


def figures(out: Path, recipe: str, seed: int) -> dict[int, dict[str, Any]]:
    """Held-out figures of a run by number of iterations."""
    return dict(evaluations(load_recipe(find_recipe(recipe))[1], folder(out, recipe, seed)))


def _interval(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def _over_seeds(values: list[float]) -> str:
    if not values:
        return "-"
    return f"**{mean(values):.3f}** ({min(values):.3f} to {max(values):.3f})"


def table(name: str, found: dict[tuple[str, int], dict[int, dict[str, Any]]]) -> list[str]:
    """One figure as a Markdown table, or nothing when no run has it."""
    found = {key: rows for key, rows in found.items() if any(name in f for f in rows.values())}
    if not found:
        return []
    iterations = sorted({t for rows in found.values() for t in rows})
    lines = [f"### {LABELS.get(name, name)}", ""]
    lines.append("| recipe | seed | " + " | ".join(str(t) if t else "start" for t in iterations))
    lines[-1] += " |"
    lines.append("|---" * (2 + len(iterations)) + "|")
    for recipe in dict.fromkeys(recipe for recipe, _ in found):
        mine = {seed: rows for (other, seed), rows in found.items() if other == recipe}
        for seed, rows in mine.items():
            cells = [_interval(rows.get(t, {}).get(name)) for t in iterations]
            lines.append(f"| {recipe} | {seed} | " + " | ".join(cells) + " |")
        if len(mine) > 1:
            columns = [
                [rows[t][name][0] for rows in mine.values() if name in rows.get(t, {})]
                for t in iterations
            ]
            cells = [_over_seeds(column) for column in columns]
            lines.append(f"| {recipe} | mean (range) | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/self-play"))
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    jobs = [(recipe, seed) for seed in options.seeds for recipe in options.recipes]
    if not options.table_only:
        for recipe, seed in jobs:
            run(options.out, recipe, seed)
    found = {(recipe, seed): figures(options.out, recipe, seed) for recipe, seed in jobs}
    print("\n".join(line for name in LABELS for line in table(name, found)))


if __name__ == "__main__":
    main()
