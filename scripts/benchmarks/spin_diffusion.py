"""SPIN-Diffusion against its baselines at equal gradient steps: figures of docs/diffusion/spin.md.

Every arm is the recipe spin-diffusion-digits with another algorithm, run once a seed in a folder of
its own and measured after each third of its 600 steps:

    spin         three iterations
    one          one iteration kept going: the first one's losers and opponent for all steps
    frozen       new losers each iteration, the opponent's network stays the start (as in DPO)
    sft          the real images alone

The recipe's start saw a fifth of its captions wrong, which fine-tuning on right ones mends by
itself. `--start plateau` gives all arms one that fine-tuning hardly betters: five times the steps,
all captions right. Keep its runs apart by another --out.

Arms of a seed share start, held-out captions and noise, so their images can be compared in pairs;
what they have in common is made once. Written to --out: table.md, grid.png (one caption and noise a
column), and a curve of each figure as SVG. Intervals are 95 % t-intervals over seeds.

    python scripts/benchmarks/spin_diffusion.py --seeds 0                 # in pieces, in any order
    python scripts/benchmarks/spin_diffusion.py --seeds 1 2
    python scripts/benchmarks/spin_diffusion.py --table-only              # all three, runs nothing
    python scripts/benchmarks/spin_diffusion.py --start plateau --out runs/spin-diffusion-plateau
    python scripts/benchmarks/spin_diffusion.py --quick                   # the machinery

It runs on one thread. A seed costs at most an hour of a CPU core: 600 steps of pretraining, 2000
steps of the arms, and 10 800 images of 50 network calls (6400 of them losers). A call that was
stopped goes on when it is made again. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sparring.diffusion.spin.results import evaluations, grid_png, samples_of
from sparring.launch.cli import find_recipe
from sparring.launch.cli import main as sparring
from sparring.launch.comparison import interval
from sparring.launch.metrics import read_metrics
from sparring.launch.report import Series, line_chart
from sparring.launch.rows import read_rows
from sparring.launch.runs import RUN_FILE, load_recipe

RECIPE = "spin-diffusion-digits"
ARMS = {
    "spin": "spin-diffusion",
    "one": "one-iteration",
    "frozen": "frozen-reference",
    "sft": "sft-diffusion",
}
STARTS = {"wrong-captions": [],
          "plateau": ["--pretrain.wrong_captions", "0", "--pretrain.steps", "3000"]}  # fmt: skip
SHARED = ("images", "image-model", "start", "heldout0", "iter0", "heldout1")
"""Of the arms' folders; sft's first iteration is its own."""
QUICK = ["--images.train", "64", "--images.heldout", "16", "--pretrain.steps", "3",
         "--train.steps", "2", "--generate.steps", "2", "--model.widths", "8", "16",
         "--iterations", "1"]  # fmt: skip
SHOWN = ("accuracy", "classifier", "classifier_win_rate_base", "frechet", "kernel_distance",
         "coverage")  # fmt: skip
COMPARED = ("accuracy", "classifier", "frechet", "kernel_distance", "coverage")
REAL = ("accuracy", "frechet", "kernel_distance", "coverage")
"""Measured of real images too."""
Key = tuple[str, int]
"""Arm and seed."""


def run(out: Path, arm: str, seed: int, options: list[str]) -> Path:
    """Run or resume one arm with one seed; returns its folder.

    Raises:
        SystemExit: the run failed or was stopped; its message is on standard error.
    """
    folder, first = out / f"{arm}-seed{seed}", out / f"spin-seed{seed}"
    if arm != "spin" and (first / RUN_FILE).is_file():
        _take_over(first, folder, SHARED if arm != "sft" else SHARED[:4])
    arguments = ["run", RECIPE, "--algorithm", ARMS[arm], "--seed", str(seed), *options]
    # What was taken over was made for another algorithm; each step's key says whether it fits.
    code = sparring([*arguments, "--changed", "--out", str(folder)])
    if code:
        raise SystemExit(code)
    return folder


def _take_over(first: Path, folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(first / RUN_FILE, folder / RUN_FILE)
    for name in names:
        if (first / name).is_dir() and not (folder / name).exists():
            part = folder / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(first / name, part)
            part.rename(folder / name)


def figures(folder: Path) -> dict[int, dict[str, float]]:
    """Mean figures of a run by number of iterations."""
    recipe: Any = load_recipe(find_recipe(RECIPE))[1]
    found = {}
    for t, values in evaluations(recipe, folder):
        names = (*SHOWN, *(f"{name}_real" for name in REAL))
        shown = {name: values[name] for name in names if name in values}
        found[t] = {n: float(v[0] if isinstance(v, list) else v) for n, v in shown.items()}
    return found


def start_gap(folder: Path) -> float:
    """The first loss of the first iteration less log 2."""
    rows = read_metrics(folder / "iter0" / "train-images" / "metrics.jsonl")
    return float(rows[0]["loss"]) - math.log(2)


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of pairs that the first wins; a tie is half a win."""
    a, b = np.asarray(ours), np.asarray(theirs)
    return float(((a > b) + 0.5 * (a == b)).mean())


def scored(out: Path, arms: Sequence[str], seed: int, iterates: Sequence[int]) -> dict[Key, Any]:
    """The classifier's scores of an arm's held-out images after t iterations."""
    from sparring.diffusion.spin.pictures import Opened, from_png
    from sparring.diffusion.spin.rows import Picture, Sample
    from sparring.diffusion.spin.scorers import build_scorer

    def opened(row: Picture | Sample) -> Any:
        return from_png(row.png, row.image_id)

    real = read_rows(out / f"{arms[0]}-seed{seed}" / "images" / "train.parquet", Picture)
    scorer = build_scorer("classifier", Opened(real, lambda row: (opened(row), row.caption)))
    found = {}
    for arm in arms:
        for t in iterates:
            rows = samples_of(out / f"{arm}-seed{seed}", t)
            found[arm, t] = scorer.score(Opened(rows, opened), [row.caption for row in rows])
    return found


def pairs(
    out: Path, arms: Sequence[str], seeds: Sequence[int], last: int
) -> dict[tuple[str, str, int], list[float]]:
    """Win rates of spin against each other arm after t iterations, a value a seed.

    After the first iteration one and frozen have spin's own images, and are left out.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    if "spin" not in arms:
        return found
    for seed in seeds:
        scores = scored(out, arms, seed, range(1, last + 1))
        for arm in arms:
            for t in range(1 if arm == "sft" else 2, last + 1):
                if arm != "spin":
                    rate = win_rate(scores["spin", t], scores[arm, t])
                    found.setdefault(("spin", arm, t), []).append(rate)
    return found


def cell(values: Sequence[float], form: str = ".3f") -> str:
    """Mean with the 95 % t-interval over seeds; - where there are none."""
    if not values:
        return "-"
    mean, *ends = (f"{value:{form}}" for value in interval(values))
    return f"{mean} [{', '.join(ends)}]" if len(values) > 1 else mean


def over_seeds(
    found: Mapping[Key, Mapping[int, Mapping[str, float]]], arm: str, t: int, name: str
) -> list[float]:
    return [
        rows[t][name]
        for (other, _), rows in found.items()
        if other == arm and name in rows.get(t, {})
    ]


def differences(
    found: Mapping[Key, Mapping[int, Mapping[str, float]]], name: str
) -> dict[tuple[str, int], list[float]]:
    """Spin's figure minus another arm's after as many iterations, or the base's; a value a seed.

    Seeds have starts of their own, so these vary much less than the figures.
    """
    made: dict[tuple[str, int], list[float]] = {}
    for (arm, seed), rows in found.items():
        spin = found.get(("spin", seed), {})
        others = {("base", t): rows[0] for t in spin if t} if arm == "spin" else {}
        if arm != "spin":
            others = {(arm, t): rows[t] for t in rows if t > (arm != "sft")}
        for (other, t), figures in others.items():
            if name in spin.get(t, {}) and name in figures:
                made.setdefault((other, t), []).append(spin[t][name] - figures[name])
    return made


def table(
    found: Mapping[Key, Mapping[int, Mapping[str, float]]],
    won: Mapping[tuple[str, str, int], Sequence[float]],
) -> list[str]:
    """Markdown: a line an arm and iterate, then spin's differences and win rates."""
    lines = ["| arm | after | " + " | ".join(n.replace("_", " ") for n in SHOWN) + " |"]
    lines.append("|---" * (2 + len(SHOWN)) + "|")
    started = False
    arms = list(dict.fromkeys(arm for arm, _ in found))
    floor = [over_seeds(found, arms[0], 0, f"{name}_real") for name in SHOWN]
    if any(floor):
        lines.append("| real | - | " + " | ".join(map(cell, floor)) + " |")
    for arm in arms:
        for t in sorted({t for (name, _), rows in found.items() if name == arm for t in rows}):
            if t == 0 and started:
                continue  # all arms have one start
            started = True
            columns = [over_seeds(found, arm, t, name) for name in SHOWN]
            cells = [cell(values) for values in columns]
            lines.append(f"| {arm if t else 'base'} | {t or 'start'} | " + " | ".join(cells) + " |")
    apart = {name: differences(found, name) for name in COMPARED}
    if apart[COMPARED[0]]:
        lines += [
            "",
            "| spin minus | after | " + " | ".join(n.replace("_", " ") for n in COMPARED) + " |",
        ]
        lines.append("|---" * (2 + len(COMPARED)) + "|")
        for arm, t in apart[COMPARED[0]]:
            cells = [cell(apart[name].get((arm, t), []), "+.3f") for name in COMPARED]
            lines.append(f"| {arm} | {t} | " + " | ".join(cells) + " |")
    if won:
        lines += ["", "| win rate | after | classifier, same caption and noise |", "|---|---|---|"]
        lines += [f"| {a} against {b} | {t} | {cell(v)} |" for (a, b, t), v in won.items()]
    return lines


def write_curves(
    out: Path, found: Mapping[Key, Mapping[int, Mapping[str, float]]], steps: int
) -> None:
    """An SVG for each figure, against gradient steps."""
    for name in SHOWN:
        series = []
        for arm in dict.fromkeys(arm for arm, _ in found):
            times = sorted({t for (other, _), rows in found.items() if other == arm for t in rows})
            points = [(t * steps, over_seeds(found, arm, t, name)) for t in times]
            known = [(x, *interval(values)) for x, values in points if values]
            if known:
                series.append(Series(arm, *zip(*known, strict=True)))
        label = name.replace("_", " ")
        chart = line_chart(
            series, x_label="gradient steps", y_label=label, caption=label, bands=True
        )
        (out / f"{name}.svg").write_text(str(chart.svg), encoding="utf-8")


def write_grid(out: Path, arms: Sequence[str], seed: int, last: int) -> list[str]:
    """grid.png of one seed: real, start, every iterate of spin, the last of the others.

    Returns:
        The names of its rows.
    """
    first = out / f"{arms[0]}-seed{seed}"
    shown = [(first, t) for t in range(last + 1)]
    shown += [(out / f"{arm}-seed{seed}", last) for arm in arms[1:]]
    (out / "grid.png").write_bytes(grid_png(first, shown)[0])
    names = [f"{arms[0]} {t}" if t else "start" for t in range(last + 1)]
    return ["real", *names, *(f"{arm} {last}" for arm in arms[1:])]


@contextmanager
def folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where runs go; --quick leaves nothing behind."""
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="spin-diffusion-") as path:
            yield Path(path)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        yield options.out


def measure(out: Path, arms: Sequence[str], seeds: Sequence[int], steps: int) -> dict[str, Any]:
    """Write table, curves and grid of what has run; returns what is printed as JSON."""
    found = {(arm, seed): figures(out / f"{arm}-seed{seed}") for arm in arms for seed in seeds}
    unfinished = [f"{arm}-seed{seed}" for (arm, seed), rows in found.items() if not rows]
    if unfinished:
        raise SystemExit(f"nothing was measured in {', '.join(unfinished)}; run them first")
    last = min(max(rows) for rows in found.values())
    won = pairs(out, arms, seeds, last)
    lines = table(found, won)
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_curves(out, found, steps)
    rows = write_grid(out, arms, seeds[0], last)
    print("\n".join(lines))
    gaps = [start_gap(out / f"{arm}-seed{s}") for arm in arms if arm != "sft" for s in seeds]
    return {
        "benchmark": "spin_diffusion",
        "seeds": list(seeds),
        "loss_at_start_minus_log2": max(gaps, key=abs) if gaps else None,
        "grid_rows": rows,
        "last": {
            arm: {name: interval(over_seeds(found, arm, last, name)) for name in SHOWN}
            for arm in arms
        },
        "win_rates": {f"{a} against {b} after {t}": interval(v) for (a, b, t), v in won.items()},
    }


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, by the first run
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/spin-diffusion"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--start", choices=list(STARTS), default="wrong-captions")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="two arms, a tiny network, two steps")
    options = parser.parse_args()
    extra: list[str] = STARTS[options.start]
    if options.quick:
        options.arms, options.seeds, extra = ["spin", "sft"], [0], [*extra, *QUICK]
    # The first arm is what the others share folders with.
    arms = [arm for arm in ARMS if arm in options.arms]
    with folder(options) as out:
        if not options.table_only:
            for seed in options.seeds:
                for arm in arms:
                    run(out, arm, seed, extra)
        recipe: Any = load_recipe(find_recipe(RECIPE))[1]
        summary = measure(out, arms, options.seeds, 2 if options.quick else recipe.train.steps)
    sys.stdout.flush()
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
