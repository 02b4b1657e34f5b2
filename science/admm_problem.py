"""min f(x) + g(Ax): penalties, difference matrices, the problem, and the scheme with its checks.

Shape legend: D variables, M rows of A.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparring.science.admm_terms import (
    ArrayOrTensor,
    FloatArray,
    Quadratic,
    SmoothTerm,
    finite_array,
)


class Penalty(ABC):
    """g, convex and separable, with a prox; works on numpy arrays and torch tensors alike."""

    smooth = True

    def __init__(self, beta: npt.ArrayLike) -> None:
        self.beta = np.asarray(beta, dtype=np.float64)
        if self.beta.ndim > 1 or not np.isfinite(self.beta).all() or (self.beta < 0).any():
            raise ValueError(
                f"beta must be a number or a vector, finite and at least 0, got {beta!r}"
            )

    def _beta(self, like: Any) -> Any:
        return torch.as_tensor(self.beta).to(like) if isinstance(like, Tensor) else self.beta

    @abstractmethod
    def value(self, z: FloatArray) -> float:
        """g(z)."""

    @abstractmethod
    def prox(self, v: ArrayOrTensor, step: float) -> ArrayOrTensor:
        """argmin_z g(z) + ‖z − v‖² / (2 step), in the shape of v (..., M)."""

    @abstractmethod
    def gradient(self, z: ArrayOrTensor) -> ArrayOrTensor:
        """g'(z), in the shape of z (..., M).

        Raises:
            ValueError: g is not differentiable.
        """

    @abstractmethod
    def curvature(self, z: FloatArray) -> FloatArray:
        """(M,) the diagonal of g''(z)."""


class Ridge(Penalty):
    """g(z) = ½ Σ β_i z_i²; β a number or (M,), at least 0 (0 is no penalty)."""

    def value(self, z: FloatArray) -> float:
        """g(z)."""
        return float(np.sum(self.beta * z**2) / 2)

    def prox(self, v: ArrayOrTensor, step: float) -> ArrayOrTensor:
        """v / (1 + step β)."""
        shrunk: ArrayOrTensor = v / (1 + step * self._beta(v))
        return shrunk

    def gradient(self, z: ArrayOrTensor) -> ArrayOrTensor:
        """β z."""
        slope: ArrayOrTensor = self._beta(z) * z
        return slope

    def curvature(self, z: FloatArray) -> FloatArray:
        """β."""
        return np.broadcast_to(self.beta, z.shape).astype(np.float64)


class L1(Penalty):
    """g(z) = Σ β_i |z_i|; not differentiable, so that the SDE's theorem does not cover it."""

    smooth = False

    def value(self, z: FloatArray) -> float:
        """g(z)."""
        return float(np.sum(self.beta * np.abs(z)))

    def prox(self, v: ArrayOrTensor, step: float) -> ArrayOrTensor:
        """v − clip(v, −step β, step β)."""
        bound = step * self._beta(v)
        shrunk: ArrayOrTensor = v - v.clip(-bound, bound)
        return shrunk

    def gradient(self, z: ArrayOrTensor) -> ArrayOrTensor:
        """None exists at 0."""
        raise ValueError("the l1 penalty has no gradient at 0; use Huber(beta, delta)")

    def curvature(self, z: FloatArray) -> FloatArray:
        """None exists at 0."""
        raise ValueError("the l1 penalty has no curvature at 0; use Huber(beta, delta)")


class Huber(Penalty):
    """l1 made smooth: β_i z_i² / (2δ) where |z_i| ≤ δ, else β_i (|z_i| − δ/2).

    Args:
        beta: a number or (M,), at least 0.
        delta: width of the smooth part, positive.
    """

    def __init__(self, beta: npt.ArrayLike, delta: float) -> None:
        super().__init__(beta)
        if not (math.isfinite(delta) and delta > 0):
            raise ValueError(f"delta must be positive, got {delta!r}")
        self.delta = delta

    def value(self, z: FloatArray) -> float:
        """g(z)."""
        size = np.abs(z)
        bent = np.where(size <= self.delta, z**2 / (2 * self.delta), size - self.delta / 2)
        return float(np.sum(self.beta * bent))

    def prox(self, v: ArrayOrTensor, step: float) -> ArrayOrTensor:
        """v less step g' at the result: linear inside, soft thresholding outside."""
        bound = step * self._beta(v)
        shrunk: ArrayOrTensor = v - (v * (bound / (self.delta + bound))).clip(-bound, bound)
        return shrunk

    def gradient(self, z: ArrayOrTensor) -> ArrayOrTensor:
        """β clip(z/δ, −1, 1)."""
        slope: ArrayOrTensor = self._beta(z) * (z / self.delta).clip(-1, 1)
        return slope

    def curvature(self, z: FloatArray) -> FloatArray:
        """β/δ where |z| < δ, else 0."""
        return np.asarray(self.beta / self.delta * (np.abs(z) < self.delta))


def difference_matrix(size: int, order: int = 1) -> FloatArray:
    """(size − order, size) finite differences, for total variation and trend filtering.

    Raises:
        ValueError: order below 1 or not below size.
    """
    if not 1 <= order < size:
        raise ValueError(f"order must be in [1, size), got {order} for size {size}")
    return np.asarray(np.diff(np.eye(size), n=order, axis=0))


class AdmmProblem:
    """min over x of V(x) = f(x) + g(Ax).

    Args:
        f: smooth term of D variables.
        g: penalty.
        A: (M, D); the identity if None.

    Raises:
        ValueError: A is no matrix with D columns, or β of g has another length than A rows.
    """

    def __init__(self, f: SmoothTerm, g: Penalty, A: npt.ArrayLike | None = None) -> None:
        self.f, self.g = f, g
        self.A = np.eye(f.dimension) if A is None else finite_array("A", A, 2)
        if self.A.shape[1] != f.dimension:
            raise ValueError(
                f"A must have shape (M, {f.dimension}) for f of {f.dimension} variables, got "
                f"{self.A.shape}" + ("; transpose it" if len(self.A) == f.dimension else "")
            )
        if g.beta.ndim and len(g.beta) != len(self.A):
            raise ValueError(
                f"beta has {len(g.beta)} entries, A {len(self.A)} rows; make them equal"
            )

    def value(self, x: FloatArray) -> float:
        """V(x)."""
        return self.f.value(x) + self.g.value(self.A @ x)

    def gradient(self, x: FloatArray) -> FloatArray:
        """(D,) ∇V(x), for a differentiable g."""
        return np.asarray(self.f.gradient(x) + self.A.T @ self.g.gradient(self.A @ x))

    def hessian(self, x: FloatArray) -> FloatArray:
        """(D, D) V''(x), for a differentiable g."""
        bend = self.g.curvature(self.A @ x)
        return np.asarray(self.f.hessian(x) + (self.A.T * bend) @ self.A)

    @property
    def linear(self) -> bool:
        """Whether f is a `Quadratic` and g a `Ridge`: everything Gaussian has a closed form."""
        return isinstance(self.f, Quadratic) and isinstance(self.g, Ridge)


def quadratic(
    H: npt.ArrayLike,
    b: npt.ArrayLike,
    S: npt.ArrayLike | None = None,
    beta: npt.ArrayLike = 0.0,
    A: npt.ArrayLike | None = None,
) -> AdmmProblem:
    """½ xᵀHx − (b + Sξ)ᵀx + ½ β ‖Ax‖², see `Quadratic` and `Ridge`."""
    return AdmmProblem(Quadratic(H, b, S), Ridge(beta), A)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Which ADMM: penalty ρ, relaxation α, explicitness ω and ω1, proximal weight τ.

    Standard: ω = ω1 = 0 and τ = 0. Linearised: ω = 1, τ > 0. Gradient-based: ω = ω1 = 1, τ > 0.

    Args:
        rho: positive; 1/ρ = ε is the SDE's time of one iteration.
        alpha: in (0, 2); above 1 is over-relaxation.
        omega, omega1: in [0, 1], how much of the penalty and of f enters by its gradient only.
        tau: at least 0; c = τ/ρ.

    Raises:
        ValueError: a number out of its range.
    """

    rho: float
    alpha: float = 1.0
    omega: float = 0.0
    omega1: float = 0.0
    tau: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"rho must be positive and finite, got {self.rho!r}")
        if not 0 < self.alpha < 2:
            raise ValueError(
                f"alpha must be in (0, 2), got {self.alpha!r}: the residual is multiplied by "
                "1 − alpha in every iteration; 1 is no relaxation, 1.5 a usual choice"
            )
        for name, value in (("omega", self.omega), ("omega1", self.omega1)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if not (math.isfinite(self.tau) and self.tau >= 0):
            raise ValueError(f"tau must be finite and at least 0, got {self.tau!r}")

    @property
    def eps(self) -> float:
        """1/ρ."""
        return 1 / self.rho

    @property
    def c(self) -> float:
        """τ/ρ, which stays fixed when ρ grows."""
        return self.tau / self.rho

    def at(self, rho: float) -> Scheme:
        """The same α, ω, ω1 and c at another ρ."""
        return Scheme(
            rho=rho, alpha=self.alpha, omega=self.omega, omega1=self.omega1, tau=self.c * rho
        )

    def check(self, A: FloatArray) -> None:
        """Refuse schemes whose residual Ax − z grows by itself.

        Over one iteration and to leading order in 1/ρ its part along an eigenvector of AAᵀ is
        multiplied by (1 − α)(1 − λ/(c + (1 − ω)λ)), which must be below 1 in absolute value.

        Raises:
            ValueError: it is not, for an eigenvalue λ, which is named with what c must be.
        """
        eigenvalues = np.linalg.svd(A, compute_uv=False) ** 2
        for lam in eigenvalues[eigenvalues > 1e-12 * eigenvalues.max(initial=0)]:
            below = self.c + (1 - self.omega) * lam
            given = f"alpha = {self.alpha}, omega = {self.omega}, c = tau/rho = {self.c:.6g}"
            if below <= 0:
                raise ValueError(
                    f"{given} leave nothing that holds the x-update along λ = {lam:.6g} of AAᵀ: "
                    "c + (1 − omega) λ must be positive; give tau > 0"
                )
            mode = (1 - self.alpha) * (1 - lam / below)
            if abs(mode) >= 1 - 1e-12:
                if self.alpha > 1:
                    bound = lam * (self.alpha - 1) / self.alpha
                else:
                    bound = lam * (1 - self.alpha) / (2 - self.alpha)
                least = bound - (1 - self.omega) * lam
                raise ValueError(
                    f"{given} are unstable: λ = {lam:.6g} of AAᵀ gives |(1 − alpha)(1 − λ/(c + "
                    f"(1 − omega) λ))| = {abs(mode):.4g}, which must be below 1; take tau > "
                    f"{least * self.rho:.6g} (c > {least:.6g})"
                )
