"""STORM-PG and its relatives: estimator error, gradient norm and return, figures of docs/rl/.

tabular     a random decision process whose gradient is known exactly. Mean |g - grad J|^2 of
            STORM-PG for several alpha beside alpha / (2 - alpha) sigma^2 / B, where sigma^2 / B is
            what alpha = 1 measured in the same run; mean |grad J|^2 along the way at larger steps.
family      the same process: every method tuned for its last J, then measured.
cart-pole, mountain-car     return against trajectories, every method tuned for mean return.

A method has six candidates (three learning rates, two of its own setting), each tried on the same
tuning seeds with the same number of trajectories; the best is measured on other seeds. All seeds
count, with 95 % t-intervals. A run that diverges counts, from there on, with its first batch's
return. Curves against trajectories are OUT/PART-FIGURE.svg, with bands of such intervals, geometric
ones for squares. The last line printed is JSON. Finished runs are lines of OUT/runs.jsonl, not made
again.

    python scripts/benchmarks/storm_pg.py --out runs/storm-pg     # about twenty minutes, one core
    python scripts/benchmarks/storm_pg.py --out runs/quick --quick  # seconds, figures of no use
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from sparring.launch import comparison
from sparring.launch.artifacts import write_atomically
from sparring.launch.report import Series, line_chart
from sparring.rl import (
    GPOMDP,
    PAGEPG,
    SRVRPG,
    SVRPG,
    CategoricalPolicy,
    GaussianPolicy,
    PolicyGradient,
    StormPG,
    TabularMDP,
)

PARTS = ("tabular", "family", "cart-pole", "mountain-car")
ALPHAS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
SMALL_STEP, LARGE_STEP = 0.02, 0.3
POINTS = 20  # of a curve
LABELS = {
    "error": "|g - grad J|²",
    "gradient": "|grad J|²",
    "objective": "J",
    "return": "return",
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method, its own two settings, and what goes with all of them."""

    kind: type[PolicyGradient]
    own: tuple[Record, Record]
    fixed: Record


METHODS = {
    "gpomdp": Method(GPOMDP, ({"batch": 5}, {"batch": 10}), {}),
    "svrpg": Method(SVRPG, ({"period": 3}, {"period": 6}), {"batch": 5, "init_batch": 20}),
    "srvr-pg": Method(SRVRPG, ({"period": 3}, {"period": 6}), {"batch": 5, "init_batch": 20}),
    "page-pg": Method(
        PAGEPG, ({"probability": 0.6}, {"probability": 0.3}), {"batch": 5, "init_batch": 20}
    ),
    "storm-pg": Method(StormPG, ({"alpha": 0.9}, {"alpha": 0.5}), {"batch": 5, "init_batch": 20}),
}


@dataclass(frozen=True)
class Task:
    """A control task, with sigma of the policy, trajectories of a run, and learning rates."""

    env: str
    horizon: int
    gamma: float
    sigma: float
    budget: int
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03)


TASKS = {
    "cart-pole": Task("sparring/ContinuousCartPole-v0", 100, 0.99, 0.5, 300),
    "mountain-car": Task(
        "sparring/ContinuousMountainCar-v0", 200, 0.999, 0.5, 150, (0.01, 0.03, 0.1)
    ),
}


def interval(values: Sequence[float]) -> Record:
    """Mean over seeds with the half width of its 95 % interval."""
    middle, low, _ = comparison.interval(values)
    return {"mean": middle, "half_width": middle - low, "seeds": len(values)}


def draw(
    path: Path, curves: Mapping[str, Sequence[Sequence[float]]], figure: str, budget: int
) -> None:
    """Curves of each arm, (POINTS,) a seed, as means with bands of 95 % intervals; squares on a
    logarithmic axis, with geometric ones, which do not reach below 0."""
    log = figure in ("error", "gradient")

    def band(values: Sequence[float]) -> tuple[float, float, float]:
        return comparison.geometric_interval(values, 1e-12) if log else comparison.interval(values)

    series = []
    for name, seeds in curves.items():
        y, low, high = zip(*(band(at) for at in zip(*seeds, strict=True)), strict=True)
        ends = [budget * (n + 1) / POINTS for n in range(POINTS)]
        series.append(Series(name, ends, y, low, high))
    chart = line_chart(
        series, x_label="trajectories", y_label=LABELS[figure], caption="", bands=True,
        log=log,
    )  # fmt: skip
    write_atomically(path, str(chart.svg))


class Runs:
    """Finished runs by what they were asked for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "runs.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        self._done = {json.dumps(r["asked"], sort_keys=True): r for r in map(json.loads, lines)}

    def get(self, asked: Record) -> Record:
        key = json.dumps(asked, sort_keys=True)
        if key not in self._done:
            start = time.perf_counter()
            make = tabular_run if asked["part"] == "tabular" else control_run
            found = {"asked": asked, **make(asked), "seconds": time.perf_counter() - start}
            with self._path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            self._done[key] = found
        return self._done[key]


# ---------------------------------------------------------------- the tabular process

HORIZON, GAMMA = 8, 0.95


def process() -> TabularMDP:
    """Five states, the last one terminal, and three actions; the same for all seeds."""
    rng = np.random.default_rng(0)
    transitions = rng.dirichlet(np.full(5, 0.7), size=(5, 3))
    start = np.array([0.4, 0.3, 0.2, 0.1, 0.0])
    return TabularMDP(transitions, rng.normal(0, 1, (5, 3)), start, terminal=(4,), num_envs=5)


def tabular_run(asked: Record) -> Record:
    """Trajectory-weighted means over a run of |g - grad J|^2, in its last 3/4, and |grad J|^2, the
    last J, and the curves of all three: means over each of POINTS equal parts of the budget."""
    environment = process()
    policy = CategoricalPolicy(5, 3, hidden=(), bias=False, dtype=torch.float64)
    with torch.no_grad():
        next(policy.parameters()).zero_()
    kind = METHODS[asked["method"]].kind
    method = kind(policy, environment, horizon=HORIZON, gamma=GAMMA, optimizer="sgd",
                  **asked["settings"])  # fmt: skip
    method.seed = asked["seed"]
    rows = []
    while method.trajectories + method.next_batch <= asked["trajectories"]:
        value = environment.objective(policy, horizon=HORIZON, gamma=GAMMA)
        (true,) = torch.autograd.grad(value, list(policy.parameters()))
        before = method.trajectories
        method.step()
        error = float((method.direction[0] - true).square().sum())
        rows.append((method.trajectories, method.trajectories - before, error,
                     float(true.square().sum()), float(value.detach())))  # fmt: skip
    at, weight, *figures = (np.array(column) for column in zip(*rows, strict=True))
    late = at > asked["trajectories"] / 4
    with torch.no_grad():
        last = float(environment.objective(policy, horizon=HORIZON, gamma=GAMMA))
    settings = comparison.CompareConfig(budget=asked["trajectories"])
    named = dict(zip(("error", "gradient", "objective"), figures, strict=True))
    return {
        "error": float(np.average(named["error"][late], weights=weight[late])),
        "gradient": float(np.average(named["gradient"], weights=weight)),
        "objective": last,
        "curves": {
            name: comparison.sampled(at, values, asked["points"], settings, diverged=False).tolist()
            for name, values in named.items()
        },
    }


def tabular(runs: Runs, options: argparse.Namespace) -> Record:
    """The table of alpha."""
    table: Record = {}
    curves: dict[str, dict[str, Any]] = {"error": {}, "gradient": {}, "objective": {}}
    for alpha, lr in product(options.alphas, (SMALL_STEP, LARGE_STEP)):
        settings = {"alpha": alpha, "init_batch": 5, "batch": 5, "lr": lr, "baseline": "none"}
        found = [
            runs.get({"part": "tabular", "method": "storm-pg", "settings": settings, "seed": seed,
                      "trajectories": options.tabular, "points": POINTS})
            for seed in range(options.tabular_seeds)
        ]  # fmt: skip
        row = table.setdefault(f"{alpha:g}", {})
        for name in ("error",) if lr == SMALL_STEP else ("gradient", "objective"):
            row[name] = interval([r[name] for r in found])
            curves[name][f"α = {alpha:g}"] = [r["curves"][name] for r in found]
    for name, arms in curves.items():
        draw(options.out / f"tabular-{name}.svg", arms, name, options.tabular)
    plain = table["1"]["error"]["mean"]  # sigma^2 / B
    for name, row in table.items():
        alpha = float(name)
        row["predicted"] = alpha / (2 - alpha) * plain
        row["ratio"] = row["error"]["mean"] / row["predicted"]
        print(f"alpha {alpha:5g}: error {row['error']['mean']:.4f} ± "
              f"{row['error']['half_width']:.4f}, predicted {row['predicted']:.4f}; "
              f"|grad J|^2 at lr {LARGE_STEP}: {row['gradient']['mean']:.5f} ± "
              f"{row['gradient']['half_width']:.5f}")  # fmt: skip
    return table


# ---------------------------------------------------------------- methods on a task


def control_run(asked: Record) -> Record:
    """Return of every batch, with the trajectories up to it."""
    task = TASKS[asked["part"]]
    torch.manual_seed(asked["seed"])
    policy = GaussianPolicy(4 if asked["part"] == "cart-pole" else 2, 1, sigma=task.sigma)
    records: list[Record] = []
    method = METHODS[asked["method"]].kind(
        policy, task.env, horizon=task.horizon, gamma=task.gamma, num_envs=20,
        on_record=records.append, **asked["settings"],
    )  # fmt: skip
    diverged = False
    try:
        method.train(max_trajectories=asked["trajectories"], seed=asked["seed"])
    except (FloatingPointError, ValueError) as error:
        print(f"  diverged after {method.trajectories} trajectories: {error}"[:150])
        diverged = True
    return {
        "curve": [(r["trajectories"], r["return_mean"]) for r in records],
        "max_weight": max(r["max_weight"] for r in records),
        "diverged": diverged,
    }


def spread(run: Record, budget: int) -> np.ndarray:
    """(budget,) the return that each trajectory's batch had."""
    found = np.full(budget, run["curve"][0][1])
    start = 0
    for end, value in run["curve"]:
        found[start:end] = value
        start = end
    if not run["diverged"]:
        found[start:] = run["curve"][-1][1]
    return found


def candidates(method: Method, lrs: Sequence[float], quick: bool) -> list[Record]:
    every = [{**method.fixed, **own, "lr": lr} for own, lr in product(method.own, lrs)]
    return every[1:2] if quick else every


def family(runs: Runs, options: argparse.Namespace) -> Record:
    """Every method on the tabular process, tuned for the last J."""
    table: Record = {}
    curves: dict[str, dict[str, Any]] = {"error": {}, "gradient": {}, "objective": {}}
    for name, method in METHODS.items():

        def measure(settings: Record, seed: int, name: str = name) -> Record:
            return runs.get({"part": "tabular", "method": name, "settings": settings,
                             "seed": seed, "trajectories": options.family,
                             "points": POINTS})  # fmt: skip

        # Not for |grad J|^2, which is small on the plateaus where large steps end, too.
        best = max(
            candidates(method, (0.3, 1.0, 3.0), options.quick),
            key=lambda s: mean(measure(s, seed)["objective"] for seed in options.tuning),
        )
        found = [measure(best, seed) for seed in options.seeds]
        table[name] = {
            "settings": best,
            **{
                key: interval([r[key] for r in found]) for key in ("gradient", "error", "objective")
            },
        }
        for key, arms in curves.items():
            arms[name] = [r["curves"][key] for r in found]
        row = table[name]
        print(f"{name:9} {best}: |grad J|^2 {row['gradient']['mean']:.5f} ± "
              f"{row['gradient']['half_width']:.5f}, error {row['error']['mean']:.4f} ± "
              f"{row['error']['half_width']:.4f}, J {row['objective']['mean']:.4f} ± "
              f"{row['objective']['half_width']:.4f}")  # fmt: skip
    for key, arms in curves.items():
        draw(options.out / f"family-{key}.svg", arms, key, options.family)
    return table


def control(part: str, runs: Runs, options: argparse.Namespace) -> Record:
    """Every method on a control task, tuned for mean return over the budget."""
    budget, table = 45 if options.quick else TASKS[part].budget, {}
    drawn = {}
    for name, method in METHODS.items():

        def measure(settings: Record, seed: int, name: str = name) -> Record:
            return runs.get({"part": part, "method": name, "settings": settings, "seed": seed,
                             "trajectories": budget})  # fmt: skip

        best = max(
            candidates(method, TASKS[part].lrs, options.quick),
            key=lambda s: mean(spread(measure(s, n), budget).mean() for n in options.tuning),
        )
        found = [measure(best, seed) for seed in options.seeds]
        curves = np.array([spread(run, budget) for run in found])
        binned = [c.mean(1) for c in np.array_split(curves, POINTS, axis=1)]
        drawn[name] = np.stack(binned, 1).tolist()
        fifths = [interval(c.mean(1).tolist()) for c in np.array_split(curves, 5, axis=1)]
        table[name] = {
            "settings": best,
            "mean_return": interval(curves.mean(1).tolist()),
            "fifths": fifths,
            "max_weight": max(run["max_weight"] for run in found),
            "diverged": sum(run["diverged"] for run in found),
        }
        shown = "  ".join(f"{f['mean']:.1f} ± {f['half_width']:.1f}" for f in fifths)
        print(f"{part} {name:9} {best}: {shown}; max weight {table[name]['max_weight']:.3g}, "
              f"{table[name]['diverged']} diverged")  # fmt: skip
    draw(options.out / f"{part}-return.svg", drawn, "return", budget)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quick = options.quick
    options.alphas = (1.0, 0.2) if quick else ALPHAS
    options.tabular, options.tabular_seeds = (200, 2) if quick else (3000, 3)
    options.family = 60 if quick else 1000
    options.tuning = range(1) if quick else range(2)
    options.seeds = range(1, 3) if quick else range(2, 8)
    options.out.mkdir(parents=True, exist_ok=True)
    runs, results = Runs(options.out), {}
    for part in options.parts:
        if part in TASKS:
            results[part] = control(part, runs, options)
        else:
            results[part] = {"tabular": tabular, "family": family}[part](runs, options)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
