"""What the modified equation says about running ADMM: when to stop, which ρ, α and batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from sparring.science.admm_moments import LinearRecursion
from sparring.science.admm_terms import FloatArray

if TYPE_CHECKING:
    from sparring.science.sme import Sme


class StoppingTime(NamedTuple):
    """When waiting stops to pay: time, iterations, and E‖X_t − x*‖² there and at its least."""

    t: float
    iterations: int
    mean_square: float
    least: float


class Advice(NamedTuple):
    """A setting that reaches the target.

    Args:
        rho, alpha, tau, batch: for `admm`; tau keeps c = τ/ρ.
        expected_std: largest stationary standard deviation of a coordinate by the equation.
        recursion_std: the same of the iterates themselves, exact; None where V is not quadratic.
        iterations: until an initial error has shrunk by e³ ≈ 20 along the slowest direction.
        samples: iterations × batch.
    """

    rho: float
    alpha: float
    tau: float
    batch: int
    expected_std: float
    recursion_std: float | None
    iterations: int
    samples: int


def stopping_time(model: Sme, x0: FloatArray, tolerance: float) -> StoppingTime:
    """See `Sme.stopping_time`."""
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    process = model.local
    final = float(np.trace(process.stationary_cov))
    if final <= 0:
        raise ValueError("f has no noise, so that the error goes to 0 and never levels off")

    def mean_square(t: float) -> float:
        mean, cov = process.mean_cov(t, x0)
        return float(np.sum((mean - process.centre) ** 2) + np.trace(cov))

    # By the horizon the bias is below the noise, whatever its size was.
    start = max(mean_square(0.0), final)
    horizon = (math.log(start / final) / 2 + 10) / float(process.rates[0])
    grid = np.concatenate([[0.0], np.geomspace(1e-4 * horizon, horizon, 200)])
    values = np.array([mean_square(t) for t in grid])
    low = int(values.argmin())
    around = (grid[max(low - 1, 0)], grid[min(low + 1, len(grid) - 1)])
    refined = minimize_scalar(mean_square, bounds=around, method="bounded")
    least = min(float(refined.fun), float(values[low]), final)
    level = (1 + tolerance) * least
    first = int(np.argmax(values <= level))
    if first == 0:
        return StoppingTime(0.0, 0, float(values[0]), least)
    t = float(brentq(lambda s: mean_square(s) - level, grid[first - 1], grid[first]))
    return StoppingTime(t, math.ceil(t / model.eps), mean_square(t), least)


def advise(
    model: Sme,
    target_std: float,
    alphas: Sequence[float],
    batches: Sequence[int],
    stiffness: float,
) -> list[Advice]:
    """Settings whose largest stationary standard deviation of a coordinate of x is the target.

    The stationary covariance of the linearised equation is (ε/B) C with C free of ε and B, so that
    ε = B target² / max diag C. ε is not raised beyond stiffness / (fastest rate of M⁻¹V''), where
    an iteration would be a large part of the fastest motion and the equation no guide, and is
    halved while the iterates of a quadratic V would not settle: then the standard deviation is
    below the target. To leading order standard ADMM's deviation and speed
    both depend on α/ρ only: what a larger α gains in speed, it loses in noise, until that bound.

    Args:
        model: gives the problem, ω and c = τ/ρ.
        target_std: positive, in the unit of x.
        alphas: relaxations to consider; unstable ones are left out.
        batches: batches to consider.
        stiffness: bound of ε times the fastest rate, in (0, 1].

    Returns:
        Fewest iterations first, then fewest samples.

    Raises:
        ValueError: an argument out of range, no noise, or no α is stable.
    """
    from sparring.science.sme import Sme

    if not (math.isfinite(target_std) and target_std > 0):
        raise ValueError(f"target_std must be positive, got {target_std!r}")
    if not 0 < stiffness <= 1:
        raise ValueError(f"stiffness must be in (0, 1], got {stiffness!r}")
    if not alphas or not batches or min(batches) < 1:
        raise ValueError(f"give alphas and batches of at least 1, got {alphas} and {batches}")
    found, refused = [], []
    for alpha in alphas:
        base = model.scheme
        tried = type(base)(
            rho=base.rho, alpha=alpha, omega=base.omega, omega1=base.omega1, tau=base.tau
        )
        try:
            relaxed = Sme(model.problem, tried)
        except ValueError as error:
            refused.append(str(error))
            continue
        found += [_setting(relaxed, target_std, batch, stiffness) for batch in batches]
    if not found:
        raise ValueError("no alpha of the list is stable: " + refused[0])
    return sorted(found, key=lambda advice: (advice.iterations, advice.samples))


def _setting(model: Sme, target_std: float, batch: int, stiffness: float) -> Advice:
    """The largest ε of a scheme and a batch that reaches the target, see `advise`."""
    process, exact = model.local, None
    unit = float(np.diag(process.stationary_cov).max()) / model.eps
    if unit <= 0:
        raise ValueError("f has no noise: every rho ends with a standard deviation of 0")
    eps = min(target_std**2 * batch / unit, stiffness / float(process.rates[-1]))
    if model.problem.linear:
        # `Scheme.check` speaks of small ε only; a scheme that has passed it settles for some.
        recursion = LinearRecursion(model.problem, model.scheme.at(1 / eps), batch)
        while recursion.radius >= 1:
            eps /= 2
            recursion = LinearRecursion(model.problem, model.scheme.at(1 / eps), batch)
        exact = float(np.diag(recursion.of_x(recursion.stationary()).cov).max() ** 0.5)
    scheme, std = model.scheme.at(1 / eps), math.sqrt(unit * eps / batch)
    iterations = math.ceil(3 / (float(process.rates[0]) * eps))
    return Advice(
        scheme.rho, scheme.alpha, scheme.tau, batch, std, exact, iterations, iterations * batch
    )
