"""Rigid frames of residues.

Shape legend: ... batch dimensions, N residues, P points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frames:
    """One frame a residue: a point x of the residue's own axes lies at R x + T.

    The origin is the residue's CA; N lies in the plane of the first two axes and C, of an ideal
    residue, on the first (:func:`from_backbone`), as in AlphaFold 2, algorithm 21.
    """

    rotations: Tensor
    """(..., N, 3, 3) R, from the residue's axes to the laboratory's."""
    translations: Tensor
    """(..., N, 3) T in nm."""

    def apply(self, points: Tensor) -> Tensor:
        """(..., N, P, 3) laboratory coordinates of points (..., N, P, 3) of the residues' axes."""
        return points @ self.rotations.mT + self.translations[..., None, :]

    def invert_apply(self, points: Tensor) -> Tensor:
        """(..., N, P, 3) coordinates in the residues' axes of points (..., N, P, 3)."""
        return (points - self.translations[..., None, :]) @ self.rotations

    def compose(self, inner: Frames) -> Frames:
        """The frames that `inner` names in the axes of these."""
        moved = (self.rotations @ inner.translations[..., None])[..., 0]
        return Frames(self.rotations @ inner.rotations, moved + self.translations)

    def moved(self, rotation: Tensor, shift: Tensor) -> Frames:
        """All frames turned by Q (..., 3, 3) and then moved by (..., 3) nm."""
        rotations = rotation[..., None, :, :] @ self.rotations
        translations = self.translations @ rotation.mT
        return Frames(rotations, translations + shift[..., None, :])

    def to(self, *args: torch.device | torch.dtype) -> Frames:
        """With tensors of another device or number type."""
        rotations, translations = self.rotations, self.translations
        for to in args:
            rotations, translations = rotations.to(to), translations.to(to)
        return Frames(rotations, translations)

    def __getitem__(self, index: object) -> Frames:
        """Those of some items of a batch."""
        return Frames(self.rotations[index], self.translations[index])  # type: ignore[index]


def turned(rotations: Tensor, vectors: Tensor) -> Tensor:
    """R v: (..., 3) of rotations (..., 3, 3) and vectors (..., 3).

    A sum of products, which autocast leaves alone: a product of matrices it would do in bfloat16,
    in which a nanometre is right to half an ångström.
    """
    return (rotations * vectors[..., None, :]).sum(-1)


def from_backbone(n: Tensor, ca: Tensor, c: Tensor) -> Frames:
    """Frames of backbone atoms (..., N, 3) in nm by Gram-Schmidt: first axis from CA to C."""
    first = _unit(c - ca)
    towards = n - ca
    second = _unit(towards - (towards * first).sum(-1, keepdim=True) * first)
    third = torch.linalg.cross(first, second)
    return Frames(torch.stack([first, second, third], dim=-1), ca)


def centred(translations: Tensor, mask: Tensor) -> Tensor:
    """P T: (..., N, 3) translations less their mean over the residues of mask (..., N).

    Residues that are masked become zero, so padding changes nothing.
    """
    weight = mask[..., None].to(translations)
    mean = (translations * weight).sum(-2, keepdim=True) / weight.sum(-2, keepdim=True).clamp_min(1)
    return (translations - mean) * weight


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length
