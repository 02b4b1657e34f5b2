"""Losses of the base model, as pure functions, unreduced (B,).

    L = 0.5 L_rot + L_trans + 0.25 L_bb + 0.25 L_dist + 0.25 L_tors + L_fape

are ConfDiff's (arXiv 2403.14088, §4.1 and the authors' configuration). Each is a mean over what a
sample has, never over padding. Lengths are in nm; L_bb and L_dist are in Å^2, as the weights are.

Shape legend: B samples, N residues, A atoms of a residue, M = N A atoms, F frames.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparring.science.confdiff.config import LossConfig
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Tangent

ANGSTROM = 10.0
"""Å in a nm."""


def total(terms: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    """(B,) weighted sum of terms (B,) by the names of the fields of `LossConfig`.

    Raises:
        ValueError: a term that has no weight.
    """
    known = vars(weights)
    if unknown := sorted(set(terms) - set(known)):
        raise ValueError(f"no weight for {unknown}; there are weights for {sorted(known)}")
    return torch.stack([known[name] * term for name, term in terms.items()]).sum(0)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) mean of values (B, ...) where mask, broadcast with it, is true; 0 if it never is."""
    mask = mask.expand_as(values)
    kept = torch.where(mask, values, 0.0).flatten(1).sum(1)
    return kept / mask.flatten(1).sum(1).clamp_min(1)


def filled(points: Tensor, present: Tensor) -> Tensor:
    """Points (..., 3), 0 where not present (...): a NaN would come back through gradients."""
    return torch.where(present[..., None], points, 0.0)


def translation_loss(
    predicted: Tensor, target: Tensor, t: Tensor, mask: Tensor, process: Process
) -> Tensor:
    """L_trans = mean_i |s*_i - s_i|^2 / lambda_T^2, lambda_T = 1 / std: 3 for a score of 0.

    Args:
        predicted, target: (B, N, 3) scores of translations, 1/nm.
        t: (B,).
        mask: (B, N) bool.
        process: whose std.

    Returns:
        (B,)
    """
    square = (predicted - target).square().sum(-1)
    return masked_mean(square, mask) / _of(process.score_scale(t)[0], square) ** 2


def rotation_loss(
    predicted: Tensor, target: Tensor, t: Tensor, mask: Tensor, process: Process
) -> Tensor:
    """Denoising score matching, mean_i |s*_i - s_i|^2 / lambda_R^2: its minimum is the score.

    Args:
        predicted, target: (B, N, 3) scores of rotations along the body's axes, 1/rad.
        t: (B,).
        mask: (B, N) bool.
        process: whose lambda_R.

    Returns:
        (B,)
    """
    square = (predicted - target).square().sum(-1)
    return masked_mean(square, mask) / _of(process.score_scale(t)[1], square) ** 2


def axis_angle_loss(
    predicted: Tensor,
    target: Tensor,
    t: Tensor,
    mask: Tensor,
    process: Process,
    *,
    angle_from: float = 0.2,
) -> Tensor:
    """ConfDiff's L_rot: |u* - u|^2 of unit vectors + 1[t > 0.2] (|s*| - |s|)^2 / lambda_R^2.

    It learns directions well where rotations are nearly clean. But its minimum is not the score
    where the posterior is wide: the mean of unit vectors is no unit vector of the mean.

    Args:
        predicted, target, t, mask, process: as for :func:`rotation_loss`.
        angle_from: t above which lengths count.

    Returns:
        (B,)
    """
    size, true_size = (torch.linalg.vector_norm(v, dim=-1) for v in (predicted, target))
    scale = _of(process.score_scale(t)[1], predicted)
    # Below a thousandth of a score's usual size a direction is rounding.
    least = 1e-3 * scale[:, None]
    apart = predicted / (size + least)[..., None] - target / (true_size + least)[..., None]
    axis = masked_mean(apart.square().sum(-1), mask)
    angle = masked_mean((size - true_size).square(), mask) / scale**2
    return axis + torch.where(t.to(angle.device) > angle_from, angle, 0.0)


def backbone_loss(
    predicted: Tensor, target: Tensor, present: Tensor, t: Tensor, *, until: float = 0.25
) -> Tensor:
    """L_bb = mean over atoms of |x - x*|^2 in Å^2 where t < 0.25, else 0.

    Args:
        predicted, target: (B, N, A, 3) nm, of N, CA, C and O; any target where not present.
        present: (B, N, A) bool.
        t: (B,).
        until: t from which the loss is 0, as there is little to see of atoms.

    Returns:
        (B,)
    """
    square = (ANGSTROM * (predicted - filled(target, present))).square().sum(-1)
    return _before(masked_mean(square, present), t, until)


def distance_loss(
    predicted: Tensor,
    target: Tensor,
    present: Tensor,
    t: Tensor,
    *,
    within: float = 0.6,
    until: float = 0.25,
) -> Tensor:
    """L_dist = mean of (d - d*)^2 in Å^2 over pairs of atoms with d* < 6 Å where t < 0.25, else 0.

    Args:
        predicted, target, present, t, until: as for :func:`backbone_loss`.
        within: nm.

    Returns:
        (B,)
    """
    here = present.flatten(1)
    both = (predicted, filled(target, present))
    near, true = (_distances(points.flatten(1, 2)) for points in both)
    pairs = here[:, :, None] & here[:, None] & (true < within)
    pairs = pairs & ~torch.eye(here.shape[1], dtype=torch.bool, device=here.device)
    return _before(masked_mean((ANGSTROM * (near - true)).square(), pairs), t, until)


def torsion_loss(predicted: Tensor, target: Tensor, present: Tensor) -> Tensor:
    """L_tors = mean over torsions of |(sin, cos) - (sin, cos)*|^2.

    Args:
        predicted: (B, N, 7, 2) sine and cosine.
        target: (B, N, 7) radians; anything where not present.
        present: (B, N, 7) bool.

    Returns:
        (B,)
    """
    angle = torch.where(present, target, 0.0)
    true = torch.stack([angle.sin(), angle.cos()], -1)
    return masked_mean((predicted - true).square().sum(-1), present)


def fape(
    frames: Frames,
    true_frames: Frames,
    points: Tensor,
    true_points: Tensor,
    frame_mask: Tensor,
    point_mask: Tensor,
    *,
    clamp: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Frame-aligned point error: mean over frames and points of min(clamp, |x - x*|) / scale.

    Points are seen from each frame (AlphaFold 2, algorithm 28). It does not see a mirror image as
    right. With the backbone's frames and CA it is the backbone's; with all rigid groups and heavy
    atoms, after symmetric names were :func:`swapped`, it is the side chains'.

    Args:
        frames, true_frames: (B, F).
        points, true_points: (B, M, 3) nm.
        frame_mask, point_mask: (B, F) and (B, M) bool.
        clamp, scale: nm; both 10 Å, AlphaFold 2's.

    Returns:
        (B,)
    """
    seen = frames.invert_apply(points[:, None])
    true = true_frames.invert_apply(filled(true_points, point_mask)[:, None])
    error: Tensor = ((seen - true).square().sum(-1) + 1e-8).sqrt().clamp_max(clamp) / scale
    return masked_mean(error, frame_mask[..., None] & point_mask[:, None])


def swapped(
    predicted: Tensor, target: Tensor, alternative: Tensor, present: Tensor, ambiguous: Tensor
) -> Tensor:
    """Whether the prediction means the other names of a residue's symmetric atoms.

    In ASP, GLU, PHE, TYR (and, for some, ARG) two names may be swapped. A residue takes the
    alternative if distances from its ambiguous atoms to all others agree better with it
    (AlphaFold 2, algorithm 26).

    Args:
        predicted: (B, N, A, 3) nm.
        target, alternative: (B, N, A, 3) nm, under both names.
        present: (B, N, A) bool.
        ambiguous: (B, N, A) bool, atoms whose names may be swapped.

    Returns:
        (B, N) bool.
    """
    target, alternative = (filled(points, present) for points in (target, alternative))
    sure = (present & ~ambiguous).flatten(1)
    asked = present & ambiguous

    def distances(points: Tensor, fixed: Tensor) -> Tensor:
        apart = points[:, :, :, None] - fixed.flatten(1, 2)[:, None, None]
        return _length(apart)

    found = distances(predicted, predicted).detach()
    counted = asked[..., None] & sure[:, None, None]
    errors = [
        torch.where(counted, (found - distances(points, target)).abs(), 0.0).sum((-1, -2))
        for points in (target, alternative)
    ]
    return errors[1] < errors[0]


def tangent_dot(a: Tangent, b: Tangent, t: Tensor, mask: Tensor, process: Process) -> Tensor:
    """(B,) mean_i a_i b_i in units of the scores: over lambda_T^2, plus over lambda_R^2."""
    scales = process.score_scale(t)
    products = (a.translation * b.translation, a.rotation * b.rotation)
    parts = [
        masked_mean(product.sum(-1), mask) / _of(scale, product) ** 2
        for product, scale in zip(products, scales, strict=True)
    ]
    return parts[0] + parts[1]


def _before(loss: Tensor, t: Tensor, until: float) -> Tensor:
    return torch.where(t.to(loss.device) < until, loss, 0.0)


def _distances(points: Tensor) -> Tensor:
    return _length(points[:, :, None] - points[:, None])


def _length(vectors: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length


def _of(coefficient: Tensor, like: Tensor) -> Tensor:
    return coefficient.to(like)
