"""Smooth terms from two functions in torch, with noise that enters linearly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.science.admm_terms import FloatArray, SmoothTerm


class NoisyFunction(SmoothTerm):
    """f'(x, ξ) = f'(x) + σ(x) ξ from two functions in torch, E ξ = 0, Cov ξ = I.

    Args:
        dimension: D.
        value: (D,) ↦ (), f(x), twice differentiable by `torch.func`.
        noise: (D,) ↦ (D, K), σ(x).
        noise_dimension: K.
        law: of ξ: "normal", or "rademacher" for ±1.

    Raises:
        ValueError: an unknown law, or a size below 1.
    """

    def __init__(
        self,
        dimension: int,
        value: Callable[[Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        noise_dimension: int = 1,
        law: str = "normal",
    ) -> None:
        if law not in ("normal", "rademacher"):
            raise ValueError(f"law must be 'normal' or 'rademacher', got {law!r}")
        if min(dimension, noise_dimension) < 1:
            raise ValueError(f"sizes must be at least 1, got {dimension} and {noise_dimension}")
        self.dimension, self.noise_dimension, self.law = dimension, noise_dimension, law
        self._value, self._noise = value, noise
        slope = torch.func.grad(value)

        def sampled(x: Tensor, xi: Tensor) -> Tensor:
            result: Tensor = slope(x) + noise(x) @ xi
            return result

        self._sampled, self._curve = sampled, torch.func.jacrev(sampled)

    def _xi(self, xi: Any) -> Tensor:
        return torch.as_tensor(np.zeros(self.noise_dimension) if xi is None else xi)

    def value(self, x: FloatArray, xi: Any = None) -> float:
        """f(x); with a ξ there is no potential if σ is no gradient, so it is refused.

        Raises:
            ValueError: with a ξ.
        """
        if xi is not None:
            raise ValueError("a NoisyFunction has no sampled value; use its gradient")
        return float(self._value(torch.from_numpy(x)))

    def gradient(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D,)."""
        return np.asarray(self._sampled(torch.from_numpy(x), self._xi(xi)))

    def hessian(self, x: FloatArray, xi: Any = None) -> FloatArray:
        """(D, D), the Jacobian of the sampled gradient."""
        return np.asarray(self._curve(torch.from_numpy(x), self._xi(xi)))

    def draw(self, rng: np.random.Generator, batch: int) -> FloatArray:
        """(K,) mean of `batch` samples."""
        normal = rng.standard_normal((batch, self.noise_dimension))
        return np.asarray((np.sign(normal) if self.law == "rademacher" else normal).mean(0))

    def gradient_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D)."""
        slopes: Tensor = torch.func.vmap(torch.func.grad(self._value))(x_PD)
        return slopes

    def noise_paths(self, x_PD: Tensor) -> Tensor:
        """(P, D, K)."""
        return torch.func.vmap(self._noise)(x_PD)

    def hessian_paths(self, x_PD: Tensor, xi_PK: Tensor) -> Tensor:
        """(P, D, D) Jacobians of the sampled gradients."""
        curves: Tensor = torch.func.vmap(self._curve)(x_PD, xi_PK)
        return curves

    def _newton(
        self, weight: float, K: FloatArray, q: FloatArray, xi: Any, start: FloatArray
    ) -> FloatArray:
        x = start.copy()  # plain Newton: there is no objective to search along
        for _ in range(100):
            slope = weight * self.gradient(x, xi) + K @ x + q
            step = np.linalg.solve(weight * self.hessian(x, xi) + K, slope)
            x = x - step
            if np.abs(step).max() <= 1e-14 * (1 + np.abs(x).max()):
                return np.asarray(x)
        raise ValueError("Newton's method for the x-update did not end in 100 steps; raise rho")
