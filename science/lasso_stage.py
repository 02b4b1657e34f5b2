"""Stages `admm` and `consensus`: one run of stochastic ADMM on a lasso, beside its equation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sparring.launch import artifacts
from sparring.launch.collective import one_thread, process_group
from sparring.launch.errors import SparringError
from sparring.launch.metrics import MetricsFile
from sparring.launch.stages import Context, Figures
from sparring.science.admm import L1, AdmmProblem, LeastSquares, Scheme, admm
from sparring.science.admm_consensus import consensus_admm
from sparring.science.admm_terms import FloatArray
from sparring.science.config import AdmmStage
from sparring.science.sme_lasso import support_process

_RECORDS = 200
Watch = Callable[[int, FloatArray, float], None]


def diabetes() -> LeastSquares:
    """scikit-learn's 442 patients with 10 columns; columns and target have mean 0 and variance 1.

    Raises:
        SparringError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_diabetes
    except ModuleNotFoundError:
        raise SparringError(
            'the lasso recipe needs scikit-learn: pip install "sparring[science]"'
        ) from None
    data, target = load_diabetes(return_X_y=True)
    return LeastSquares(
        (data - data.mean(0)) / data.std(0), (target - target.mean()) / target.std()
    )


class _Watcher:
    """Rows of metrics.jsonl, and the mean square of the support over the second half."""

    def __init__(self, optimum: FloatArray, config: AdmmStage, path: Path | None) -> None:
        self.optimum, self.support = optimum, np.flatnonzero(optimum)
        self.total, self.batch = config.lasso.iterations, config.lasso.batch
        self.metrics = MetricsFile(path, counter="nit") if path else None
        self.squares: list[float] = []
        self.residuals: list[float] = []
        self.due = 0
        self.last = math.nan
        self(0, np.zeros_like(optimum), 0.0)

    def __call__(self, k: int, z: FloatArray, residual: float) -> None:
        error = z - self.optimum
        if k > self.total / 2:
            self.squares.append(float(np.mean(error[self.support] ** 2)))
            self.residuals.append(residual)
        if k * _RECORDS >= self.due * self.total:
            self.due = k * _RECORDS // self.total + 1
            self.last = float(np.linalg.norm(error) / np.linalg.norm(self.optimum))
            if self.metrics:
                row = {"nit": k, "rows": k * self.batch, "distance": self.last}
                self.metrics.write(**row, residual=residual)


def run(config: AdmmStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Write metrics.jsonl, the distance to the optimum along the way, and solution.json."""
    asked = config.scheme
    scheme = Scheme(
        rho=config.lasso.rho,
        alpha=asked.alpha,
        omega=asked.omega,
        omega1=asked.omega1,
        tau=asked.c * config.lasso.rho,
    )
    f, first = diabetes(), context.world.rank == 0
    with one_thread(), process_group(context.world):
        try:
            scheme.check(np.eye(f.dimension))
            exact = admm(AdmmProblem(f, L1(config.lasso.penalty)), 1.0, tol=1e-13)
            process = support_process(f, exact.z, scheme, config.lasso.batch)
            watch = _Watcher(exact.z, config, output / "metrics.jsonl" if first else None)
            z, message = _solve(f, scheme, config, context, watch)
        except ValueError as error:
            raise SparringError(str(error)) from error
    if not first:
        return {}
    artifacts.write_json(output / "solution.json", {"z": z.tolist()})
    if message:
        context.emit(note=message)
        return {"distance": watch.last, "diverged": message}
    covariance = process.stationary_cov
    return {
        "distance": watch.last,
        "residual": float(np.mean(watch.residuals)),
        "std": math.sqrt(np.mean(watch.squares)),
        "predicted_std": math.sqrt(float(np.diag(covariance).mean())),
        "diverged": "",
    }


def _solve(
    f: LeastSquares, scheme: Scheme, config: AdmmStage, context: Context, watch: Watch
) -> tuple[FloatArray, str]:
    """z at the end, and why the run did not get there (empty if it did)."""
    penalty, batch, iterations = (
        L1(config.lasso.penalty),
        config.lasso.batch,
        config.lasso.iterations,
    )
    parts = config.scheme.parts
    if parts == 1:
        result = admm(
            AdmmProblem(f, penalty), **vars(scheme), batch=batch, max_iter=iterations, records=1,
            seed=context.seed,
            callback=lambda k, s: watch(k, s.z, float(np.linalg.norm(s.x - s.z))),
        )  # fmt: skip
        return result.z, "" if result.success else result.message
    world = context.world
    if world.size > parts:
        raise ValueError(
            f"{parts} parts cannot be dealt out to {world.size} ranks; raise admm.parts of "
            f"{config.scheme.label}, or lower launch.processes"
        )
    mine = range(world.rank, parts, world.size)
    # Each part has its share of rho, so that one iteration is the same time as without parts.
    losses = [
        LeastSquares(f.data[n::parts], f.target[n::parts], weight=len(f.data[n::parts]) / f.samples)
        for n in mine
    ]
    result = consensus_admm(
        losses, penalty, scheme.rho / parts, scheme.alpha, scheme.omega1, scheme.tau / parts,
        batch=batch // parts, max_iter=iterations, seed=context.seed, callback=watch,
    )  # fmt: skip
    return result.x, "" if result.success else result.message
