"""The Ornstein–Uhlenbeck process dX = −B (X − x*) dt + L dW in closed form."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.linalg import expm, solve_continuous_lyapunov

from sparring.science.admm_moments import Moments
from sparring.science.admm_terms import FloatArray


class OrnsteinUhlenbeck:
    """Gaussian paths around a centre.

    Args:
        rate: B, (D, D), eigenvalues with positive real parts.
        centre: x*, (D,).
        noise: L, (D, K).

    Raises:
        ValueError: an eigenvalue of B has no positive real part.
    """

    def __init__(self, rate: FloatArray, centre: FloatArray, noise: FloatArray) -> None:
        self.rate, self.centre, self.noise = rate, centre, noise
        self.rates = np.sort(np.linalg.eigvals(rate).real)
        if self.rates[0] <= 0:
            raise ValueError(
                f"V must be strongly convex at its optimum; the rates are {self.rates.tolist()}"
            )

    def transition(self, t: float) -> tuple[FloatArray, FloatArray]:
        """(D, D) e^{−Bt}, and (D, D) a square root of the covariance of X_t given X_0.

        The covariance ∫₀ᵗ e^{−Bs} LLᵀ e^{−Bᵀs} ds comes from one exponential of a 2D × 2D block
        matrix (Van Loan, IEEE Transactions on Automatic Control 23, 1978), over a time short enough
        that the growing block does not overflow, doubled up to t.
        """
        decay, cov = self._decay_and_cov(t)
        values, vectors = np.linalg.eigh(cov)
        return decay, np.asarray(vectors * np.sqrt(np.maximum(values, 0)))

    def _decay_and_cov(self, t: float) -> tuple[FloatArray, FloatArray]:
        if not t >= 0:
            raise ValueError(f"t must not be negative, got {t!r}")
        size = len(self.centre)
        doublings = max(0, int(np.ceil(np.log2(max(t * np.abs(self.rate).sum(), 1e-300)))))
        blocks = np.zeros((2 * size, 2 * size))
        blocks[:size, :size], blocks[size:, size:] = self.rate, -self.rate.T
        blocks[:size, size:] = self.noise @ self.noise.T
        grown = expm(blocks * (t / 2**doublings))
        decay = grown[size:, size:].T
        cov = decay @ grown[:size, size:]
        for _ in range(doublings):
            cov = cov + decay @ cov @ decay.T
            decay = decay @ decay
        return decay, (cov + cov.T) / 2

    def mean_cov(self, t: float, x0: npt.ArrayLike) -> Moments:
        """Mean (D,) and covariance (D, D) of X_t from X_0 = x0."""
        decay, cov = self._decay_and_cov(t)
        return Moments(self.centre + decay @ (np.asarray(x0) - self.centre), cov)

    @property
    def stationary_cov(self) -> FloatArray:
        """(D, D) the covariance as t → ∞: B C + C Bᵀ = LLᵀ."""
        return np.asarray(solve_continuous_lyapunov(self.rate, self.noise @ self.noise.T))
