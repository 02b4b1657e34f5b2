"""Losses against numbers by hand and by numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from confdiff_inputs import draws, frames, normal
from torch import Tensor

from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.config import LossConfig
from sparring.science.confdiff.dataset import Batch, blank
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.losses import (
    axis_angle_loss,
    backbone_loss,
    distance_loss,
    fape,
    rotation_loss,
    swapped,
    torsion_loss,
    total,
    translation_loss,
)
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.rows import TORSIONS
from sparring.science.confdiff.train import loss_terms

PROCESS = Process()
T = torch.tensor([0.1, 0.6], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_scores_are_in_units_of_their_size() -> None:
    one, other = normal(2, 3, 3), normal(2, 3, 3, seed=1)
    square = ((one - other) ** 2).sum(-1).numpy()
    means = [square[0].mean(), square[1, :2].mean()]
    for loss, scale in ((translation_loss, 0), (rotation_loss, 1)):
        size = PROCESS.score_scale(T)[scale].numpy()
        found = loss(one, other, T, MASK, PROCESS)
        np.testing.assert_allclose(found, means / size**2)
    assert float(PROCESS.score_scale(T)[0][0]) == pytest.approx(1 / float(PROCESS.std(0.1)))
    # The score of the truth has three components, each of mean square 1 in these units.
    many = torch.ones(4000, 2, dtype=torch.bool)
    clean = Frames(*(x.expand(4000, *x.shape[1:]) for x in vars(frames(1, 2)).values()))
    for t in (0.05, 0.5, 1.0):
        time = torch.full((4000,), t, dtype=torch.float64)
        x = PROCESS.noised(clean, time, many, draws(4000, 2))
        score = PROCESS.score_given(x, clean, time, many)
        zero = torch.zeros_like(score.rotation)
        for loss, part, expected in (
            (translation_loss, score.translation, 1.5),  # 3 (1 - 1/N)
            (rotation_loss, score.rotation, 3.0),
        ):
            found = loss(zero, part, time, many, PROCESS)
            error = 4 * float(found.std()) / math.sqrt(4000)
            assert abs(float(found.mean()) - expected) < error < 0.2


def test_axis_and_angle() -> None:
    target = 40 * normal(2, 3, 3)
    scale = PROCESS.score_scale(T)[1]
    twice = axis_angle_loss(2 * target, target, T, MASK, PROCESS)
    # Same axes: only lengths differ, and they count above t = 0.2 alone.
    length = float(target[1, :2].norm(dim=-1).square().mean() / scale[1] ** 2)
    assert float(twice[0]) < 1e-5
    assert float(twice[1]) == pytest.approx(length, rel=1e-3)
    against = axis_angle_loss(-target, target, T, MASK, PROCESS)
    torch.testing.assert_close(against, torch.full((2,), 4.0).double(), rtol=2e-3, atol=0)
    zero = torch.zeros_like(target).requires_grad_()
    axis_angle_loss(zero, target, T, MASK, PROCESS).sum().backward()
    assert zero.grad is not None
    assert bool(zero.grad.isfinite().all())


def test_atoms_in_square_angstrom() -> None:
    target, present = normal(2, 3, 4, 3), torch.ones(2, 3, 4, dtype=torch.bool)
    present[1, 2] = False
    target[1, 2] = math.nan
    shift = torch.tensor([0.1, 0.2, 0.2])  # 0.3 nm
    predicted = torch.where(present[..., None], target + shift, 5.0).requires_grad_()
    found = backbone_loss(predicted, target, present, T)
    assert found.tolist() == pytest.approx([9.0, 0.0])  # 3 Å, squared; t = 0.6 is too noisy
    every = backbone_loss(predicted, target, present, T, until=1)
    assert every.tolist() == pytest.approx([9.0, 9.0])
    pairs = distance_loss(predicted, target, present, T, until=1, within=3.0)
    assert pairs.tolist() == pytest.approx([0.0, 0.0])
    (every + pairs).sum().backward()
    assert predicted.grad is not None
    assert bool(predicted.grad.isfinite().all())
    assert float(predicted.grad[1, 2].abs().max()) == 0


def test_distances_that_are_short_in_truth() -> None:
    target = torch.tensor([0.0, 0.3, 0.5, 2.0], dtype=torch.float64)
    target = torch.stack([target, 0 * target, 0 * target], -1)[None, None]
    predicted = target.clone()
    predicted[0, 0, 1, 0] += 0.1
    present = torch.ones(1, 1, 4, dtype=torch.bool)
    # Pairs below 6 Å: 0-1 (3 Å, off by 1), 0-2, 1-2 (2 Å, off by 1).
    found = distance_loss(predicted, target, present, T[:1])
    assert float(found) == pytest.approx(2 / 3)


def test_torsions() -> None:
    target, present = normal(2, 3, 7), torch.ones(2, 3, 7, dtype=torch.bool)
    present[0, 0], target[0, 0] = False, math.nan
    off = torch.nan_to_num(target) + math.pi / 2
    predicted = torch.stack([off.sin(), off.cos()], -1)
    found = torsion_loss(predicted, target, present)
    torch.testing.assert_close(found, torch.full((2,), 2.0).double())


def test_fape_by_hand_and_its_symmetry() -> None:
    one, other = frames(1, 4), frames(1, 4, seed=3)
    points, true = normal(1, 5, 3), normal(1, 5, 3, seed=4)
    frame_mask = torch.tensor([[True, True, True, False]])
    point_mask = torch.tensor([[True, True, True, True, False]])
    errors = []
    for i in range(3):
        for j in range(4):
            seen = one.rotations[0, i].numpy().T @ (points[0, j] - one.translations[0, i]).numpy()
            real = other.rotations[0, i].numpy().T @ (true[0, j] - other.translations[0, i]).numpy()
            errors.append(min(1.5, np.linalg.norm(seen - real)) / 2)
    masks = (frame_mask, point_mask)
    found = fape(one, other, points, true, *masks, clamp=1.5, scale=2.0)
    assert float(found) == pytest.approx(np.mean(errors), abs=1e-6)
    turn, shift = exp_rotation(normal(3, seed=6)), normal(3, seed=7)
    moved = fape(
        one.moved(turn, shift), other, points @ turn.T + shift, true, *masks, clamp=1.5, scale=2.0
    )
    torch.testing.assert_close(moved, found)
    assert float(fape(one, one, points, points, *masks)) < 2e-4
    flip = torch.diag(torch.tensor([1.0, 1, -1])).double()
    mirrored = Frames(flip @ one.rotations @ flip, one.translations @ flip)
    assert float(fape(mirrored, one, points @ flip, points, *masks)) > 0.1


def test_names_of_symmetric_atoms() -> None:
    target, present = normal(1, 3, 4, 3), torch.ones(1, 3, 4, dtype=torch.bool)
    ambiguous = torch.zeros(1, 3, 4, dtype=torch.bool)
    ambiguous[0, :2, 2:] = True
    alternative = target.clone()
    alternative[0, :2, 2:] = target[0, :2, 2:].flip(1)
    present[0, 2, 3] = False
    target[0, 2, 3] = alternative[0, 2, 3] = math.nan
    predicted = torch.nan_to_num(target).clone()
    predicted[0, 1] = alternative[0, 1]  # the second residue means the other names
    turned = predicted @ exp_rotation(normal(3, seed=2)).T + 1
    found = swapped(turned, target, alternative, present, ambiguous)
    assert found.tolist() == [[False, True, False]]


def chain(sequence: str, **changed: float) -> tuple[Batch, Tensor]:
    """A chain whose second residue has some torsions changed, and all torsions (1, N, 7, 2)."""
    empty = blank([sequence])
    angles = atom14.standard_torsions(sequence)
    for name, change in changed.items():
        angles[1, TORSIONS.index(name)] += change
    turns = atom14.sincos(angles)
    types = empty.types[0]
    at = atom14.chain_frames(turns, types)
    atoms, there = atom14.to_atoms(at, turns, types)
    told = dataclasses.replace(
        empty,
        frames=at[None],
        torsions=turns[None],
        torsion_mask=atom14.has_torsion(types)[None],
        atoms=atoms[None],
        atom_mask=there[None],
    )
    return told, turns[None]


def fape_of(predicted: Batch, turns: Tensor, told: Batch) -> float:
    t = torch.tensor([0.1], dtype=torch.float64)
    x = PROCESS.noised(told.frames, t, told.mask, draws(1, len(told.types[0])))
    terms = loss_terms(predicted.frames, turns, told, x, t, PROCESS, LossConfig())
    return float(terms["fape"])


def test_fape_is_of_the_backbone_and_of_all_rigid_groups() -> None:
    told, _ = chain("ADFA")
    other, turns = chain("ADFA", chi1=0.7)
    errors = []
    for frame in range(told.mask.shape[1]):  # torsions as psi and chi1 make groups 3 and 4
        groups = [atom14.group_frames(c.frames, c.torsions, c.types) for c in (other, told)]
        for group in [0, *(1 + k for k in range(2, 7) if told.torsion_mask[0, frame, k])]:
            seen = [g[:, frame, group] for g in groups]
            local = [
                (c.atoms[0][c.atom_mask[0]] - at.translations) @ at.rotations[0]
                for c, at in zip((other, told), seen, strict=True)
            ]
            errors.append(torch.linalg.vector_norm(local[0] - local[1], dim=-1).clamp_max(1.0))
    assert fape_of(other, turns, told) == pytest.approx(float(torch.stack(errors).mean()), abs=2e-4)
    # Only a side chain was turned, so that CA seen from the backbone are where they were.
    assert fape_of(other, turns, told) > 0.01


@pytest.mark.parametrize(("residue", "chi"), [("D", "chi2"), ("E", "chi3"), ("F", "chi2")])
def test_fape_does_not_see_names_of_symmetric_atoms(residue: str, chi: str) -> None:
    told, turns = chain(f"A{residue}A")
    assert fape_of(told, turns, told) == pytest.approx(2e-4, abs=1e-5)  # fape's own 1e-4, twice
    # Ideal geometry is not wholly symmetric.
    assert fape_of(*chain(f"A{residue}A", **{chi: math.pi}), told) < 1.5e-3
    assert fape_of(*chain(f"A{residue}A", **{chi: math.pi / 2}), told) > 1e-2


def test_total() -> None:
    terms = {"rotation": torch.tensor([2.0]), "fape": torch.tensor([3.0])}
    assert float(total(terms, LossConfig())) == pytest.approx(4.0)
    assert vars(LossConfig()) == {
        "rotation": 0.5,
        "translation": 1.0,
        "backbone": 0.25,
        "distance": 0.25,
        "torsion": 0.25,
        "fape": 1.0,
        "plain": False,
    }
    with pytest.raises(ValueError, match=r"no weight for \['chi'\]"):
        total({"chi": terms["fape"]}, LossConfig())


# From here on: on a line, q_0 = N(0, 1) and k E = (x - 1.5)^2 / 2, so that p_0 = N(0.75, 0.5). The
# line is (T_1 - T_2) / sqrt 2 of two residues, in each of three directions.
