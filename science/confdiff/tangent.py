"""Directions in which frames can move: scores, forces, noise and steps are such directions.

Shape legend: ... batch dimensions, N residues.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.science.confdiff.frames import Frames, centred
from sparring.science.confdiff.igso3 import exp_rotation


@dataclass(frozen=True)
class Tangent:
    """A direction for each residue: along T in the laboratory's axes, about its own axes for R.

    Rotations act from the right, R exp(rotation), so that turning all frames turns `translation`
    and leaves `rotation` alone.
    """

    translation: Tensor
    """(..., N, 3) nm for a step, 1/nm for a score or a force over RT."""
    rotation: Tensor
    """(..., N, 3) radians for a step, 1/rad for a score or a torque over RT."""

    def plus(self, other: Tangent, factor: Tensor | float = 1.0) -> Tangent:
        """self + factor other, with a number or one (..., 1, 1) for each sample."""
        return Tangent(
            self.translation + factor * other.translation, self.rotation + factor * other.rotation
        )

    def times(self, factor: Tensor | float) -> Tangent:
        """factor self, with a number or one (..., 1, 1) for each sample."""
        return Tangent(factor * self.translation, factor * self.rotation)

    def dot(self, other: Tangent) -> Tensor:
        """(...) sum over residues of both scalar products."""
        both = self.translation * other.translation + self.rotation * other.rotation
        return both.sum((-1, -2))

    def projected(self, mask: Tensor) -> Tangent:
        """P: the same without motion of the centre, and zero where mask (..., N) is false."""
        rotation = self.rotation * mask[..., None].to(self.rotation)
        return Tangent(centred(self.translation, mask), rotation)

    def to(self, *args: torch.device | torch.dtype) -> Tangent:
        """With tensors of another device or number type."""
        translation, rotation = self.translation, self.rotation
        for to in args:
            translation, rotation = translation.to(to), rotation.to(to)
        return Tangent(translation, rotation)


@dataclass(frozen=True)
class Score(Tangent):
    """grad log p_t(x_t), and what its network says of the clean structure."""

    x0: Frames | None = None
    """Denoised frames, if the score is a network's."""
    torsions: Tensor | None = None
    """(..., N, 7, 2) sines and cosines of torsions, if the score is a network's."""

    def moved(self, force: Tangent, factor: float = 1.0) -> Score:
        """self + factor force, with x0 and torsions as they are."""
        sums = self.plus(force, factor)
        return Score(sums.translation, sums.rotation, self.x0, self.torsions)


def moved_along(x: Frames, step: Tangent) -> Frames:
    """(T + translation, R exp(rotation)): along geodesics."""
    rotation = exp_rotation(step.rotation.to(x.rotations.dtype))
    translations = x.translations + step.translation.to(x.translations.dtype)
    return Frames(x.rotations @ rotation, translations)
