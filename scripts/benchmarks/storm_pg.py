"""STORM-PG and its relatives: estimator error, gradient norm and return, figures of docs/rl/.

tabular     a random decision process whose gradient is known exactly. Mean |g - grad J|^2 of
            STORM-PG for several alpha beside alpha / (2 - alpha) sigma^2 / B, where sigma^2 / B is
            what alpha = 1 measured in the same run; mean |grad J|^2 along the way at larger steps.
family      the same process: every method tuned for its last J, then measured.
cart-pole, mountain-car     return against trajectories, every method tuned for mean return.

A method has six candidates (three learning rates, two of its own setting), each tried on the same
tuning seeds with the same number of trajectories; the best is measured on other seeds. All seeds
count, with 95 % t-intervals. A run that diverges counts, from there on, with its first batch's
return. The last line printed is JSON. Finished runs are lines of OUT/runs.jsonl, not made again.

    python scripts/benchmarks/storm_pg.py --out runs/storm-pg     # about twenty minutes, one core
    python scripts/benchmarks/storm_pg.py --out runs/quick --quick  # seconds, figures of no use
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

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
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
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
    wide = 0.0
    if len(values) > 1:
        wide = T_975[min(len(values) - 1, len(T_975)) - 1] * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "half_width": wide, "seeds": len(values)}


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
    """Trajectory-weighted means over a run of |g - grad J|^2, in its last 3/4, and |grad J|^2."""
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
        (true,) = environment.gradient(policy, horizon=HORIZON, gamma=GAMMA)
        before = method.trajectories
        method.step()
        error = float((method.direction[0] - true).square().sum())
        rows.append((method.trajectories, method.trajectories - before, error,
                     float(true.square().sum())))  # fmt: skip
    at, weight, error, gradient = (np.array(column) for column in zip(*rows, strict=True))
    late = at > asked["trajectories"] / 4
    with torch.no_grad():
        value = float(environment.objective(policy, horizon=HORIZON, gamma=GAMMA))
    return {
        "error": float(np.average(error[late], weights=weight[late])),
        "gradient": float(np.average(gradient, weights=weight)),
        "objective": value,
    }


def tabular(runs: Runs, options: argparse.Namespace) -> Record:
    """The table of alpha."""
    table: Record = {}
    for alpha, lr in product(options.alphas, (SMALL_STEP, LARGE_STEP)):
        settings = {"alpha": alpha, "init_batch": 5, "batch": 5, "lr": lr, "baseline": "none"}
        found = [
            runs.get({"part": "tabular", "method": "storm-pg", "settings": settings, "seed": seed,
                      "trajectories": options.tabular})
            for seed in range(options.tabular_seeds)
        ]  # fmt: skip
        row = table.setdefault(f"{alpha:g}", {})
        if lr == SMALL_STEP:
            row["error"] = interval([r["error"] for r in found])
        else:
            row["gradient"] = interval([r["gradient"] for r in found])
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
    for name, method in METHODS.items():

        def measure(settings: Record, seed: int, name: str = name) -> Record:
            return runs.get({"part": "tabular", "method": name, "settings": settings,
                             "seed": seed, "trajectories": options.family})  # fmt: skip

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
        row = table[name]
        print(f"{name:9} {best}: |grad J|^2 {row['gradient']['mean']:.5f} ± "
              f"{row['gradient']['half_width']:.5f}, error {row['error']['mean']:.4f} ± "
              f"{row['error']['half_width']:.4f}, J {row['objective']['mean']:.4f} ± "
              f"{row['objective']['half_width']:.4f}")  # fmt: skip
    return table


def control(part: str, runs: Runs, options: argparse.Namespace) -> Record:
    """Every method on a control task, tuned for mean return over the budget."""
    budget, table = 45 if options.quick else TASKS[part].budget, {}
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
    runs, results = Runs(options.out), {}
    for part in options.parts:
        if part in TASKS:
            results[part] = control(part, runs, options)
        else:
            results[part] = {"tabular": tabular, "family": family}[part](runs, options)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
