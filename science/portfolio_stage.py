"""Stage `compose`: one run of a compositional solver on a portfolio of real returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparring.launch import artifacts
from sparring.launch.collective import one_thread
from sparring.launch.metrics import MetricsFile
from sparring.launch.stages import Context, Figures
from sparring.science import compositional_examples as examples
from sparring.science.compositional import minimize_compositional
from sparring.science.config import ComposeStage
from sparring.science.returns import daily_returns, monthly_returns

_RETURNS = {"monthly": monthly_returns, "daily": daily_returns}


def run(
    config: ComposeStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write metrics.jsonl, the gap at points of the budget, and solution.json.

    Raises:
        SparringError: the package with the returns is not installed.
    """
    returns = _RETURNS[config.portfolio.returns]()
    problem = examples.portfolio(returns)
    assert problem.inner_count is not None
    assert problem.optimum is not None
    one_pass = 3 * problem.inner_count  # 2m + n, and n = m
    with one_thread():
        result = minimize_compositional(
            problem,
            np.ones(returns.shape[1]),
            config.solver.method,
            lr=config.solver.lr,
            q=config.solver.q,
            batch=config.portfolio.batch,
            averaging=config.solver.averaging,
            max_ifo=round(config.portfolio.passes * one_pass),
            seed=context.seed,
        )
    metrics = MetricsFile(output / "metrics.jsonl", counter="nit")
    finite = 0
    for values in zip(*result.history.values(), strict=True):
        row = {name: v.item() for name, v in zip(result.history, values, strict=True)}
        if not math.isfinite(row["fun"]):
            break  # JSON has no name for it, and the figures say that it diverged
        passes, gap = row["ifo"] / one_pass, row["fun"] - problem.optimum
        metrics.write(**row, passes=passes, gap=gap)
        finite += 1
    artifacts.write_json(output / "solution.json", {"x": result.x.tolist()})
    diverged = "" if finite == len(result.history["nit"]) else result.message
    if diverged:
        context.emit(note=diverged)
    return {
        "gap": gap,
        "ifo": row["ifo"],
        "steps": result.nit,
        "grad_norm": row["grad_norm"],
        "diverged": diverged,
    }
