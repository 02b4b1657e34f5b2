"""Many independent runs of stochastic ADMM at once, in torch: one tensor operation for all paths.

Shape legend: P paths, D variables, M rows of A, K dimensions of the noise.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparring.science.admm_noisy import NoisyFunction
from sparring.science.admm_problem import AdmmProblem, Scheme
from sparring.science.admm_terms import Quadratic, SmoothTerm


class AdmmPaths:
    """P runs of a scheme from one point, driven by normals that the caller draws.

    Args:
        problem: f a `Quadratic` or a `NoisyFunction`.
        scheme: any.
        x_PD: (P, D) the starting points.
        batch: samples an iteration; more than 1 for normal noise only.

    Raises:
        ValueError: another f, or as `Scheme.check`.
    """

    def __init__(self, problem: AdmmProblem, scheme: Scheme, x_PD: Tensor, batch: int = 1) -> None:
        f: SmoothTerm = problem.f
        if not isinstance(f, Quadratic | NoisyFunction):
            raise ValueError(
                f"paths need a Quadratic or a NoisyFunction, not {type(f).__name__}; `Sme.local` "
                "gives the quadratic model of others"
            )
        self.law = f.law if isinstance(f, NoisyFunction) else "normal"
        if batch > 1 and self.law != "normal":
            raise ValueError(f"batch must be 1 with {self.law} noise, got {batch}")
        scheme.check(problem.A)
        self.problem, self.scheme, self.f, self.batch = problem, scheme, f, batch
        self.x = x_PD.clone()
        self.A = torch.from_numpy(problem.A).to(x_PD)
        self.z = self.x @ self.A.T
        self.u = problem.g.gradient(self.z) / scheme.rho
        eye = torch.eye(self.x.shape[1], dtype=x_PD.dtype, device=x_PD.device)
        self.K = (1 - scheme.omega) * scheme.rho * self.A.T @ self.A + scheme.tau * eye

    def step(self, normals_PK: Tensor) -> None:
        """One iteration of all paths; ξ are the normals, or their signs for Rademacher noise."""
        rho, alpha = self.scheme.rho, self.scheme.alpha
        xi = normals_PK.sign() if self.law == "rademacher" else normals_PK
        xi = xi / math.sqrt(self.batch)
        q = rho * (self.x @ self.A.T - self.z + self.u) @ self.A - self.x @ self.K
        if self.scheme.omega1:
            q = q + self.scheme.omega1 * self._gradient(self.x, xi)
        self.x = self._solve(q, xi)
        relaxed = alpha * self.x @ self.A.T + (1 - alpha) * self.z
        z = self.problem.g.prox(relaxed + self.u, 1 / rho)
        self.z, self.u = z, self.u + relaxed - z

    def _gradient(self, x: Tensor, xi: Tensor) -> Tensor:
        return self.f.gradient_paths(x) + self.f.noise_times(x, xi)

    def _solve(self, q: Tensor, xi: Tensor) -> Tensor:
        weight, K, f = 1 - self.scheme.omega1, self.K, self.f
        if weight == 0:
            return _solved(K, -q)
        if isinstance(f, Quadratic):
            H = torch.from_numpy(f.H).to(q)
            shift = -weight * self._gradient(torch.zeros_like(q), xi) - q
            return _solved(weight * H + K, shift)
        x = self.x
        for _ in range(50):
            slope = weight * self._gradient(x, xi) + x @ K + q
            step: Tensor = torch.linalg.solve(weight * f.hessian_paths(x, xi) + K, slope)
            x = x - step
            if float(step.abs().max()) <= 1e-13 * (1 + float(x.abs().max())):
                return x
        raise ValueError("Newton's method for the x-update did not end in 50 steps; raise rho")


def _solved(matrix: Tensor, right_PD: Tensor) -> Tensor:
    """(P, D) matrix⁻¹ times each row."""
    solution: Tensor = torch.linalg.solve(matrix, right_PD.T)
    return solution.T


def admm_paths(
    problem: AdmmProblem,
    scheme: Scheme,
    x0: Tensor,
    *,
    steps: int,
    n_paths: int,
    batch: int = 1,
    seed: int = 0,
) -> Tensor:
    """(P, D) the x of `n_paths` runs after `steps` iterations from x0 (D,), on x0's device."""
    generator = torch.Generator(x0.device).manual_seed(seed)
    paths = AdmmPaths(problem, scheme, x0.expand(n_paths, -1), batch)
    width = problem.f.noise(np.asarray(x0.cpu(), dtype=np.float64)).shape[1]
    for _ in range(steps):
        drawn = torch.randn(n_paths, width, generator=generator, dtype=x0.dtype, device=x0.device)
        paths.step(drawn)
    return paths.x
