"""Gap to the optimum against IFO calls: SARAH-C, VRSC-PG, STORM-C, SCGD, ASC-PG, gradient descent.

Every method gets the same budget of IFO calls (of g, ∂g and ∇f together) and the same grid of
lengths of step on every problem; the length is chosen by the mean final gap over tuning seeds, and
other seeds are reported. SARAH-C and VRSC-PG also choose q, the steps from anchor to anchor, out of
the theory's (2m+n) / (3 batch) and 10. All have the same batches. Ends with one JSON line. With
--out the curves of the gap against passes are OUT/PROBLEM-PASSES.svg: geometric means over seeds,
with bands of their 95 % t-intervals.

    python scripts/benchmarks/sarah.py --out runs/sarah     # 12 to 60 passes, 8 seeds
    python scripts/benchmarks/sarah.py --quick
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring.launch.artifacts import write_atomically
from sparring.launch.comparison import CompareConfig, geometric_interval, sampled
from sparring.launch.report import Series, line_chart
from sparring.science import compositional_examples as examples
from sparring.science.compositional import CompositionalProblem, minimize_compositional
from sparring.science.returns import daily_returns, monthly_returns, synthetic_returns

METHODS = ("sarah-c", "vrsc-pg", "storm-c", "scgd", "asc-pg", "gd")
# Below this a gap is rounding.
FLOOR = 1e-13
POINTS = 20  # of a curve


@dataclass(frozen=True)
class Setting:
    """A problem with its start and the longest step of its grid."""

    make: Callable[[], CompositionalProblem]
    start: Callable[[], np.ndarray]
    longest: float
    batch: int = 5


def around(size: int, scale: float) -> Callable[[], np.ndarray]:
    return lambda: scale * np.random.default_rng(0).standard_normal(size)


def settings(quick: bool) -> dict[str, Setting]:
    """Real and synthetic portfolios, two Bellman problems, tanh regression, SNE on digits."""
    states, features = (60, 10) if quick else (400, 100)
    points = 40 if quick else 200
    chosen = {
        "portfolio, 30 Ken French portfolios": Setting(
            lambda: examples.portfolio(monthly_returns()), lambda: np.ones(30), 2e-3
        ),
        "portfolio, 20 stocks daily": Setting(
            lambda: examples.portfolio(daily_returns()), lambda: np.ones(20), 0.03
        ),
        "portfolio, synthetic": Setting(
            lambda: examples.portfolio(synthetic_returns()),
            lambda: np.ones(200),
            0.05,
        ),
        "Bellman, random": Setting(
            lambda: examples.random_bellman(states, features), lambda: np.zeros(features), 1.0
        ),
        "Bellman, FrozenLake": Setting(examples.gymnasium_bellman, lambda: np.zeros(16), 10.0, 2),
        "tanh regression": Setting(
            lambda: examples.tanh_regression(60 if quick else 400), around(20, 0.5), 3.0
        ),
        "SNE, digits": Setting(
            lambda: examples.digits_sne(points, perplexity=points / 10),
            around(2 * points, 0.1),
            30.0,
        ),
    }
    if quick:
        del chosen["portfolio, synthetic"], chosen["Bellman, FrozenLake"]
    if quick or find_spec("skfolio") is None:
        print("left out: portfolio, 20 stocks daily (not quick, and needs skfolio's data)")
        del chosen["portfolio, 20 stocks daily"]
    return chosen


def reference(problem: CompositionalProblem, start: np.ndarray, lr: float) -> float:
    """Φ*, or for SNE the lowest value of a long descent, which is local."""
    if problem.optimum is not None:
        return problem.optimum
    return float(minimize_compositional(problem, start, "gd", lr=lr, max_iter=1500, records=1).fun)


def final(
    problem: CompositionalProblem,
    setting: Setting,
    method: str,
    choice: tuple[float, int | None],
    budget: int,
    seed: int,
) -> tuple[float, dict[str, Any]]:
    """Φ at the end for (lr, q), and the history; infinite where it diverged."""
    lr, q = choice
    result = minimize_compositional(
        problem, setting.start(), method, lr=lr, q=q, batch=setting.batch, max_ifo=budget,
        seed=seed, records=POINTS,
    )  # fmt: skip
    return (float(result.fun) if result.success else float("inf")), result.history


def spread(values: list[float]) -> list[float]:
    """Geometric mean with the range over seeds."""
    logs = [float(np.log(max(v, FLOOR))) for v in values]
    return [float(f"{np.exp(x):.3g}") for x in (statistics.mean(logs), min(logs), max(logs))]


def curve(
    histories: list[dict[str, Any]], bottom: float, passes: int, pass_cost: int
) -> dict[str, list[float]]:
    """The gap at POINTS points of the budget: geometric mean over seeds, 95 % t-interval."""
    settings = CompareConfig(budget=passes, measure="last", floor=FLOOR)
    gaps = [
        sampled(h["ifo"] / pass_cost, h["fun"] - bottom, POINTS, settings,
                diverged=not np.isfinite(h["fun"][-1]))
        for h in histories
    ]  # fmt: skip
    bands = [geometric_interval(at, FLOOR) for at in zip(*gaps, strict=True)]
    columns = ([float(f"{value:.3g}") for value in column] for column in zip(*bands, strict=True))
    ends = [passes * (n + 1) / POINTS for n in range(POINTS)]
    return {"passes": ends, **dict(zip(("mean", "low", "high"), columns, strict=True))}


def draw(folder: Path, name: str, found: Mapping[str, Any]) -> None:
    """The curves of a problem's methods."""
    folder.mkdir(parents=True, exist_ok=True)
    series = []
    for method, row in found["methods"].items():
        c = row["curve"]
        series.append(Series(method, c["passes"], c["mean"], c["low"], c["high"]))
    chart = line_chart(
        series, x_label="passes of IFO calls", y_label="gap", caption="", bands=True, log=True
    )
    stem = re.sub("[^a-z0-9]+", "-", name.lower())
    write_atomically(folder / f"{stem}.svg", str(chart.svg))


def compare(
    name: str, setting: Setting, passes: int, seeds: int, tuning: int, lengths: int
) -> dict[str, Any]:
    problem = setting.make()
    pass_cost = 2 * (problem.inner_count or 0) + (problem.outer_count or 0)
    budget = passes * pass_cost
    grid = [setting.longest * 10 ** (-k / 2) for k in range(lengths)]
    found: dict[str, dict[str, Any]] = {}
    values: dict[str, list[float]] = {}
    histories: dict[str, list[dict[str, Any]]] = {}
    for method in METHODS:
        again = 1 if method == "gd" else tuning
        lengths_of_epoch = (None, 10) if method in ("sarah-c", "vrsc-pg") else (None,)
        tried = {
            (lr, q): statistics.mean(
                final(problem, setting, method, (lr, q), budget, 1000 + s)[0] for s in range(again)
            )
            for lr in grid
            for q in lengths_of_epoch
        }
        best = min(tried, key=lambda choice: tried[choice])
        runs = [
            final(problem, setting, method, best, budget, s)
            for s in range(1 if method == "gd" else seeds)
        ]
        values[method] = [value for value, _ in runs]
        found[method] = {
            "lr": float(f"{best[0]:.3g}"),
            "q": best[1] or "theory",
            "at_edge": best[0] in (grid[0], grid[-1]),
        }
        histories[method] = [history for _, history in runs]
    known = problem.optimum is not None
    bottom = min(min(map(min, values.values())), reference(problem, setting.start(), grid[0] / 3))
    for method in METHODS:
        gaps = [value - bottom for value in values[method]]
        found[method]["gap"] = spread(gaps)
        found[method]["curve"] = curve(histories[method], bottom, passes, pass_cost)
        low, high = found[method]["gap"][1:]
        edge = "  (edge of the grid)" if found[method]["at_edge"] else ""
        print(
            f"{name:36} {method:8} lr {found[method]['lr']:<8g} "
            f"q {found[method]['q']!s:6} gap {found[method]['gap'][0]:9.3g} "
            f"[{low:.3g}, {high:.3g}]{edge}",
            flush=True,
        )
    return {"passes": passes, "optimum_known": known, "methods": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, nargs="+", default=[12, 60])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tuning-seeds", type=int, default=3)
    parser.add_argument("--lengths", type=int, default=7, help="lengths of step, factor √10 apart")
    parser.add_argument("--problems", nargs="+", help="starts of names of problems")
    parser.add_argument("--out", type=Path, help="folder for the plots; none without it")
    parser.add_argument("--quick", action="store_true", help="small problems, few seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small matrices: threads only wait for each other
    if arguments.quick:
        arguments.passes, arguments.seeds = [4], 3
        arguments.tuning_seeds, arguments.lengths = 1, 4
    started = time.perf_counter()
    chosen = {
        name: setting
        for name, setting in settings(arguments.quick).items()
        if not arguments.problems or name.startswith(tuple(arguments.problems))
    }
    if not chosen:
        parser.error(f"no problem starts with {arguments.problems}")
    found = {
        f"{name}, {passes} passes": compare(
            name, setting, passes, arguments.seeds, arguments.tuning_seeds, arguments.lengths
        )
        for name, setting in chosen.items()
        for passes in arguments.passes
    }
    if arguments.out:
        for name, table in found.items():
            draw(arguments.out, name, table)
    ratios = [
        m["methods"]["sarah-c"]["gap"][0] / m["methods"]["vrsc-pg"]["gap"][0]
        for m in found.values()
    ]
    winners = {
        name: min(METHODS, key=lambda method, m=m: m["methods"][method]["gap"][0])
        for name, m in found.items()
    }
    for name, method in winners.items():
        print(f"lowest gap, {name}: {method}")
    summary = {
        "benchmark": "sarah",
        "quick": arguments.quick,
        "seeds": arguments.seeds,
        "gap_ratio_sarah_vs_vrsc": float(f"{np.exp(np.mean(np.log(ratios))):.3g}"),
        "winners": winners,
        "seconds": round(time.perf_counter() - started, 1),
        "problems": found,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
