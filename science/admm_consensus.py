"""Consensus ADMM: every rank holds its own loss, all agree on one x (A stacks identities)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from scipy.optimize import OptimizeResult

from sparring.launch.seeds import derive
from sparring.science.admm_problem import AdmmProblem, Penalty, Scheme
from sparring.science.admm_terms import FloatArray, SmoothTerm, point

_State = tuple[FloatArray, FloatArray, FloatArray]


def consensus_admm(
    f: SmoothTerm | Sequence[SmoothTerm],
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
    callback: Callable[[int, FloatArray, float], None] | None = None,
) -> OptimizeResult:
    """min Σ_r f_r(x) + g(x), each rank calling with its own f_r and the same other arguments.

        x_r⁺ = argmin (1 − ω1) f_r(x, ξ) + ω1 ⟨f_r'(x_r, ξ), x⟩ + ρ/2 ‖x − z + u_r‖²
                      + τ/2 ‖x − x_r‖²
        z⁺   = argmin g(z) + Rρ/2 ‖z − mean_r(x̂_r + u_r)‖²,   x̂_r = α x_r⁺ + (1 − α) z
        u_r⁺ = u_r + x̂_r − z⁺

    (Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011, section 7,
    with relaxation.) Two all-reduces an iteration, of D and of 2 float64 numbers, and one more
    where it may be done; data never travel. With n_r of n rows each, f_r = LeastSquares(rows,
    targets, weight=n_r / n) gives the mean over all rows. R counts losses, not ranks: a rank may
    hold several, and dealt out in turn (rank k of W with f_k, f_{k+W}, …) they take the same steps
    on any number of ranks.
    Without torch.distributed it runs alone.

    Args:
        f: this rank's loss or losses; D must be the same on all.
        g: penalty, the same on all.
        rho, alpha, omega1, tau: as in `Scheme`.
        x0: (D,), the same on all; 0 if None.
        batch: samples of f_r an iteration; None: f_r itself. Each f_r draws on its own.
        max_iter: iterations at most.
        tol: as in `admm`, over all ranks; None: 1e-8, with a batch none.
        seed: of the samples.
        group: process group; the default one if None.
        callback: called after every iteration with its number, z and the residual.

    Returns:
        scipy's OptimizeResult, the same on all ranks but for `x_local` and `u`, a row for each of
        the rank's losses (without rows for a single one): x = z (D,), nit,
        residual = √Σ‖x_r − z‖², grad_norm = √Σ‖f_r'(x_r) + ρu_r‖²,
        n_ifo as that of `admm`, of the rank's losses, success, message. With a batch grad_norm is
        computed at the end only, since it takes all of the data.

    Raises:
        ValueError: an argument out of range or of the wrong shape.
    """
    scheme = Scheme(rho=rho, alpha=alpha, omega1=omega1, tau=tau)
    if batch is not None and (batch < 1 or tol is not None):
        raise ValueError(f"batch must be at least 1 and excludes tol, got {batch} and tol = {tol}")
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    parts = [f] if isinstance(f, SmoothTerm) else list(f)
    if not parts:
        raise ValueError("f is empty: give every rank at least one loss")
    ranks = _Ranks(group, len(parts))
    size = parts[0].dimension
    for part in parts:
        AdmmProblem(part, g, np.eye(size))  # for its checks of D and of beta
    z = np.zeros(size) if x0 is None else point("x0", x0, size)
    iterate = _Local(parts, g, scheme, ranks, batch)
    rngs = [np.random.default_rng(derive(seed, "consensus", n)) for n in ranks.numbers]
    state = (np.tile(z, (len(parts), 1)), z, np.zeros((len(parts), size)))
    limit = 0.0 if batch is not None else 1e-8 if tol is None else tol
    done, finite, k = False, True, 0
    while k < max_iter and finite and not done:
        draws: list[Any] = [None] * len(parts)
        if batch is not None:
            draws = [part.draw(rng, batch) for part, rng in zip(parts, rngs, strict=True)]
        state = iterate(state, draws)
        k += 1
        residual, dual = iterate.residuals(state)
        finite = residual + dual < 1e100  # else it has diverged; False for NaN too
        near = residual <= limit * (1 + ranks.losses**0.5 * float(np.linalg.norm(state[1])))
        done = batch is None and near and iterate.slope(state) <= limit * (1 + dual)
        if callback is not None and finite:
            callback(k, state[1], residual)
    single = isinstance(f, SmoothTerm)
    return OptimizeResult(
        x=state[1],
        x_local=state[0][0] if single else state[0],
        u=state[2][0] if single else state[2],
        nit=k,
        residual=residual,
        grad_norm=iterate.slope(state),
        n_ifo=dict(iterate.calls),
        success=done or (batch is not None and finite),
        message=_message(k, limit, done=done, finite=finite),
    )


def _message(k: int, tol: float, *, done: bool, finite: bool) -> str:
    """Why a run ended."""
    if done:
        return f"residual and gradient are within tol = {tol:g}"
    if not finite:
        return f"x left all bounds by iteration {k}; take a larger tau or rho"
    return f"{k} iterations are made"


class _Ranks:
    """Sums over the ranks of a group; one rank alone without torch.distributed."""

    def __init__(self, group: Any, here: int) -> None:
        self._group = group
        self._shared = dist.is_available() and dist.is_initialized()
        count = dist.get_world_size(group) if self._shared else 1
        rank = dist.get_rank(group) if self._shared else 0
        self.losses = int(self.sum(np.array([float(here)]))[0])
        """On all ranks."""
        self.numbers = [rank + count * n for n in range(here)]
        """Of this rank's losses among all."""

    def sum(self, values: FloatArray) -> FloatArray:
        """The same bytes on all ranks."""
        if not self._shared:
            return values
        total = torch.from_numpy(np.array(values, dtype=np.float64)).to(self._device())
        dist.all_reduce(total, group=self._group)
        return np.asarray(total.cpu().numpy())

    def _device(self) -> str:
        """Where the backend reduces: NCCL knows no tensors on the CPU."""
        return "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"


class _Local:
    """This rank's part of an iteration; a state is (x (P, D), z (D,), u (P, D)) of P losses."""

    def __init__(
        self,
        parts: Sequence[SmoothTerm],
        g: Penalty,
        scheme: Scheme,
        ranks: _Ranks,
        batch: int | None,
    ) -> None:
        self.g, self.scheme, self.ranks, self.uncounted = g, scheme, ranks, parts
        self.calls = {"df": 0, "d2f": 0}
        self.parts = [part.counted(self.calls, batch) for part in parts]
        K = (scheme.rho + scheme.tau) * np.eye(parts[0].dimension)
        self.solves = [part.solver(1 - scheme.omega1, K) for part in self.parts]

    def __call__(self, state: _State, draws: Sequence[Any]) -> _State:
        before, z, u = state
        rho, alpha, omega1 = self.scheme.rho, self.scheme.alpha, self.scheme.omega1
        x = np.empty_like(before)
        for n, (part, solve, xi) in enumerate(zip(self.parts, self.solves, draws, strict=True)):
            q = rho * (u[n] - z) - self.scheme.tau * before[n]
            if omega1:
                q = q + omega1 * part.gradient(before[n], xi)
            x[n] = solve(q, xi, before[n])
        relaxed = alpha * x + (1 - alpha) * z
        count = self.ranks.losses
        z = self.g.prox(self.ranks.sum((relaxed + u).sum(0)) / count, 1 / (count * rho))
        return x, z, u + relaxed - z

    def residuals(self, state: _State) -> tuple[float, float]:
        """√Σ‖x_r − z‖² and √Σ‖ρu_r‖²."""
        x, z, u = state
        sums = np.array([np.sum((x - z) ** 2), np.sum((self.scheme.rho * u) ** 2)])
        residual, size = np.sqrt(self.ranks.sum(sums))
        return float(residual), float(size)

    def slope(self, state: _State) -> float:
        """√Σ‖f_r'(x_r) + ρu_r‖², from all of the data."""
        x, _, u = state
        slopes = np.stack([part.gradient(x[n]) for n, part in enumerate(self.uncounted)])
        square = np.sum((slopes + self.scheme.rho * u) ** 2)
        return float(np.sqrt(self.ranks.sum(np.array([square]))[0]))
