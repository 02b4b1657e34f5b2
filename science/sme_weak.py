"""Weak errors between ADMM and its equation, exact or with common random numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sparring.launch.seeds import derive
from sparring.science.admm_moments import LinearRecursion
from sparring.science.admm_paths import AdmmPaths
from sparring.science.admm_terms import FloatArray

if TYPE_CHECKING:
    from sparring.science.sme import Sme


@dataclass(frozen=True)
class WeakError:
    """Errors for each ε, and their log-log slopes: 1 is first order.

    `stderr` is the Monte-Carlo standard error of `error`, 0 where the error is exact;
    `cov_error` is that of the covariance, None from a simulation.
    """

    eps: FloatArray
    error: FloatArray
    stderr: FloatArray
    slope: float
    cov_error: FloatArray | None = None
    cov_slope: float | None = None


def log_slope(eps: FloatArray, error: FloatArray) -> float:
    """Least-squares slope of log error in log ε."""
    return float(np.polyfit(np.log(eps), np.log(np.maximum(error, 1e-300)), 1)[0])


def weak_error_exact(models: Sequence[Sme], t: float, x0: FloatArray) -> WeakError:
    """‖E x_k − E X‖ and ‖Cov x_k − Cov X‖ (Frobenius) at kε, k = ⌊t/ε⌋."""
    errors, spreads = [], []
    for model in models:
        steps = math.floor(t / model.eps + 1e-9)
        recursion = LinearRecursion(model.problem, model.scheme, model.batch)
        found = recursion.of_x(recursion.moments(x0, steps))
        expected = model.mean_cov(steps * model.eps, x0)
        errors.append(float(np.linalg.norm(found.mean - expected.mean)))
        spreads.append(float(np.linalg.norm(found.cov - expected.cov)))
    eps, error, spread = (np.array(v) for v in ([m.eps for m in models], errors, spreads))
    return WeakError(
        eps, error, np.zeros_like(error), log_slope(eps, error), spread, log_slope(eps, spread)
    )


def weak_error_sampled(
    models: Sequence[Sme],
    phi: Callable[[Tensor], Tensor],
    t: float,
    start: Tensor,
    substeps: int,
    tamed: bool,
    seed: int,
) -> WeakError:
    """|mean of φ(x_k) − φ(X)| over coupled paths from `start` (P, D), with its standard error."""
    errors, deviations = [], []
    n_paths, device = len(start), start.device
    width = models[0].diffusion(np.zeros(start.shape[1])).shape[1]
    for number, model in enumerate(models):
        generator = torch.Generator(device).manual_seed(derive(seed, "weak", number))
        discrete = AdmmPaths(model.problem, model.scheme, start, model.batch)
        x, move, dt = start, model.increment(tamed=tamed), model.eps / substeps
        for _ in range(math.floor(t / model.eps + 1e-9)):
            total = start.new_zeros(n_paths, width)
            for _ in range(substeps):
                normals = torch.randn(
                    n_paths, width, generator=generator, dtype=x.dtype, device=device
                )
                # A gradient's noise pushes x down its own direction, hence the sign.
                x = x + move(x, dt, -math.sqrt(dt) * normals)
                total += normals
            discrete.step(total / math.sqrt(substeps))
        difference = phi(discrete.x) - phi(x)
        errors.append(abs(float(difference.mean())))
        deviations.append(float(difference.std()) / math.sqrt(n_paths))
    eps = np.array([model.eps for model in models])
    error = np.array(errors)
    return WeakError(eps, error, np.array(deviations), log_slope(eps, error))
