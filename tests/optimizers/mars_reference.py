"""MARS once more, in float64 numpy, from the formulas alone (specification §1.1 and §1.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def newton_schulz(matrix: Array, steps: int = 5) -> Array:
    """The quintic iteration by the singular values: U phi^5(S / |S|) V^T."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vh


class Reference:
    """One array. `step(x, g, h)` returns the new x; h is None for the approximate form."""

    def __init__(
        self,
        *,
        matrix: bool,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        variant: str = "adamw",
        optimize_1d: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float | None = None,
        amsgrad: bool = False,
        clip_c: bool = True,
    ) -> None:
        self.mars = matrix or optimize_1d
        self.variant = "adamw" if variant == "shampoo" and not matrix else variant
        self.lr, self.betas, self.decay = lr, betas, weight_decay
        if not self.mars:
            self.variant, self.betas = "adamw", betas_1d
            self.lr = lr / 2 if lr_1d is None else lr_1d
            self.decay = weight_decay if weight_decay_1d is None else weight_decay_1d
        self.eps, self.gamma, self.amsgrad, self.clip_c = eps, gamma, amsgrad, clip_c
        self.t = 0
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.v_max: Any = 0.0
        self.last: Any = 0.0

    def step(self, x: Array, g: Array, h: Array | None = None) -> Array:
        self.t += 1
        b1, b2 = self.betas
        c = g
        if self.mars:
            previous = self.last if h is None else h
            c = g + self.gamma * b1 / (1 - b1) * (g - previous)
            norm = np.sqrt((c**2).sum())
            if self.clip_c and norm > 1:
                c = c / norm
        self.last = g.copy()
        self.m = b1 * self.m + (1 - b1) * c
        if self.variant == "lion":
            return x - self.lr * (np.sign(self.m) + self.decay * x)
        if self.variant == "shampoo":
            scale = np.sqrt(max(1.0, x.shape[0] / x.shape[1]))
            return x - self.lr * (scale * newton_schulz(self.m / (1 - b1)) + self.decay * x)
        self.v = b2 * self.v + (1 - b2) * c**2
        self.v_max = np.maximum(self.v_max, self.v)
        v = self.v_max if self.amsgrad else self.v
        denominator = np.sqrt(v / (1 - b2**self.t)) + self.eps
        return x - self.lr * (self.m / (1 - b1**self.t) / denominator + self.decay * x)
