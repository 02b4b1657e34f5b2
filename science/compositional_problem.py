"""Problems min f(g(x)) with g and f means of samples, and the oracles that the methods call.

Shape legend: D variables, L width of g, B samples of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Draw = Callable[[int, torch.Generator], Any]


class Batch(NamedTuple):
    """What a callable of the problem gets as `rows`, and how many samples that is."""

    rows: Any
    size: int


@dataclass(frozen=True)
class Smoothness:
    """Constants of arXiv 1912.13515's assumptions: Lipschitz bounds of g_j, ∂g_j, f_i, ∇f_i.

    Args:
        g: M_g ≥ ‖∂g_j(x)‖.
        dg: L_g, of x ↦ ∂g_j(x).
        f: M_f ≥ ‖∇f_i(y)‖.
        df: L_f, of y ↦ ∇f_i(y).

    Raises:
        ValueError: a constant is negative or not finite, or all bounds of a term are 0.
    """

    g: float
    dg: float
    f: float
    df: float

    def __post_init__(self) -> None:
        for name in ("g", "dg", "f", "df"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"smoothness.{name} must be finite and at least 0, got {value!r}")
        if self.squared == 0:
            raise ValueError("all constants are 0, so that no step would be too long; give lr=")

    @property
    def squared(self) -> float:
        """M_g⁴ L_f² + M_f² L_g², which the step of the finite-sum theorem holds."""
        return self.g**4 * self.df**2 + self.f**2 * self.dg**2


class CompositionalProblem:
    """min over x of Φ(x) = f(g(x)), g = mean_j g_j : R^D → R^L and f = mean_i f_i : R^L → R.

    (1/n) Σ_i f_i((1/m) Σ_j g_j(x)), or E_v f_v(E_w g_w(x)) for a problem without counts (online).

    Args:
        inner: (x (D,), rows) ↦ (B, L), the values g_j(x) of the samples `rows`: in a finite sum a
            (B,) int64 tensor of indices, online whatever `draw_inner` gave.
        outer: (y (L,), rows) ↦ (B,), the values f_i(y).
        inner_count, outer_count: m and n of a finite sum, at least 1. Leave both out for an online
            problem.
        draw_inner, draw_outer: (size, torch.Generator) ↦ rows, of an online problem.
        inner_jacobian: (x, rows) ↦ (L, D), the MEAN of ∂g_j(x) over the rows; autograd's if None.
        outer_gradient: (y, rows) ↦ (L,), the MEAN of ∇f_i(y) over the rows; autograd's if None.
        smoothness: constants for the theory's step.
        optimum: Φ* where it is known, for gaps.

    Raises:
        ValueError: counts below 1, or neither both counts nor both draws.
    """

    def __init__(
        self,
        inner: Callable[[Tensor, Any], Tensor],
        outer: Callable[[Tensor, Any], Tensor],
        *,
        inner_count: int | None = None,
        outer_count: int | None = None,
        draw_inner: Draw | None = None,
        draw_outer: Draw | None = None,
        inner_jacobian: Callable[[Tensor, Any], Tensor] | None = None,
        outer_gradient: Callable[[Tensor, Any], Tensor] | None = None,
        smoothness: Smoothness | None = None,
        optimum: float | None = None,
    ) -> None:
        counts = (inner_count, outer_count)
        draws = (draw_inner, draw_outer)
        finite = None not in counts and draws == (None, None)
        online = counts == (None, None) and None not in draws
        if not finite and not online:
            raise ValueError(
                "give inner_count and outer_count (a finite sum), or draw_inner and draw_outer "
                f"(online); got counts {counts} and draws {draws}"
            )
        if (
            inner_count is not None
            and outer_count is not None
            and min(inner_count, outer_count) < 1
        ):
            raise ValueError(f"inner_count and outer_count must be at least 1, got {counts}")
        self.inner, self.outer = inner, outer
        self.inner_count, self.outer_count = inner_count, outer_count
        self._draws = draws
        self._jacobian, self._gradient = inner_jacobian, outer_gradient
        self.smoothness, self.optimum = smoothness, optimum
        self._width: int | None = None  # L, once g was asked for

    @classmethod
    def from_samples(
        cls,
        inner: Callable[[Tensor, Any], Tensor],
        outer: Callable[[Tensor, Any], Tensor],
        inner_data: Tensor,
        outer_data: Tensor,
        **options: Any,
    ) -> CompositionalProblem:
        """A finite sum from functions of one sample: g(x, a_j) ↦ (L,) and f(y, b_i) ↦ ().

        Args:
            inner, outer: written in torch operations that `torch.func.vmap` takes.
            inner_data, outer_data: (m, ...) and (n, ...), the a_j and b_i.
            options: of `CompositionalProblem`.
        """
        g_all = torch.func.vmap(inner, in_dims=(None, 0))
        f_all = torch.func.vmap(outer, in_dims=(None, 0))
        return cls(
            lambda x, rows: g_all(x, inner_data[rows]),
            lambda y, rows: f_all(y, outer_data[rows]),
            inner_count=len(inner_data),
            outer_count=len(outer_data),
            **options,
        )

    @property
    def finite(self) -> bool:
        """Whether Φ is a finite sum."""
        return self.inner_count is not None

    def draw(self, which: int, size: int, generator: torch.Generator) -> Batch:
        """`size` samples of g (which = 0) or f (1).

        With replacement, except that a batch as large as the sum takes every sample once.
        """
        count = (self.inner_count, self.outer_count)[which]
        draw = self._draws[which]
        if draw is not None:
            return Batch(draw(size, generator), size)
        assert count is not None
        if size >= count:
            return Batch(torch.arange(count), count)
        return Batch(torch.randint(count, (size,), generator=generator), size)

    def value(self, x: Tensor, batch: Batch) -> Tensor:
        """(L,) mean of g_j(x) over the batch."""
        values = self.inner(x, batch.rows)
        if values.ndim != 2 or len(values) != batch.size:
            raise ValueError(
                f"inner must return one row a sample, ({batch.size}, L), got {tuple(values.shape)}"
            )
        self._width = values.shape[1]
        return values.mean(0)

    def jacobian(self, x: Tensor, batch: Batch) -> Tensor:
        """(L, D) mean of ∂g_j(x) over the batch."""
        if self._jacobian is not None:
            return self._given_jacobian(self._jacobian, x, batch)
        jacobian: Tensor = torch.func.jacrev(lambda point: self.value(point, batch))(x)
        return jacobian

    def pullback(self, x: Tensor, batch: Batch, cotangent: Tensor) -> Tensor:
        """(D,) mean of ∂g_j(x)ᵀ v over the batch, for v (L,), without the Jacobian if it can."""
        if self._jacobian is not None:
            return self._given_jacobian(self._jacobian, x, batch).T @ cotangent
        pair: Any = torch.func.vjp(lambda point: self.value(point, batch), x)
        product: Tensor = pair[1](cotangent)[0]
        return product

    def _given_jacobian(
        self, function: Callable[[Tensor, Any], Tensor], x: Tensor, batch: Batch
    ) -> Tensor:
        matrix = function(x, batch.rows)
        width = len(self.value(x, batch)) if self._width is None else self._width
        if matrix.shape != (width, len(x)):
            raise ValueError(
                f"inner_jacobian must return the mean over the rows, (L, D) = {(width, len(x))}, "
                f"got {tuple(matrix.shape)}"
            )
        return matrix

    def outer_value(self, y: Tensor, batch: Batch) -> Tensor:
        """() mean of f_i(y) over the batch."""
        values = self.outer(y, batch.rows)
        if values.shape != (batch.size,):
            raise ValueError(
                f"outer must return one number a sample, ({batch.size},), got {tuple(values.shape)}"
            )
        return values.mean()

    def outer_gradient(self, y: Tensor, batch: Batch) -> Tensor:
        """(L,) mean of ∇f_i(y) over the batch."""
        if self._gradient is not None:
            given = self._gradient(y, batch.rows)
            if given.shape != y.shape:
                raise ValueError(
                    f"outer_gradient must return the mean over the rows, (L,) = {tuple(y.shape)}, "
                    f"got {tuple(given.shape)}"
                )
            return given
        gradient: Tensor = torch.func.grad(lambda point: self.outer_value(point, batch))(y)
        return gradient

    def monitor(self, samples: int, seed: int) -> Callable[[Tensor], tuple[float, Tensor]]:
        """x ↦ (Φ(x), ∇Φ(x)): exact in a finite sum, else on `samples` fixed draws of each level."""
        generator = torch.Generator().manual_seed(seed)
        size = samples if not self.finite else max(self.inner_count or 0, self.outer_count or 0)
        inner, outer = self.draw(0, size, generator), self.draw(1, size, generator)

        def evaluate(x: Tensor) -> tuple[float, Tensor]:
            y = self.value(x, inner)
            gradient = self.pullback(x, inner, self.outer_gradient(y, outer))
            return float(self.outer_value(y, outer)), gradient

        return evaluate
