"""Consensus ADMM: every rank holds its own loss, all agree on one x (A stacks identities)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy.optimize import OptimizeResult

from sparring.launch.seeds import derive
from sparring.science.admm_problem import Penalty, Scheme
from sparring.science.admm_terms import FloatArray, SmoothTerm

_State = tuple[FloatArray, FloatArray, FloatArray]


def consensus_admm(
    f: SmoothTerm,
    g: Penalty,
    rho: float,
    alpha: float = 1.0,
    omega1: float = 0.0,
    tau: float = 0.0,
    *,
    x0: npt.ArrayLike | None = None,
    batch: int | None = None,
    max_iter: int = 1000,
    tol: float | None = None,
    seed: int = 0,
    group: Any = None,
) -> OptimizeResult:
    """min Σ_r f_r(x) + g(x), rank r calling with its own f_r and the same other arguments.

        x_r⁺ = argmin (1 − ω1) f_r(x, ξ) + ω1 ⟨f_r'(x_r, ξ), x⟩ + ρ/2 ‖x − z + u_r‖²
                      + τ/2 ‖x − x_r‖²
        z⁺   = argmin g(z) + Rρ/2 ‖z − mean_r(x̂_r + u_r)‖²,   x̂_r = α x_r⁺ + (1 − α) z
        u_r⁺ = u_r + x̂_r − z⁺

    (Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011, section 7,
    with relaxation.) Two all-reduces an iteration, of D and of 3 float64 numbers; data
    never travel. On R ranks with n_r of n rows each, f_r = LeastSquares(rows, targets,
    weight=n_r / n) gives the mean over all rows. Without torch.distributed it runs alone.

    Args:
        f: this rank's loss; D must be the same on all.
        g: penalty, the same on all.
        rho, alpha, omega1, tau: as in `Scheme`.
        x0: (D,), the same on all; 0 if None.
        batch: samples of f_r an iteration; None: f_r itself. Ranks draw apart from each other.
        max_iter: iterations at most.
        tol: as in `admm`, over all ranks; None: 1e-8, with a batch none.
        seed: of the samples.
        group: process group; the default one if None.

    Returns:
        scipy's OptimizeResult, the same on all ranks but for `x_local` and `u`: x = z (D,), nit,
        residual = √Σ‖x_r − z‖², grad_norm = √Σ‖f_r'(x_r) + ρu_r‖²,
        success, message.

    Raises:
        ValueError: an argument out of range.
    """
    scheme = Scheme(rho=rho, alpha=alpha, omega1=omega1, tau=tau)
    if batch is not None and (batch < 1 or tol is not None):
        raise ValueError(f"batch must be at least 1 and excludes tol, got {batch} and tol = {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    ranks = _Ranks(group)
    size = f.dimension
    z = np.zeros(size) if x0 is None else np.array(x0, dtype=np.float64)
    if z.shape != (size,):
        raise ValueError(f"x0 must have shape ({size},), got {z.shape}")
    iterate = _Local(f, g, scheme, ranks)
    rng = np.random.default_rng(derive(seed, "consensus", ranks.rank))
    state = (z.copy(), z, np.zeros(size))
    limit = 0.0 if batch is not None else 1e-8 if tol is None else tol
    done, finite, k = False, True, 0
    while k < max_iter and finite and not done:
        state = iterate(state, None if batch is None else f.draw(rng, batch))
        k += 1
        residual, slope, dual = iterate.residuals(state)
        finite = residual + slope < 1e100  # else it has diverged; False for NaN too
        near = residual <= limit * (1 + ranks.count**0.5 * float(np.linalg.norm(state[1])))
        done = batch is None and near and slope <= limit * (1 + dual)
    message = f"{k} iterations are made"
    if done:
        message = f"residual and gradient are within tol = {limit:g}"
    elif not finite:
        message = f"x left all bounds by iteration {k}; take a larger tau or rho"
    return OptimizeResult(
        x=state[1],
        x_local=state[0],
        u=state[2],
        nit=k,
        residual=residual,
        grad_norm=slope,
        n_ifo={"df": k * (f.samples if batch is None else batch)},
        success=done or (batch is not None and finite),
        message=message,
    )


class _Ranks:
    """Sums over the ranks of a group; one rank alone without torch.distributed."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self._shared = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size(group) if self._shared else 1
        self.rank = dist.get_rank(group) if self._shared else 0

    def sum(self, values: FloatArray) -> FloatArray:
        """The same bytes on all ranks."""
        if not self._shared:
            return values
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        dist.all_reduce(total, group=self._group)
        return total.numpy()


class _Local:
    """This rank's part of an iteration; a state is (x_r, z, u_r)."""

    def __init__(self, f: SmoothTerm, g: Penalty, scheme: Scheme, ranks: _Ranks) -> None:
        self.f, self.g, self.scheme, self.ranks = f, g, scheme, ranks
        K = (scheme.rho + scheme.tau) * np.eye(f.dimension)
        self.solve = f.solver(1 - scheme.omega1, K)

    def __call__(self, state: _State, xi: Any) -> _State:
        x, z, u = state
        rho, alpha, omega1, ranks = (
            self.scheme.rho, self.scheme.alpha, self.scheme.omega1, self.ranks.count,
        )  # fmt: skip
        q = rho * (u - z) - self.scheme.tau * x
        if omega1:
            q = q + omega1 * self.f.gradient(x, xi)
        x = self.solve(q, xi, x)
        relaxed = alpha * x + (1 - alpha) * z
        z = self.g.prox(self.ranks.sum(relaxed + u) / ranks, 1 / (ranks * rho))
        return x, z, u + relaxed - z

    def residuals(self, state: _State) -> tuple[float, float, float]:
        """√Σ‖x_r − z‖², √Σ‖f_r'(x_r) + ρu_r‖² and √Σ‖ρu_r‖²."""
        x, z, u = state
        dual = self.scheme.rho * u
        slope = self.f.gradient(x) + dual
        parts = np.array([np.sum((x - z) ** 2), slope @ slope, dual @ dual])
        residual, gradient, size = np.sqrt(self.ranks.sum(parts))
        return float(residual), float(gradient), float(size)
