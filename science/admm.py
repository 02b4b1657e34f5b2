"""Stochastic ADMM for min f(x) + g(Ax): standard, linearised, gradient-based, relaxed.

    problem = AdmmProblem(LeastSquares(data, target), L1(0.1))
    result = admm(problem, rho=1.0, alpha=1.5)

`sme` has the SDE that the iterates follow, `admm_consensus` the form that is sharded over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeResult

from sparring.launch.seeds import derive
from sparring.science.admm_noisy import NoisyFunction
from sparring.science.admm_problem import (
    L1,
    AdmmProblem,
    Huber,
    Penalty,
    Ridge,
    Scheme,
    difference_matrix,
    quadratic,
)
from sparring.science.admm_terms import (
    FloatArray,
    LeastSquares,
    Logistic,
    Quadratic,
    SmoothTerm,
    Solve,
    point,
)

__all__ = [
    "L1",
    "AdmmProblem",
    "Huber",
    "LeastSquares",
    "Logistic",
    "NoisyFunction",
    "Penalty",
    "Quadratic",
    "Ridge",
    "Scheme",
    "SmoothTerm",
    "admm",
    "difference_matrix",
    "quadratic",
]


# Beyond this a run has diverged; its square is still a finite number.
_LIMIT = 1e100


class State(NamedTuple):
    """x (D,), z (M,) and the scaled dual u (M,), with ρu in ∂g(z) after every iteration."""

    x: FloatArray
    z: FloatArray
    u: FloatArray


class _Iteration:
    """One iteration of the scheme, with what it can compute once."""

    def __init__(self, problem: AdmmProblem, scheme: Scheme, batch: int | None = None) -> None:
        scheme.check(problem.A)
        self.problem, self.scheme = problem, scheme
        self.calls = {"df": 0, "d2f": 0}
        self.f = problem.f.counted(self.calls, batch)
        A = problem.A
        self.K: FloatArray = (1 - scheme.omega) * scheme.rho * A.T @ A + scheme.tau * np.eye(
            A.shape[1]
        )
        self.solve: Solve = self.f.solver(1 - scheme.omega1, self.K)

    def start(self, x0: npt.ArrayLike | None) -> State:
        """z = Ax, and u = g'(z)/ρ where g has a gradient, else 0."""
        problem = self.problem
        size = problem.f.dimension
        x = np.zeros(size) if x0 is None else point("x0", x0, size)
        z = problem.A @ x
        u = problem.g.gradient(z) / self.scheme.rho if problem.g.smooth else np.zeros_like(z)
        return State(x, z, np.asarray(u))

    def __call__(self, state: State, xi: Any) -> State:
        x, z, u = state
        f, g, A = self.f, self.problem.g, self.problem.A
        rho, alpha, omega1 = self.scheme.rho, self.scheme.alpha, self.scheme.omega1
        q = rho * A.T @ (A @ x - z + u) - self.K @ x
        if omega1:
            q = q + omega1 * f.gradient(x, xi)
        x = self.solve(q, xi, x)
        relaxed = alpha * (A @ x) + (1 - alpha) * z
        z = g.prox(relaxed + u, 1 / rho)
        return State(x, z, u + relaxed - z)


def admm(
    problem: AdmmProblem,
    rho: float,
    alpha: float = 1.0,
    omega: float = 0.0,
    omega1: float = 0.0,
    tau: float = 0.0,
    *,
    x0: npt.ArrayLike | None = None,
    batch: int | None = None,
    max_iter: int = 10_000,
    tol: float | None = None,
    records: int = 100,
    seed: int = 0,
    callback: Callable[[int, State], None] | None = None,
) -> OptimizeResult:
    """min f(x) + g(z) subject to Ax = z, with the scaled dual u (arXiv 2003.03532, 2404.14358).

        x⁺ = argmin (1 − ω1) f(x, ξ) + ω1 ⟨f'(x_k, ξ), x⟩ + (1 − ω) ρ/2 ‖Ax − z_k + u_k‖²
                    + ω ρ ⟨Aᵀ(Ax_k − z_k + u_k), x⟩ + τ/2 ‖x − x_k‖²
        z⁺ = argmin g(z) + ρ/2 ‖x̂ − z + u_k‖²,   x̂ = α Ax⁺ + (1 − α) z_k
        u⁺ = u_k + x̂ − z⁺

    ω = ω1 = τ = 0 is standard ADMM, ω = 1 linearised, ω = ω1 = 1 gradient-based. α, ω, ω1 and τ
    change how fast and how noisily it gets there, not where to. The stability that is checked is
    that for large ρ; for a small ρ and ω = 1 take τ of at least ρ ‖A‖², plus f's Lipschitz constant
    of the gradient when ω1 = 1.

    Args:
        problem: f, g, A.
        rho, alpha, omega, omega1, tau: as in `Scheme`; α in (0, 2), ω and ω1 in [0, 1].
        x0: (D,), 0 if None. z_0 = Ax_0 and u_0 = g'(z_0)/ρ (0 where g has no gradient).
        batch: samples of f an iteration, drawn anew with replacement; None: f itself.
        max_iter: iterations at most.
        tol: stop when the residual ‖Ax − z‖ is at most tol (1 + max(‖Ax‖, ‖z‖)) and the gradient
            ‖f'(x) + ρAᵀu‖ at most tol (1 + ‖ρAᵀu‖). None: 1e-8 without a batch; with one there is
            no such moment, and all iterations are made.
        records: how often f + g and the residuals are recorded, evenly over max_iter.
        seed: of the samples.
        callback: called after every iteration with its number and state.

    Returns:
        scipy's OptimizeResult: x (D,), z (M,), u (M,), fun = f(x) + g(Ax), grad_norm =
        ‖f'(x) + ρAᵀu‖ (since ρu is in ∂g(z), both 0 means optimal), residual = ‖Ax − z‖, nit,
        n_ifo {"df": gradients, "d2f": Hessians of single samples that the x-updates took, every
        step of Newton's method one of each}, history (arrays nit, fun, grad_norm, residual),
        success, message. Monitoring, and the values in Newton's line search, are not in n_ifo.

    Raises:
        ValueError: an argument out of range, an unstable scheme, an x-update without unique
            solution (with the fix).
    """
    scheme = Scheme(rho=rho, alpha=alpha, omega=omega, omega1=omega1, tau=tau)
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1 sample, got {batch}; None takes f itself")
    if max_iter < 1 or records < 1:
        raise ValueError(f"max_iter and records must be at least 1, got {max_iter} and {records}")
    if tol is not None and not (tol >= 0):
        raise ValueError(f"tol must not be negative, got {tol!r}")
    if tol is not None and batch is not None:
        raise ValueError("with a batch the iterates never settle; leave tol out, set max_iter")
    iterate = _Iteration(problem, scheme, batch)
    state = iterate.start(x0)
    limit = 0.0 if batch is not None else 1e-8 if tol is None else tol
    return _drive(iterate, state, batch, max_iter, limit, records, seed, callback)


def _drive(
    iterate: _Iteration,
    state: State,
    batch: int | None,
    max_iter: int,
    tol: float,
    records: int,
    seed: int,
    callback: Callable[[int, State], None] | None,
) -> OptimizeResult:
    problem, rho = iterate.problem, iterate.scheme.rho
    rng = np.random.default_rng(derive(seed, "admm", "samples"))
    rows = [_row(problem, rho, state, 0)]
    due, done, message = 1, False, f"{max_iter} iterations are made"
    k = 0
    for k in range(1, max_iter + 1):
        xi = None if batch is None else problem.f.draw(rng, batch)
        state = iterate(state, xi)
        if not np.abs(state.x).max() < _LIMIT:
            message = f"x grew beyond {_LIMIT:g} by iteration {k}; take a larger tau or rho"
            break
        if callback is not None:
            callback(k, state)
        done = batch is None and _settled(problem, rho, state, tol)
        if done or k * records >= due * max_iter:
            due = k * records // max_iter + 1
            rows.append(_row(problem, rho, state, k))
        if done:
            message = f"residual and gradient are within tol = {tol:g}"
            break
    if rows[-1][0] != k:
        rows.append(_row(problem, rho, state, k))
    table = np.array(rows)
    names = ("fun", "grad_norm", "residual")
    history = {"nit": table[:, 0].astype(np.int64)}
    history |= {name: table[:, 1 + i] for i, name in enumerate(names)}
    finite = bool(np.isfinite(table[-1]).all())
    return OptimizeResult(
        x=state.x,
        z=state.z,
        u=state.u,
        **{name: float(history[name][-1]) for name in names},
        nit=k,
        n_ifo=dict(iterate.calls),
        history=history,
        success=done or (batch is not None and finite),
        message=message,
    )


def _row(problem: AdmmProblem, rho: float, state: State, k: int) -> tuple[float, ...]:
    x, z, u = state
    if not np.abs(x).max() < _LIMIT:
        return (k, math.nan, math.nan, math.nan)
    slope = problem.f.gradient(x) + rho * problem.A.T @ u
    residual = np.linalg.norm(problem.A @ x - z)
    return (k, problem.value(x), float(np.linalg.norm(slope)), float(residual))


def _settled(problem: AdmmProblem, rho: float, state: State, tol: float) -> bool:
    x, z, u = state
    Ax, dual = problem.A @ x, rho * problem.A.T @ u
    size = max(float(np.linalg.norm(Ax)), float(np.linalg.norm(z)))
    if np.linalg.norm(Ax - z) > tol * (1 + size):
        return False
    return bool(np.linalg.norm(problem.f.gradient(x) + dual) <= tol * (1 + np.linalg.norm(dual)))
