"""The two terms of min f(x) + g(Ax): smooth losses that are sampled, and penalties with a prox.

Shape legend: D variables, M rows of A, N samples, P paths, K dimensions of the noise.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import expit, log_expit
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
ArrayOrTensor = TypeVar("ArrayOrTensor", FloatArray, Tensor)
# q (D,), ξ, a start (D,) ↦ the minimiser of weight f(x, ξ) + ½ xᵀKx + qᵀx.
Solve = Callable[[FloatArray, Any, FloatArray], FloatArray]
Derivative = Callable[[FloatArray, Any], FloatArray]


def finite_array(name: str, values: npt.ArrayLike, ndim: int) -> FloatArray:
    """A float64 copy with `ndim` axes.

    Raises:
        ValueError: another number of axes, nothing in it, or entries that are not finite.
    """
    array = np.array(values, dtype=np.float64)
    if array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must have {ndim} axes and entries, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite; {np.sum(~np.isfinite(array))} entries are not")
    return array


def point(name: str, values: npt.ArrayLike, size: int) -> FloatArray:
    """A float64 copy of a finite vector (size,).

    Raises:
        ValueError: another shape, or entries that are not finite.
    """
    array = np.array(values, dtype=np.float64)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite of shape ({size},), got shape {array.shape} with "
            f"{np.sum(~np.isfinite(array))} entries that are not"
        )
    return array


def factor(matrix: FloatArray) -> tuple[FloatArray, bool]:
    """Cholesky factor of the x-update's matrix.

    Raises:
        ValueError: it is not positive definite.
    """
    try:
        factored: tuple[FloatArray, bool] = cho_factor(matrix)
    except LinAlgError:
        low = float(np.linalg.eigvalsh(matrix)[0])
        raise ValueError(
            "the x-update has no unique solution: (1 − ω1) f'' + (1 − ω) ρ AᵀA + τ I has the "
            f"eigenvalue {low:.3g}; give tau > 0, or an A of full column rank with omega < 1"
        ) from None
    # A matrix that is singular up to rounding may pass.
    diagonal = np.abs(np.diag(factored[0]))
    if diagonal.min() <= 1e-8 * diagonal.max():
        raise ValueError(
            "the x-update's matrix (1 − ω1) f'' + (1 − ω) ρ AᵀA + τ I is singular up to rounding "
            f"(Cholesky pivots from {diagonal.min():.3g} to {diagonal.max():.3g}); raise tau"
        )
    return factored


class SmoothTerm(ABC):
    """f(x) = E f(x, ξ), convex and twice differentiable; `draw` gives ξ, None stands for the mean.

    Subclasses have value, gradient and hessian; the last two also with a ξ.
    """

    dimension: int
    samples = 1  # what a gradient without ξ costs, in sample gradients

    @abstractmethod
    def value(self, x: FloatArray, xi: Any = None) -> float:
        """f(x) or f(x, ξ)."""

    @abstractmethod
    def gradient(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D,) f'(x) or f'(x, ξ)."""

    @abstractmethod
    def hessian(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D, D) f''(x) or f''(x, ξ)."""

    def draw(self, rng: np.random.Generator, batch: int) -> Any:
        """ξ of a batch of samples."""
        raise NotImplementedError

    def counted(self, calls: dict[str, int], batch: int | None) -> SmoothTerm:
        """A copy that adds to calls["df"] and calls["d2f"] the samples whose gradient or Hessian
        it is asked for, by its `solver` too: `batch` with a ξ, all without."""
        copied = copy.copy(self)

        def tallied(kind: str, derivative: Derivative) -> Derivative:
            def asked(x: FloatArray, xi: Any = None) -> FloatArray:
                calls[kind] += self.samples if xi is None or batch is None else batch
                return derivative(x, xi)

            return asked

        # In the copy's dictionary, where its methods find them before those of the class.
        vars(copied).update(
            gradient=tallied("df", self.gradient), hessian=tallied("d2f", self.hessian)
        )
        return copied

    def noise(self, x: FloatArray) -> FloatArray:
        """(D, K) a factor σ(x) of the covariance σσᵀ of f'(x, ξ), one sample."""
        return self.noise_paths(torch.from_numpy(np.asarray(x, np.float64))[None])[0].numpy()

    def gradient_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D) f'(x), in torch."""
        raise NotImplementedError

    def noise_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D, K) σ(x), in torch."""
        raise NotImplementedError

    def noise_times(self, x_PD: Tensor, xi_PK: Tensor) -> Tensor:
        """(P, D) σ(x) ξ, for subclasses to do without the (P, D, K) factor."""
        return (self.noise_paths(x_PD) @ xi_PK[:, :, None])[:, :, 0]

    def solver(self, weight: float, K: FloatArray) -> Solve:
        """The minimiser of weight f(x, ξ) + ½ xᵀKx + qᵀx, as a function of q, ξ and a start.

        Raises:
            ValueError: here or when called, where there is no unique one.
        """
        if weight == 0:
            factored = factor(K)
            return lambda q, xi, start: np.asarray(cho_solve(factored, -q))

        def newton(q: FloatArray, xi: Any, start: FloatArray) -> FloatArray:
            return self._newton(weight, K, q, xi, start)

        return newton

    def _newton(
        self, weight: float, K: FloatArray, q: FloatArray, xi: Any, start: FloatArray
    ) -> FloatArray:
        x = start.copy()

        def objective(point: FloatArray) -> float:
            return weight * self.value(point, xi) + float(point @ K @ point / 2 + q @ point)

        for _ in range(100):
            slope = weight * self.gradient(x, xi) + K @ x + q
            step = cho_solve(factor(weight * self.hessian(x, xi) + K), slope)
            current, decrease, size = objective(x), float(slope @ step), 1.0
            # Close to the minimum the objective's rounding hides what a step gains.
            if decrease > 1e-9 * (1 + abs(current)):
                while objective(x - size * step) > current - 1e-4 * size * decrease:
                    size /= 2
            x = x - size * step
            if np.abs(step).max() <= 1e-13 * (1 + np.abs(x).max()):
                return np.asarray(x)
        raise ValueError(
            f"Newton's method for the x-update did not end in 100 steps (last one {step}); is f "
            "convex?"
        )


class Quadratic(SmoothTerm):
    """f(x, ξ) = ½ xᵀHx − bᵀx − (Sξ)ᵀx with ξ ~ N(0, I_K): f'(x, ξ) = Hx − b − Sξ.

    Args:
        H: (D, D), symmetric and positive semidefinite.
        b: (D,).
        S: (D, K), or None without noise.

    Raises:
        ValueError: wrong shapes, or H is not symmetric positive semidefinite.
    """

    def __init__(self, H: npt.ArrayLike, b: npt.ArrayLike, S: npt.ArrayLike | None = None) -> None:
        self.H, self.b = finite_array("H", H, 2), finite_array("b", b, 1)
        self.dimension = size = len(self.b)
        self.S = np.zeros((size, 1)) if S is None else finite_array("S", S, 2)
        if self.H.shape != (size, size) or len(self.S) != size:
            raise ValueError(
                f"b of {size} entries needs H {(size, size)} and S ({size}, K), got "
                f"{self.H.shape} and {self.S.shape}"
            )
        if not np.allclose(self.H, self.H.T):
            raise ValueError("H must be symmetric; take (H + Hᵀ)/2")
        low = float(np.linalg.eigvalsh(self.H)[0])
        if low < -1e-10 * max(1.0, float(np.abs(self.H).max())):
            raise ValueError(f"H must be positive semidefinite, it has the eigenvalue {low:.3g}")

    def _shift(self, xi: Any) -> FloatArray:
        return self.b if xi is None else self.b + self.S @ xi

    def value(self, x: FloatArray, xi: Any = None) -> float:
        """½ xᵀHx − (b + Sξ)ᵀx."""
        return float(x @ self.H @ x / 2 - self._shift(xi) @ x)

    def gradient(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D,) Hx − b − Sξ."""
        return np.asarray(self.H @ x - self._shift(xi))

    def hessian(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D, D) H."""
        return self.H

    def draw(self, rng: np.random.Generator, batch: int) -> FloatArray:
        """(K,) mean of `batch` standard normals."""
        return np.asarray(rng.standard_normal(self.S.shape[1]) / math.sqrt(batch))

    def gradient_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D)."""
        return x_PD @ torch.from_numpy(self.H).to(x_PD) - torch.from_numpy(self.b).to(x_PD)

    def noise_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D, K), the same S on every path: the law of −Sξ is that of Sξ."""
        return torch.from_numpy(-self.S).to(x_PD).expand(len(x_PD), -1, -1)

    def solver(self, weight: float, K: FloatArray) -> Solve:
        """As the base class's; one factorisation for all ξ."""
        if weight == 0:
            return super().solver(weight, K)
        origin = np.zeros(self.dimension)
        factored = factor(weight * self.hessian(origin) + K)

        def solve(q: FloatArray, xi: Any, start: FloatArray) -> FloatArray:
            return np.asarray(cho_solve(factored, -weight * self.gradient(origin, xi) - q))

        return solve


class _Rows(SmoothTerm):
    """A weighted mean over rows of data; ξ is a batch of row numbers, drawn with replacement."""

    def __init__(self, data_ND: npt.ArrayLike, target_N: npt.ArrayLike, weight: float) -> None:
        self.data = finite_array("data", data_ND, 2)
        self.target = finite_array("target", target_N, 1)
        self.samples, self.dimension = self.data.shape
        if len(self.target) != self.samples:
            raise ValueError(
                f"{self.samples} rows of data need as many targets, got {self.target.shape}"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight must be positive, got {weight!r}")
        self.weight = weight

    def _rows(self, xi: Any) -> tuple[FloatArray, FloatArray]:
        return (self.data, self.target) if xi is None else (self.data[xi], self.target[xi])

    def draw(self, rng: np.random.Generator, batch: int) -> npt.NDArray[np.int64]:
        """(batch,) row numbers."""
        return rng.integers(self.samples, size=batch)

    def _slopes(self, x_PD: Tensor) -> Tensor:
        """(P, N) derivative of each row's loss in ⟨a_n, x⟩, times the weight."""
        raise NotImplementedError

    def gradient_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D)."""
        return self._slopes(x_PD) @ torch.from_numpy(self.data).to(x_PD) / self.samples

    def noise_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D, N): centred gradients of the rows over √N, whose square is their covariance."""
        each = self._slopes(x_PD)[:, :, None] * torch.from_numpy(self.data).to(x_PD)
        return (each - each.mean(1, keepdim=True)).transpose(1, 2) / math.sqrt(self.samples)

    def noise_times(self, x_PD: Tensor, xi_PK: Tensor) -> Tensor:
        """(P, D): centring the gradients is centring ξ."""
        centred = xi_PK - xi_PK.mean(1, keepdim=True)
        product = (self._slopes(x_PD) * centred) @ torch.from_numpy(self.data).to(x_PD)
        return product / math.sqrt(self.samples)


class LeastSquares(_Rows):
    """f(x) = weight / (2N) Σ_n (⟨a_n, x⟩ − t_n)²; scikit-learn's Lasso has weight 1.

    Args:
        data_ND: (N, D).
        target_N: (N,).
        weight: positive.

    Raises:
        ValueError: shapes or the weight.
    """

    def __init__(
        self, data_ND: npt.ArrayLike, target_N: npt.ArrayLike, weight: float = 1.0
    ) -> None:
        super().__init__(data_ND, target_N, weight)

    def value(self, x: FloatArray, xi: Any = None) -> float:
        """f(x), or the mean over the rows ξ."""
        data, target = self._rows(xi)
        return float(self.weight * np.mean((data @ x - target) ** 2) / 2)

    def gradient(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D,)."""
        data, target = self._rows(xi)
        return np.asarray(self.weight * (data @ x - target) @ data / len(data))

    def hessian(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D, D)."""
        data, _ = self._rows(xi)
        return np.asarray(self.weight * data.T @ data / len(data))

    def _slopes(self, x_PD: Tensor) -> Tensor:
        data, target = torch.from_numpy(self.data).to(x_PD), torch.from_numpy(self.target).to(x_PD)
        return self.weight * (x_PD @ data.T - target)

    def solver(self, weight: float, K: FloatArray) -> Solve:
        """As the base class's; the factorisation of all rows is kept."""
        if weight == 0:
            return super().solver(weight, K)
        origin = np.zeros(self.dimension)
        kept: list[tuple[FloatArray, bool]] = []

        def solve(q: FloatArray, xi: Any, start: FloatArray) -> FloatArray:
            shift = -weight * self.gradient(origin, xi) - q
            if xi is not None:
                return np.asarray(cho_solve(factor(weight * self.hessian(origin, xi) + K), shift))
            if not kept:
                kept.append(factor(weight * self.hessian(origin) + K))
            return np.asarray(cho_solve(kept[0], shift))

        return solve


class Logistic(_Rows):
    """f(x) = weight / N Σ_n log(1 + exp(−t_n ⟨a_n, x⟩)) with labels t_n = ±1.

    Args:
        data_ND: (N, D).
        target_N: (N,), each −1 or 1.
        weight: positive.

    Raises:
        ValueError: shapes, labels or the weight.
    """

    def __init__(
        self, data_ND: npt.ArrayLike, target_N: npt.ArrayLike, weight: float = 1.0
    ) -> None:
        super().__init__(data_ND, target_N, weight)
        if not np.isin(self.target, (-1, 1)).all():
            raise ValueError("labels must be −1 or 1; for 0 and 1 pass 2 * labels − 1")

    def value(self, x: FloatArray, xi: Any = None) -> float:
        """f(x), or the mean over the rows ξ."""
        data, target = self._rows(xi)
        return float(-self.weight * np.mean(log_expit(target * (data @ x))))

    def gradient(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D,)."""
        data, target = self._rows(xi)
        return np.asarray(-self.weight * (target * expit(-target * (data @ x))) @ data / len(data))

    def hessian(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D, D)."""
        data, _ = self._rows(xi)
        bend = expit(data @ x) * expit(-(data @ x))
        return np.asarray(self.weight * (data.T * bend) @ data / len(data))

    def _slopes(self, x_PD: Tensor) -> Tensor:
        data, target = torch.from_numpy(self.data).to(x_PD), torch.from_numpy(self.target).to(x_PD)
        return -self.weight * target * torch.sigmoid(-target * (x_PD @ data.T))
