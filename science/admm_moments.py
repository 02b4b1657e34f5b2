"""Exact mean and covariance of ADMM on a quadratic f and a ridge g, a linear Gaussian recursion.

The state is s = (x, z, u), 2M + D numbers, and s⁺ = T s + c + N ξ with ξ ~ N(0, I/batch).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, solve_discrete_lyapunov

from sparring.science.admm_problem import AdmmProblem, Ridge, Scheme
from sparring.science.admm_terms import FloatArray, Quadratic, factor


class Moments(NamedTuple):
    """Mean (...,) and covariance (..., ...) of a Gaussian."""

    mean: FloatArray
    cov: FloatArray


class LinearRecursion:
    """s⁺ = T s + c + N ξ of a scheme on a problem that is `linear`.

    Args:
        problem: a `Quadratic` f and a `Ridge` g.
        scheme: any.
        batch: samples an iteration.

    Raises:
        ValueError: the problem is not linear, or as `Scheme.check` and `factor`.
    """

    def __init__(self, problem: AdmmProblem, scheme: Scheme, batch: int = 1) -> None:
        f, g, A = problem.f, problem.g, problem.A
        if not isinstance(f, Quadratic) or not isinstance(g, Ridge):
            raise ValueError("exact moments need a Quadratic f and a Ridge g; simulate others")
        scheme.check(A)
        rho, alpha, H = scheme.rho, scheme.alpha, f.H
        rows, size = A.shape
        K = (1 - scheme.omega) * rho * A.T @ A + scheme.tau * np.eye(size)
        factored = factor((1 - scheme.omega1) * H + K)
        free = K - scheme.omega1 * H - rho * A.T @ A
        to_x = cho_solve(factored, np.hstack([free, rho * A.T, -rho * A.T]))
        shift, spread = cho_solve(factored, f.b), cho_solve(factored, f.S)
        # v = α A x⁺ + (1 − α) z + u; then z⁺ = κ v and u⁺ = v − z⁺.
        keep = np.hstack([np.zeros((rows, size)), (1 - alpha) * np.eye(rows), np.eye(rows)])
        kappa = np.broadcast_to(rho / (rho + g.beta), (rows,))[:, None]
        to_v, v_shift, v_spread = alpha * A @ to_x + keep, alpha * A @ shift, alpha * A @ spread
        self.T = np.vstack([to_x, kappa * to_v, (1 - kappa) * to_v])
        self.c = np.concatenate([shift, kappa[:, 0] * v_shift, (1 - kappa[:, 0]) * v_shift])
        noise = np.vstack([spread, kappa * v_spread, (1 - kappa) * v_spread])
        self.Q: FloatArray = noise @ noise.T / batch
        self.problem, self.scheme = problem, scheme
        # r = Ax − z as a linear function of s.
        self.to_residual = np.hstack([A, -np.eye(rows), np.zeros((rows, rows))])

    @property
    def radius(self) -> float:
        """Spectral radius of T: below 1 the iterates settle."""
        return float(np.abs(np.linalg.eigvals(self.T)).max())

    def start(self, x0: npt.ArrayLike) -> FloatArray:
        """(2M + D,) the state with z = Ax and u = g'(z)/ρ."""
        x = np.asarray(x0, dtype=np.float64)
        z = self.problem.A @ x
        return np.concatenate([x, z, self.problem.g.gradient(z) / self.scheme.rho])

    def moments(self, x0: npt.ArrayLike, steps: int) -> Moments:
        """Mean and covariance of s after `steps` iterations from x_0, in O(log steps) products."""
        if steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        power, offset, spread = self.T, self.c, self.Q
        mean = self.start(x0)
        cov = np.zeros_like(self.T)
        while steps:
            if steps & 1:
                mean, cov = power @ mean + offset, power @ cov @ power.T + spread
            offset, spread = power @ offset + offset, power @ spread @ power.T + spread
            power = power @ power
            steps >>= 1
        return Moments(mean, cov)

    def stationary(self) -> Moments:
        """Mean and covariance of s after infinitely many iterations.

        Raises:
            ValueError: the spectral radius is 1 or more.
        """
        if self.radius >= 1:
            raise ValueError(
                f"the recursion does not settle: spectral radius {self.radius:.6g}; take a larger "
                "tau or rho"
            )
        mean = np.linalg.solve(np.eye(len(self.T)) - self.T, self.c)
        return Moments(mean, np.asarray(solve_discrete_lyapunov(self.T, self.Q)))

    def of_x(self, moments: Moments) -> Moments:
        """The part of x."""
        size = self.problem.f.dimension
        return Moments(moments.mean[:size], moments.cov[:size, :size])

    def of_residual(self, moments: Moments) -> Moments:
        """Mean and covariance of Ax − z."""
        R = self.to_residual
        return Moments(R @ moments.mean, R @ moments.cov @ R.T)
