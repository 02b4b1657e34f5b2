"""The stochastic modified equation of ADMM: what its iterates do between now and the optimum.

With ρ = 1/ε, one iteration is a time of ε, and x_k is close in law to X at t = kε,

    M dX = −∇V(X) dt + √(ε/B) σ(X) dW,   M = c I + (1/α − ω) AᵀA,   σσᵀ = Cov f'(x, ξ),

c = τ/ρ and B the batch (arXiv 2003.03532; 2404.14358 for the general scheme). ω1 does not enter.

Shape legend: P paths, D variables, K dimensions of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import root
from torch import Tensor

from sparring.launch.seeds import derive
from sparring.science import sme_advice
from sparring.science.admm_moments import Moments
from sparring.science.admm_problem import AdmmProblem, Scheme
from sparring.science.admm_terms import FloatArray, point
from sparring.science.sme_advice import Advice, StoppingTime
from sparring.science.sme_linear import OrnsteinUhlenbeck
from sparring.science.sme_weak import WeakError, weak_error_exact, weak_error_sampled

__all__ = ["Advice", "Sme", "StoppingTime", "WeakError", "sme"]

SCHEMES = ("em", "tamed", "exact")


def sme(
    problem: AdmmProblem,
    rho: float,
    alpha: float = 1.0,
    omega: float = 0.0,
    tau: float = 0.0,
    *,
    omega1: float = 0.0,
    batch: int = 1,
) -> Sme:
    """The modified equation of `admm` with the same arguments.

    Args:
        problem: f with noise, a differentiable g, A.
        rho, alpha, omega, omega1, tau: as in `Scheme`; ω1 is only used where ADMM itself is run.
        batch: samples an iteration, B.

    Raises:
        ValueError: an argument out of range, an unstable scheme, a g without gradient, M not
            positive definite.
    """
    scheme = Scheme(rho=rho, alpha=alpha, omega=omega, omega1=omega1, tau=tau)
    return Sme(problem, scheme, batch)


class Sme:
    """See `sme`. Attributes: problem, scheme, batch, M (D, D)."""

    def __init__(self, problem: AdmmProblem, scheme: Scheme, batch: int = 1) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not problem.g.smooth:
            raise ValueError(
                f"the equation needs a differentiable g; {type(problem.g).__name__} has kinks, "
                "where a differential inclusion takes its place; Huber(beta, delta) has none"
            )
        scheme.check(problem.A)
        self.problem, self.scheme, self.batch = problem, scheme, batch
        gram = problem.A.T @ problem.A
        self.M: FloatArray = scheme.c * np.eye(len(gram)) + (1 / scheme.alpha - scheme.omega) * gram
        eigenvalues = np.linalg.eigvalsh(self.M)
        if eigenvalues[0] <= 1e-12 * max(abs(eigenvalues[-1]), scheme.c, float(gram.max())):
            needed = max(0.0, scheme.c - float(eigenvalues[0])) * scheme.rho
            raise ValueError(
                f"M = c I + (1/alpha − omega) AᵀA must be positive definite, its least eigenvalue "
                f"is {eigenvalues[0]:.4g} (alpha = {scheme.alpha}, omega = {scheme.omega}, c = "
                f"{scheme.c:.4g}); take tau > {needed:.6g}"
            )

    @property
    def eps(self) -> float:
        """Time of one iteration, 1/ρ."""
        return self.scheme.eps

    def _point(self, name: str, x: npt.ArrayLike) -> FloatArray:
        return point(name, x, self.problem.f.dimension)

    def drift(self, x: npt.ArrayLike) -> FloatArray:
        """(D,) −M⁻¹ ∇V(x)."""
        return np.asarray(-np.linalg.solve(self.M, self.problem.gradient(self._point("x", x))))

    def diffusion(self, x: npt.ArrayLike) -> FloatArray:
        """(D, K) √(ε/B) M⁻¹ σ(x)."""
        sigma = self.problem.f.noise(self._point("x", x))
        return np.asarray(math.sqrt(self.eps / self.batch) * np.linalg.solve(self.M, sigma))

    @cached_property
    def optimum(self) -> FloatArray:
        """(D,) the minimiser x* of V.

        Raises:
            ValueError: it was not found, or V is quadratic and flat in a direction.
        """
        start = np.zeros(self.problem.f.dimension)
        if self.problem.linear:
            hessian = self.problem.hessian(start)
            eigenvalues = np.linalg.eigvalsh(hessian)
            if eigenvalues[0] <= 1e-12 * eigenvalues[-1]:
                raise ValueError(
                    f"V has no single minimum, V'' has the eigenvalue {eigenvalues[0]:.3g}; add "
                    "curvature (beta > 0), or simulate with 'em' or 'tamed', which need none"
                )
            return np.asarray(np.linalg.solve(hessian, -self.problem.gradient(start)))
        found = root(self.problem.gradient, start, jac=self.problem.hessian, tol=1e-13)
        norm = float(np.linalg.norm(self.problem.gradient(found.x)))
        if norm > 1e-6:
            raise ValueError(f"no minimum of V was found: ‖∇V‖ = {norm:.3g} ({found.message})")
        return np.asarray(found.x)

    @cached_property
    def local(self) -> OrnsteinUhlenbeck:
        """The equation linearised at the optimum; for a quadratic f and a ridge g it is exact."""
        rate: FloatArray = np.asarray(np.linalg.solve(self.M, self.problem.hessian(self.optimum)))
        return OrnsteinUhlenbeck(rate, self.optimum, self.diffusion(self.optimum))

    def mean_cov(self, t: float, x0: npt.ArrayLike) -> Moments:
        """Mean (D,) and covariance (D, D) of X_t from X_0 = x0, exact.

        Raises:
            ValueError: V is not quadratic (use `simulate`, or `local.mean_cov` near the optimum).
        """
        if not self.problem.linear:
            raise ValueError(
                "mean_cov is exact and needs a Quadratic f and a Ridge g; use simulate, or "
                "local.mean_cov for the equation linearised at the optimum"
            )
        return self.local.mean_cov(t, self._point("x0", x0))

    def simulate(
        self,
        n_paths: int,
        dt: float,
        scheme: str = "em",
        seed: int = 0,
        *,
        t: float,
        x0: npt.ArrayLike,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """(P, D) X_t of independent paths from x0, float64, all paths in one tensor operation.

        em      X + b dt + s √dt ξ (Euler–Maruyama; diverges where b or s grow faster than x)
        tamed   the same increment over 1 + dt (‖b‖ + ‖s‖²), of weak order 1 too
        exact   Gaussian transitions of the linear equation, any dt

        Args:
            n_paths: P.
            dt: step of time; the last one is shortened to end at t. ε/8 is enough for "em".
            scheme: one of the three.
            seed: equal seeds give equal paths.
            t: end of time, in units of one iteration being ε.
            x0: (D,).
            device: where to simulate.

        Raises:
            ValueError: an argument out of range, or "exact" for a V that is not quadratic or that
                has no single minimum.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        if n_paths < 1 or not dt > 0 or not t >= 0:
            raise ValueError(f"n_paths ≥ 1, dt > 0 and t ≥ 0 are needed, got {n_paths}, {dt}, {t}")
        start = self._point("x0", x0)
        x = torch.from_numpy(start).to(device).expand(n_paths, -1)
        generator = torch.Generator(device).manual_seed(derive(seed, "sme", "paths"))
        if scheme == "exact":
            return self._simulate_exact(x, t, dt, generator)
        move = self.increment(tamed=scheme == "tamed")
        width = self.diffusion(start).shape[1]
        count = math.ceil(t / dt - 1e-9)
        for k in range(count):
            step = min(dt, t - k * dt)
            noise = torch.randn(n_paths, width, generator=generator, dtype=x.dtype, device=device)
            x = x + move(x, step, noise * math.sqrt(step))
        return x

    def increment(self, *, tamed: bool = False) -> Callable[[Tensor, float, Tensor], Tensor]:
        """(x (P, D), dt, dW (P, K)) ↦ (P, D), the step of Euler–Maruyama, plain or tamed."""
        if self.problem.linear:
            return self._linear_increment(tamed)
        inverse = torch.from_numpy(np.linalg.inv(self.M))
        A, f, g = torch.from_numpy(self.problem.A), self.problem.f, self.problem.g
        scale = math.sqrt(self.eps / self.batch)

        def move(x: Tensor, dt: float, dW: Tensor) -> Tensor:
            back, matrix = inverse.to(x), A.to(x)
            slope = f.gradient_paths(x) + g.gradient(x @ matrix.T) @ matrix
            drift = -slope @ back.T
            change = drift * dt + scale * f.noise_times(x, dW) @ back.T
            if tamed:
                spread = scale * (back @ f.noise_paths(x))
                size = drift.norm(dim=1) + (spread**2).sum((1, 2))
                change = change / (1 + dt * size)[:, None]
            return change

        return move

    def _linear_increment(self, tamed: bool) -> Callable[[Tensor, float, Tensor], Tensor]:
        """The same where M⁻¹∇V = rate x − pull, and σ is one for all paths."""
        zero = np.zeros(self.problem.f.dimension)
        matrix = np.linalg.solve(self.M, self.problem.hessian(zero)).T
        parts = (matrix, self.drift(zero), self.diffusion(zero).T)
        rate, pull, spread = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        square = float((spread**2).sum())

        def move(x: Tensor, dt: float, dW: Tensor) -> Tensor:
            drift = torch.addmm(pull.to(x), x, rate.to(x), alpha=-1)
            change = torch.addmm(drift, dW, spread.to(x), beta=dt)
            if tamed:
                change = change / (1 + dt * (drift.norm(dim=1) + square))[:, None]
            return change

        return move

    def _simulate_exact(self, x: Tensor, t: float, dt: float, generator: torch.Generator) -> Tensor:
        if not self.problem.linear:
            raise ValueError(
                "scheme 'exact' needs a Quadratic f and a Ridge g; take 'em' or 'tamed'"
            )
        process = self.local
        count = math.ceil(t / dt - 1e-9)
        centre = torch.from_numpy(process.centre).to(x)
        for k in range(count):
            decay, root_cov = process.transition(min(dt, t - k * dt))
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            moved = (x - centre) @ torch.from_numpy(decay).to(x).T
            x = centre + moved + noise @ torch.from_numpy(root_cov).to(x).T
        return x

    def weak_error(
        self,
        eps_list: Sequence[float],
        phi: Callable[[Tensor], Tensor] | None = None,
        *,
        t: float,
        x0: npt.ArrayLike,
        n_paths: int = 100_000,
        substeps: int = 8,
        scheme: str = "tamed",
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> WeakError:
        """|E φ(x_k) − E φ(X_kε)| between ADMM and its equation for several ε, c and α kept.

        Without `phi`, for a quadratic f and a ridge g: errors of the mean and of the covariance,
        exact on both sides. With `phi` ((P, D) ↦ (P,)) by simulation of both with common random
        numbers: an ADMM iteration takes the sum of the equation's increments over its time.

        Args:
            eps_list: at least two ε of at most t, so that t/ε is close to a whole number.
            phi: test function, or None.
            t: end of time.
            x0: (D,).
            n_paths, substeps, scheme, seed, device: of the simulation; the equation takes steps
                ε/substeps.

        Returns:
            WeakError: eps (E,), error (E,), stderr (E,), slope of log error in log ε; without phi
            also cov_error and cov_slope (the covariance itself is of order ε).

        Raises:
            ValueError: fewer than two ε, one above t, or `phi` missing where nothing is exact.
        """
        if len(eps_list) < 2 or min(eps_list) <= 0:
            raise ValueError(f"give at least two positive ε, got {list(eps_list)}")
        if not t >= max(eps_list):
            raise ValueError(
                f"t = {t} ends before the first iteration of the largest ε = {max(eps_list)}; "
                "raise t, or take smaller ε"
            )
        start = self._point("x0", x0)
        models = [Sme(self.problem, self.scheme.at(1 / eps), self.batch) for eps in eps_list]
        if phi is None:
            return weak_error_exact(models, t, start)
        if scheme not in ("em", "tamed"):
            raise ValueError(f"scheme must be 'em' or 'tamed' for weak_error, got {scheme!r}")
        paths = torch.from_numpy(start).to(device).expand(n_paths, -1)
        return weak_error_sampled(models, phi, t, paths, substeps, scheme == "tamed", seed)

    def stopping_time(self, x0: npt.ArrayLike, tolerance: float = 0.1) -> StoppingTime:
        """First t with E‖X_t − x*‖² ≤ (1 + tolerance) times the least it ever is.

        From there on more iterations of this scheme buy next to nothing: lower the noise instead
        (larger ρ or batch, smaller α). Uses the equation linearised at the optimum.

        Raises:
            ValueError: tolerance is not positive, or there is no noise to wait for.
        """
        return sme_advice.stopping_time(self, self._point("x0", x0), tolerance)

    def advise(
        self,
        target_std: float,
        *,
        alphas: Sequence[float] = (1.0, 1.5, 0.5),
        batches: Sequence[int] = (1, 4, 16, 64),
        stiffness: float = 0.1,
    ) -> list[Advice]:
        """ρ, α and batch that end with a standard deviation of `target_std`, the fastest first.

        See `sme_advice.advise`.
        """
        return sme_advice.advise(self, target_std, alphas, batches, stiffness)
