"""The modified equation of a lasso near its optimum, where the penalty is linear on the support.

Away from 0 the penalty β‖z‖₁ is a constant slope, and where the optimum is 0 with a slope of f
below β it stays there: what moves is the support, around x*, as an Ornstein–Uhlenbeck process.
Coordinates off the support leave 0 for moments only, by O(ε/B) where the others spread by √(ε/B);
the equation has no word for them (it would be a differential inclusion).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sparring.science.admm_problem import AdmmProblem, Ridge, Scheme
from sparring.science.admm_terms import FloatArray, LeastSquares
from sparring.science.sme import Sme
from sparring.science.sme_linear import OrnsteinUhlenbeck


def support_process(
    f: LeastSquares, optimum: npt.ArrayLike, scheme: Scheme, batch: int
) -> OrnsteinUhlenbeck:
    """The equation of f(x) + β‖x‖₁, A = I, on the coordinates where the optimum is not 0.

    Args:
        f: the loss.
        optimum: (D,) the lasso's, with exact zeros.
        scheme: any.
        batch: samples an iteration.

    Raises:
        ValueError: the optimum is 0, or as `Sme`.
    """
    best: FloatArray = np.asarray(optimum, dtype=np.float64)
    support = np.flatnonzero(best)
    if not support.size:
        raise ValueError("the optimum is 0: nothing moves; lower the penalty")
    inside = LeastSquares(f.data[:, support], f.target, weight=f.weight)
    # A ridge of 0 stands for the penalty, whose slope is constant here: no curvature, no noise.
    model = Sme(AdmmProblem(inside, Ridge(0.0)), scheme, batch)
    centre = best[support]
    rate = np.linalg.solve(model.M, inside.hessian(centre))
    return OrnsteinUhlenbeck(np.asarray(rate), centre, model.diffusion(centre))
