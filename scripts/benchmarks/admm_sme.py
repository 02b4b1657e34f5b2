"""ADMM against its modified equation, its fixed points, and the speed of simulating the equation.

weak_error_slope    log-log slope of |E x_k − E X| in ε, the worst of eight schemes (1 is the claim)
std_collapse_ratio  std of ADMM's x_k over that of the equation at the smallest ε (1 is the claim)
fixed_point_error   largest distance of seven schemes' lasso from scikit-learn's
speed               seconds of torchsde's Euler over ours for the same paths and steps

Ends with one JSON line. With --out there are plots: weak-error.svg (of the mean, exact), std.svg
(of x, ADMM's over the equation's, exact) and quartic.svg (error with 95 % intervals of the Monte
Carlo), against ε.

    python scripts/benchmarks/admm_sme.py --out runs/admm-sme   # adds Monte Carlo on a quartic
    python scripts/benchmarks/admm_sme.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import Lasso
from torch import Tensor

from sparring.launch.artifacts import write_atomically
from sparring.launch.report import Series, line_chart
from sparring.science.admm import (
    L1,
    AdmmProblem,
    Huber,
    LeastSquares,
    NoisyFunction,
    Ridge,
    admm,
    quadratic,
)
from sparring.science.admm_moments import LinearRecursion
from sparring.science.sme import Sme, sme

RNG = np.random.default_rng(0)
A = RNG.standard_normal((4, 3))
LAM = float(np.linalg.norm(A, 2) ** 2)
PROBLEM = quadratic(
    np.diag([1.0, 2.0, 0.5]) + 0.2, RNG.standard_normal(3), RNG.standard_normal((3, 3)), 0.7, A
)
START = np.array([1.0, -1.0, 2.0])
# c = τ at ρ = 1; kept when ρ = 1/ε grows.
SCHEMES: dict[str, dict[str, float]] = {
    "standard, α = 0.6": {"alpha": 0.6},
    "standard": {},
    "standard, α = 1.5": {"alpha": 1.5},
    "linearised": {"omega": 1.0, "tau": 0.8 * LAM},
    "linearised, α = 1.6": {"alpha": 1.6, "omega": 1.0, "tau": 0.8 * LAM},
    "gradient-based, α = 0.5": {"alpha": 0.5, "omega": 1.0, "omega1": 1.0, "tau": 0.8 * LAM},
    "gradient-based": {"omega": 1.0, "omega1": 1.0, "tau": 0.8 * LAM},
    "ω = 0.3, ω1 = 0.5": {"omega": 0.3, "omega1": 0.5, "tau": 0.5},
}


def slope(eps: list[float], values: list[float]) -> float:
    return float(np.polyfit(np.log(eps), np.log(values), 1)[0])


def draw(path: Path | None, series: Sequence[Series], y_label: str, *, log: bool = True) -> None:
    """Lines against ε, both axes logarithmic unless `log` is off for the vertical one."""
    if path is None:
        return
    chart = line_chart(series, x_label="ε", y_label=y_label, caption="", log=log, marked=True)
    write_atomically(path, str(chart.svg))


def weak_errors(eps: list[float], plot: Path | None) -> dict[str, dict[str, float]]:
    """Exact on both sides: no Monte Carlo."""
    found, series = {}, []
    for name, options in SCHEMES.items():
        error = sme(PROBLEM, 1.0, **options).weak_error(eps, t=1.0, x0=START)
        found[name] = {"mean": error.slope, "cov": error.cov_slope or 0.0, "last": error.error[-1]}
        series.append(Series(name, eps, error.error.tolist()))
        print(f"{name:26} slope {error.slope:.3f}, of the covariance {found[name]['cov']:.3f}")
    draw(plot, series, "|E x - E X|")
    return found


def wrong_slope(eps: list[float]) -> float:
    """The same with (2 − α) AᵀA for M: the error should not go down."""
    errors = []
    for e in eps:
        model = sme(PROBLEM, 1 / e, 1.5)
        recursion = LinearRecursion(PROBLEM, model.scheme)
        mean = recursion.of_x(recursion.moments(START, math.floor(1 / e))).mean
        # The M of α' with 1/α' = 2 − 1.5 is that of the other formula.
        other = Sme(PROBLEM, type(model.scheme)(rho=1 / e, alpha=1 / 0.5 - 1e-12))
        errors.append(float(np.linalg.norm(mean - other.mean_cov(1.0, START).mean)))
    return slope(eps, errors)


def collapse(eps: list[float], plot: Path | None) -> list[float]:
    """std of x over the equation's, largest coordinate, of all schemes at the last ε."""
    series = []
    for name, options in SCHEMES.items():
        scheme, ratios = sme(PROBLEM, 1.0, **options).scheme, []
        for e in eps:
            model = Sme(PROBLEM, scheme.at(1 / e))
            recursion = LinearRecursion(PROBLEM, model.scheme)
            cov = recursion.of_x(recursion.moments(START, math.floor(1 / e))).cov
            expected = model.mean_cov(1.0, START).cov
            ratios.append(math.sqrt(np.diag(cov).max() / np.diag(expected).max()))
        series.append(Series(name, eps, ratios))
    draw(plot, series, "std of x over the equation's", log=False)
    return [one.y[-1] for one in series]


def fixed_points() -> float:
    """Lasso through seven schemes against scikit-learn's coordinate descent."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((50, 6))
    target = data @ np.array([1.0, -2, 0, 0, 0.5, 0]) + 0.1 * rng.standard_normal(50)
    exact = Lasso(alpha=0.2, fit_intercept=False, tol=1e-15, max_iter=100_000).fit(data, target)
    variants: list[dict[str, float]] = [
        {}, {"alpha": 1.6}, {"alpha": 0.6}, {"omega": 1.0, "tau": 1.2},
        {"omega": 1.0, "tau": 1.5, "alpha": 1.4}, {"omega": 1.0, "omega1": 1.0, "tau": 4.0},
        {"omega": 0.3, "omega1": 0.5, "tau": 2.0, "alpha": 1.2},
    ]  # fmt: skip
    problem = AdmmProblem(LeastSquares(data, target), L1(0.2))
    found = [admm(problem, 1.0, **v, tol=1e-14, max_iter=5000).z for v in variants]
    return max(float(np.abs(z - exact.coef_).max()) for z in found)


def quartic() -> AdmmProblem:
    f = NoisyFunction(
        1,
        lambda x: (x**4 + 2 * x**2 - x).sum(),
        lambda x: (4 * x**3 + 2 * x - 1)[:, None],
        law="rademacher",
    )
    return AdmmProblem(f, Ridge(2.0))


def monte_carlo(paths: int, plot: Path | None) -> dict[str, Any]:
    """The paper's example, φ = x + x², gradient-based with α = ½ and c = 1."""
    model = sme(quartic(), 1.0, 0.5, 1.0, 1.0, omega1=1.0)
    eps = [2.0**-k for k in (5, 6, 7)]
    error = model.weak_error(eps, lambda x: x[:, 0] + x[:, 0] ** 2, t=0.5, x0=[1.0], n_paths=paths)
    spread = 1.96 * error.stderr
    bars = (error.error, error.error - spread, error.error + spread)
    draw(plot, [Series("quartic", eps, *(b.tolist() for b in bars))], "|E φ(x) - E φ(X)|")
    rounded = [[float(f"{v:.3g}") for v in row / error.eps] for row in (error.error, error.stderr)]
    return {"slope": error.slope, "error_over_eps": rounded[0], "stderr_over_eps": rounded[1]}


def torchsde_run(model: Sme, paths: int, dt: float) -> Callable[[], Tensor]:
    """The same equation through torchsde.sdeint, Euler, with its default Brownian motion."""
    import torchsde

    rate = torch.from_numpy(model.local.rate)
    centre, noise = torch.from_numpy(model.local.centre), torch.from_numpy(model.local.noise)

    class Equation(torch.nn.Module):
        noise_type, sde_type = "general", "ito"

        def f(self, t: Tensor, x: Tensor) -> Tensor:
            return -(x - centre) @ rate.T

        def g(self, t: Tensor, x: Tensor) -> Tensor:
            return noise.expand(len(x), -1, -1)

    start = torch.from_numpy(START).expand(paths, -1)
    times = torch.tensor([0.0, 0.5], dtype=torch.float64)
    return lambda: torchsde.sdeint(Equation(), start, times, method="euler", dt=dt)[-1]


def loop_run(model: Sme, paths: int, dt: float) -> Callable[[], Tensor]:
    """One path after the other."""

    def run() -> Tensor:
        options = {"t": 0.5, "x0": START}
        return torch.cat([model.simulate(1, dt, seed=s, **options) for s in range(paths)])

    return run


def speed(paths: int, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds of the baseline over ours, median and range over rounds that alternate."""
    model, dt = sme(PROBLEM, 50.0, 1.5), 0.5 / steps
    named = "torchsde sdeint euler" if find_spec("torchsde") else "one path after the other"
    make = torchsde_run if find_spec("torchsde") else loop_run
    baseline = make(model, paths, dt)
    # The same equation, written so that nothing about it is known to be linear.
    bent = AdmmProblem(PROBLEM.f, Huber(0.7e6, 1e6), A)
    general = Sme(bent, model.scheme)
    ratios, ours, general_ratios = [], [], []
    for number in range(rounds + 1):
        begin = time.perf_counter()
        mine = model.simulate(paths, dt, seed=number, t=0.5, x0=START)
        middle = time.perf_counter()
        other = baseline()
        end = time.perf_counter()
        general.simulate(paths, dt, seed=number, t=0.5, x0=START)
        last = time.perf_counter()
        if number:  # the first round warms up
            ratios.append((end - middle) / (middle - begin))
            ours.append(middle - begin)
            general_ratios.append((end - middle) / (last - end))
    mean, cov = model.mean_cov(0.5, START)
    spread = np.sqrt(np.diag(cov) / paths)
    worst = [float(np.abs((x.mean(0).numpy() - mean) / spread).max()) for x in (mine, other)]
    return {
        "baseline": named,
        "paths": paths,
        "steps": steps,
        "seconds": round(statistics.median(ours), 4),
        "times_faster": round(statistics.median(ratios), 2),
        "range": [round(min(ratios), 2), round(max(ratios), 2)],
        "times_faster_general_code": round(statistics.median(general_ratios), 2),
        "range_general_code": [round(min(general_ratios), 2), round(max(general_ratios), 2)],
        "deviation_of_means_in_stderr": [round(w, 2) for w in worst],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--monte-carlo", type=int, default=100_000, help="paths; 0 for none")
    parser.add_argument("--out", type=Path, help="folder for the plots; none without it")
    parser.add_argument("--quick", action="store_true", help="2000 paths, 100 steps")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.paths, arguments.steps, arguments.rounds = 2000, 100, 3
        arguments.monte_carlo = 5000
    torch.set_num_threads(1)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)

    def plot(name: str) -> Path | None:
        return arguments.out / f"{name}.svg" if arguments.out else None

    eps = [2.0**-k for k in range(5, 13)]
    errors = weak_errors(eps, plot("weak-error"))
    slopes = [e["mean"] for e in errors.values()]
    ratios = collapse(eps, plot("std"))
    summary = {
        "benchmark": "admm_sme",
        "quick": arguments.quick,
        "weak_error_slope": round(max(slopes, key=lambda s: abs(s - 1)), 4),
        "weak_error_slopes": {name: round(e["mean"], 4) for name, e in errors.items()},
        "covariance_slopes": {name: round(e["cov"], 4) for name, e in errors.items()},
        "slope_with_2_minus_alpha": round(wrong_slope(eps), 4),
        "std_collapse_ratio": round(max(ratios, key=lambda r: abs(r - 1)), 5),
        "fixed_point_error": float(f"{fixed_points():.3g}"),
        "speed": speed(arguments.paths, arguments.steps, arguments.rounds),
    }
    if arguments.monte_carlo:
        summary["quartic"] = monte_carlo(arguments.monte_carlo, plot("quartic"))
    print(f"worst slope {summary['weak_error_slope']}")
    print(f"slope with 2 − α for 1/α {summary['slope_with_2_minus_alpha']}")
    print(f"std over the equation's {summary['std_collapse_ratio']}")
    print(f"lasso against scikit-learn {summary['fixed_point_error']}")
    print(f"speed {summary['speed']}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
