"""The exact score of a finite set of structures.

For x_0 drawn from structures b = 1..D with weights w_b, x_t has a mixture of D known densities:

    grad log q_t(x_t) = sum_b p_b grad log q(x_t | x_0^b)
    p_b = softmax_b(log w_b + log q(x_t | x_0^b))

and weights times e^(-k E_b) give the guided score exactly, and so ConfDiff's intermediate force
(arXiv 2403.14088, §3.3), F_t = grad E_t = grad log q_t - grad log p_t. It samples without a
network, and networks, losses and guidance are tested against it; a model that comes near it has
learnt its data by heart.

Shape legend: B samples, D structures, N residues.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.process import Process, Time
from sparring.science.confdiff.tangent import Score, Tangent


@dataclass(frozen=True)
class FiniteSet:
    """A score function (x_t, t) -> score of D structures of one chain, as they lie in space.

    They are taken in their own orientation alone: add turned copies for a model of all.
    """

    process: Process
    """Of the noise."""
    structures: Frames
    """(D, N) frames."""
    log_weights: Tensor
    """(D,) log w_b, up to a constant."""
    mask: Tensor
    """(N,) bool."""

    def __call__(self, x: Frames, t: Time) -> Score:
        """The score of (B, N) frames at t, a number or (B,)."""
        each, share = self._each(x, t), self.posterior(x, t)[..., None, None].to(x.translations)
        return Score((share * each.translation).sum(1), (share * each.rotation).sum(1))

    def posterior(self, x: Frames, t: Time) -> Tensor:
        """(B, D) probability that x_t comes from structure b."""
        return (self.log_weights + self._log_probs(x, t)).softmax(-1)

    def log_density(self, x: Frames, t: Time) -> Tensor:
        """(B,) log q_t(x_t), with the constants that `Process.log_prob` leaves out."""
        log_weights = self.log_weights.log_softmax(0)
        return (log_weights + self._log_probs(x, t)).logsumexp(-1)

    def tilted(self, energies: Tensor) -> FiniteSet:
        """The set with weights w_b e^(-k E_b): p_0 instead of q_0.

        Args:
            energies: (D,) k E_b, without unit.
        """
        log_weights = self.log_weights - energies.to(self.log_weights)
        return FiniteSet(self.process, self.structures, log_weights, self.mask)

    def energy(self, x: Frames, t: Time, energies: Tensor) -> Tensor:
        """(B,) E_t(x_t) = -log E[e^(-k E(x_0)) | x_t]."""
        log_posterior = (self.log_weights + self._log_probs(x, t)).log_softmax(-1)
        return -(log_posterior - energies.to(log_posterior)).logsumexp(-1)

    def force(self, x: Frames, t: Time, energies: Tensor) -> Tangent:
        """(B, N, 3) F_t = grad E_t; guided scores have it taken away."""
        return self(x, t).plus(self.tilted(energies)(x, t), -1.0)

    def _log_probs(self, x: Frames, t: Time) -> Tensor:
        pairs, repeated, mask = self._pairs(x, t)
        return self.process.log_prob(*pairs, repeated, mask).reshape(len(x.rotations), -1)

    def _each(self, x: Frames, t: Time) -> Tangent:
        """(B, D, N, 3) grad log q(x_t | x_0^b)."""
        pairs, repeated, mask = self._pairs(x, t)
        score = self.process.score_given(*pairs, repeated, mask)
        shape = (len(x.rotations), -1, *x.translations.shape[-2:])
        return Tangent(score.translation.reshape(shape), score.rotation.reshape(shape))

    def _pairs(self, x: Frames, t: Time) -> tuple[tuple[Frames, Frames], Time, Tensor]:
        """B D samples: each of x_t with each structure."""
        size, count = len(x.rotations), len(self.structures.rotations)
        noised = Frames(
            x.rotations.repeat_interleave(count, 0), x.translations.repeat_interleave(count, 0)
        )
        clean = Frames(
            self.structures.rotations.repeat(size, 1, 1, 1),
            self.structures.translations.repeat(size, 1, 1),
        )
        repeated = t.repeat_interleave(count) if isinstance(t, Tensor) and t.ndim else t
        mask = self.mask.expand(size * count, -1)
        return (noised, clean), repeated, mask
