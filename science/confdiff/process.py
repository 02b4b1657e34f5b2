"""Noise on frames: the diffusion on SE(3)^N whose reverse makes conformations.

ConfDiff (arXiv 2403.14088, §2.2) takes FrameDiff's (arXiv 2302.02277): translations keep their
variance while they shrink, rotations move freely, and the two do not know of each other,

    dT = -1/2 b(t) T dt + sqrt(b(t)) P dw        b(t) = b_min + t (b_max - b_min)
    dR = R g(t) dw                               g(t)^2 = d sigma(t)^2 / dt

    T_t = alpha T_0 + std P z,   alpha = exp(-B / 2),  std^2 = 1 - alpha^2,  B = int_0^t b
    R_t = R_0 exp(v),            v ~ IGSO(3) of sigma(t) = log(t e^sigma_max + (1 - t) e^sigma_min)

with t from 0 (clean) to 1, T in nm, and P taking out the centre of mass of the residues that are
there: of noise as of the reverse motion, and never counting padding.

Shape legend: B samples, N residues (padded; mask says which are there).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.science.confdiff.frames import Frames, centred
from sparring.science.confdiff.igso3 import (
    UNIFORM,
    log_density,
    log_rotation,
    sample,
    score,
    score_norm,
)
from sparring.science.confdiff.tangent import Score, Tangent, moved_along

Time = Tensor | float
"""(B,), or one number for all samples; in (0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """The schedule, and all that follows from it. Times may be (B,) tensors or numbers.

    Coefficients are float64 of the shape of t.
    """

    b_min: float = 0.1
    """b(0); the paper's."""
    b_max: float = 20.0
    """b(1); the paper's."""
    sigma_min: float = 0.1
    """sigma(0) in radians; the paper's."""
    sigma_max: float = 1.5
    """sigma(1) in radians; the paper's."""
    t_min: float = 0.01
    """Earliest time in training and where sampling ends; the paper's. std is 0.45 Å there."""

    def __post_init__(self) -> None:
        if not 0 < self.b_min <= self.b_max:
            raise ValueError(f"b_min {self.b_min} and b_max {self.b_max}: need 0 < b_min <= b_max")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max}: "
                "need 0 < sigma_min < sigma_max"
            )
        if not 0 < self.t_min < 1:
            raise ValueError(
                f"t_min must lie between 0 and 1, not {self.t_min}; the paper has 0.01"
            )

    def beta(self, t: Time) -> Tensor:
        """b(t), 1 / time: squared diffusion coefficient of translations, nm^2."""
        return self.b_min + _double(t) * (self.b_max - self.b_min)

    def beta_integral(self, t: Time) -> Tensor:
        """B(t) = int_0^t b."""
        t = _double(t)
        return self.b_min * t + (self.b_max - self.b_min) * t**2 / 2

    def alpha(self, t: Time) -> Tensor:
        """exp(-B / 2): what is left of T_0."""
        return (-self.beta_integral(t) / 2).exp()

    def std(self, t: Time) -> Tensor:
        """sqrt(1 - alpha^2) in nm: of the noise in T_t."""
        return (-torch.expm1(-self.beta_integral(t))).sqrt()

    def sigma(self, t: Time) -> Tensor:
        """eps of IGSO(3), radians: of the noise in R_t."""
        t = _double(t)
        return (t * math.exp(self.sigma_max) + (1 - t) * math.exp(self.sigma_min)).log()

    def rotation_rate(self, t: Time) -> Tensor:
        """g(t)^2 = d sigma^2 / dt, rad^2: squared diffusion coefficient of rotations."""
        sigma = self.sigma(t)
        slope = math.exp(self.sigma_max) - math.exp(self.sigma_min)
        return 2 * sigma * slope * (-sigma).exp()

    def noised(self, x0: Frames, t: Time, mask: Tensor, gaussian: Tangent) -> Frames:
        """A draw of x_t given x_0.

        Args:
            x0: (B, N) clean frames; their centre of mass is taken out.
            t: (B,) or a number.
            mask: (B, N) bool.
            gaussian: (B, N, 3) standard normal numbers, twice; those of translations need no P.

        Returns:
            (B, N) frames, their centre at 0; residues that are masked have T = 0 and R = R_0.
        """
        noise = gaussian.projected(mask)
        clean = centred(x0.translations, mask)
        alpha, std = (_over(c, clean) for c in (self.alpha(t), self.std(t)))
        sigma = self.sigma(t).to(clean.device).expand(clean.shape[0])
        return moved_along(
            Frames(x0.rotations, alpha * clean),
            Tangent(std * noise.translation, sample(noise.rotation, sigma)),
        )

    def prior(self, mask: Tensor, gaussian: Tangent) -> Frames:
        """A draw of x_1: T normal with standard deviation 1 nm, R uniform.

        The authors draw R from IGSO(3) of sigma_max about the identity (E tr R = 0.316). But q_1 of
        proteins, which have no orientation, is the same from every side, and that is not: it pulls
        all residues towards one another's orientation. Of independent priors only the uniform one
        is invariant, and it misses only correlations below e^-4.5 = 0.011 between residues.

        Args:
            mask: (B, N) bool.
            gaussian: (B, N, 3) standard normal numbers, twice.
        """
        noise = gaussian.projected(mask)
        identity = torch.eye(3, dtype=noise.rotation.dtype, device=noise.rotation.device)
        rotations = identity.expand(*mask.shape, 3, 3)
        width = torch.full((len(mask),), UNIFORM, device=mask.device)
        start = Frames(rotations, torch.zeros_like(noise.translation))
        return moved_along(start, Tangent(noise.translation, sample(noise.rotation, width)))

    def score_given(self, x_t: Frames, x0: Frames, t: Time, mask: Tensor) -> Score:
        """grad log q(x_t | x_0): the target of training; of a predicted x_0, the network's score.

            translation = -P (T_t - alpha T_0) / std^2       rotation = IGSO(3)'s of log(R_0^T R_t)

        Args:
            x_t: (B, N) noised frames.
            x0: (B, N) clean ones.
            t: (B,) or a number.
            mask: (B, N) bool.

        Returns:
            (B, N, 3) in 1/nm and 1/rad, of the wider number type; zero where masked.
        """
        vector = log_rotation(x0.rotations.mT @ x_t.rotations)
        alpha, std, sigma = (_over(c, vector) for c in (self.alpha(t), self.std(t), self.sigma(t)))
        translation = -(x_t.translations - alpha * x0.translations) / std**2
        exact = Tangent(translation, score(vector, sigma[..., 0])).projected(mask)
        return Score(exact.translation, exact.rotation)

    def log_prob(self, x_t: Frames, x0: Frames, t: Time, mask: Tensor) -> Tensor:
        """(B,) log q(x_t | x_0), relative to uniform rotations and without translations' constant.

        That constant depends on t and the number of residues alone. Translations have their density
        in the subspace without centre of mass.
        """
        present = mask.to(torch.float64)
        vector = log_rotation((x0.rotations.mT @ x_t.rotations).double())
        alpha, std, sigma = (
            _over(c, present[..., None]) for c in (self.alpha(t), self.std(t), self.sigma(t))
        )
        shift = centred(x_t.translations.double() - alpha * x0.translations.double(), mask)
        gaussian = -(shift**2).sum((-1, -2)) / (2 * std[..., 0, 0] ** 2)
        angle = torch.linalg.vector_norm(vector, dim=-1)
        return gaussian + (log_density(angle, sigma[..., 0]) * present).sum(-1)

    def eps_of(self, score: Tangent, t: Time) -> Tangent:
        """(B, N, 3) noise that a score stands for, -std s and -sigma s; without unit."""
        std, sigma = (_over(c, score.translation) for c in (self.std(t), self.sigma(t)))
        return Tangent(-std * score.translation, -sigma * score.rotation)

    def score_of(self, eps: Tangent, t: Time) -> Tangent:
        """The inverse of :meth:`eps_of`."""
        std, sigma = (_over(c, eps.translation) for c in (self.std(t), self.sigma(t)))
        return Tangent(-eps.translation / std, -eps.rotation / sigma)

    def denoised(self, x_t: Frames, score: Tangent, t: Time) -> Frames:
        """E[T_0 | x_t] by Tweedie, (T_t + std^2 s) / alpha, and R_t exp(sigma^2 s).

        Rotations are exact to first order in the angle alone: IGSO(3)'s score has no inverse, as it
        is 0 at pi again.
        """
        alpha, std, sigma = (
            _over(c, x_t.translations) for c in (self.alpha(t), self.std(t), self.sigma(t))
        )
        frames = Frames(x_t.rotations, x_t.translations / alpha)
        return moved_along(
            frames, Tangent(std**2 / alpha * score.translation, sigma**2 * score.rotation)
        )

    def score_scale(self, t: Time) -> tuple[Tensor, Tensor]:
        """lambda_T = 1 / std in 1/nm and lambda_R in 1/rad: sizes of a score's component at t."""
        return 1 / self.std(t), score_norm(self.sigma(t))


def _double(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def _over(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient () or (B,) as (1 or B, 1, 1), of the number type and device of `like`."""
    return coefficient.to(like).reshape(-1, 1, 1)
