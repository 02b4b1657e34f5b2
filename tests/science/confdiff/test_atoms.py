"""Frames and torsions to atoms and back: against mdtraj, PeptideBuilder and finite differences."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import PeptideBuilder
import pytest
import roma
import torch
from torch import Tensor

from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.residues import ATOMS, CODES
from sparring.science.confdiff.rows import TORSIONS
from sparring.science.confdiff.topologies import trajectory

EVERY = CODES + CODES[::-1]


def wrapped(difference: Tensor) -> Tensor:
    """Differences of angles in [-pi, pi)."""
    return torch.remainder(difference + math.pi, 2 * math.pi) - math.pi


def random_torsions(sequence: str, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, len(sequence), len(TORSIONS))
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * math.pi


def build(sequence: str, torsions: Tensor) -> tuple[Frames, Tensor, Tensor]:
    """Frames, atoms and caps of a chain of ideal bonds."""
    types, turns = atom14.types_of(sequence), atom14.sincos(torsions)
    frames = atom14.chain_frames(turns, types)
    return frames, atom14.to_atoms(frames, turns, types)[0], atom14.cap_atoms(frames, turns, types)


def test_torsions_round_trip() -> None:
    torsions = random_torsions(EVERY)
    _, atoms, caps = build(EVERY, torsions)
    types = atom14.types_of(EVERY)
    back = atom14.torsions_of(atoms, types, caps)
    has = atom14.has_torsion(types)
    assert torch.isnan(back).logical_not().equal(has.expand(back.shape))
    assert wrapped(back - torsions)[:, has].abs().max() < 1e-6
    alone = atom14.torsions_of(atoms, types)
    assert torch.isnan(alone[:, 0, :2]).all()
    assert torch.equal(alone[:, 1:].nan_to_num(), back[:, 1:].nan_to_num())


def test_atoms_round_trip_in_float32_under_any_motion() -> None:
    torsions = random_torsions(EVERY).float()
    frames, _, _ = build(EVERY, torsions)
    moved = frames.moved(roma.random_rotmat(3), torch.tensor([3.0, -2, 1]))
    types = atom14.types_of(EVERY)
    atoms, filled = atom14.to_atoms(moved, atom14.sincos(torsions), types)
    again = atom14.frames_of(atoms)
    assert torch.allclose(again.rotations, moved.rotations, atol=2e-5)
    assert torch.equal(again.translations, moved.translations)
    assert torch.equal(filled[0], atom14.exists(types))
    assert torch.equal(atoms[~filled], moved.translations[:, :, None].expand_as(atoms)[~filled])
    assert int(filled[0].sum()) == sum(len(ATOMS[code]) for code in EVERY)


def test_rigid_frames_share_a_wide_angle_between_n_and_c() -> None:
    torsions = random_torsions(EVERY)
    frames, atoms, _ = build(EVERY, torsions)
    types = atom14.types_of(EVERY)
    same = atom14.rigid_frames(atoms, types)
    assert torch.allclose(same.rotations, frames.rotations, atol=1e-12)
    # N turned away from C by 0.1 rad about the third axis of the frame.
    wide = atoms.clone()
    turn = roma.rotvec_to_rotmat(0.1 * frames.rotations[..., :, 2])
    wide[..., 0, :] = (turn @ (atoms[..., 0, :] - atoms[..., 1, :])[..., None])[..., 0]
    wide[..., 0, :] += atoms[..., 1, :]
    found = atom14.rigid_frames(wide, types)
    shift = roma.rotmat_to_rotvec(frames.rotations.mT @ found.rotations)
    assert torch.allclose(shift, torch.tensor([0.0, 0, 0.05]).double().expand_as(shift), atol=1e-9)
    assert torch.equal(found.translations, frames.translations)


def test_backbone_torsions_are_mdtrajs() -> None:
    torsions = random_torsions(EVERY)
    _, atoms, caps = build(EVERY, torsions)
    plain = trajectory(EVERY, atoms.numpy())
    capped = trajectory(EVERY, atoms.numpy(), caps.numpy())
    omega, phi, psi = atom14.backbone_torsions(atoms).unbind(-1)
    _, whole_phi, whole_psi = atom14.backbone_torsions(atoms, caps).unbind(-1)
    for compute, built, ours in (
        (mdtraj.compute_omega, plain, omega[:, 1:]),
        (mdtraj.compute_phi, plain, phi[:, 1:]),
        (mdtraj.compute_psi, plain, psi[:, :-1]),
        (mdtraj.compute_phi, capped, whole_phi),
        (mdtraj.compute_psi, capped, whole_psi),
    ):
        theirs = torch.from_numpy(compute(built)[1])
        assert theirs.shape == ours.shape
        assert wrapped(theirs - ours).abs().max() < 1e-4
    own = atom14.torsions_of(atoms, atom14.types_of(EVERY), caps)
    assert wrapped(own[..., 2] - whole_psi).abs().max() < 1e-6
    assert torch.equal(own[..., 1], whole_phi)


def test_chain_is_peptidebuilders() -> None:
    """All atoms of an extended chain, side chains too, after superposition."""
    sequence = CODES.replace("L", "")  # leucine's CD2 is corrected, see residues
    chain = PeptideBuilder.make_extended_structure(sequence)[0]["A"]
    names = [(place, name) for place, code in enumerate(sequence) for name in ATOMS[code]]
    residues = list(chain)
    theirs = torch.tensor(np.array([residues[p][n].coord for p, n in names])) / 10
    types = atom14.types_of(sequence)
    _, atoms, _ = build(sequence, atom14.standard_torsions(sequence)[None])
    ours = atoms[0][atom14.exists(types)]
    # PeptideBuilder lets the last O lie where no residue follows it.
    keep = [name != (len(sequence) - 1, "O") for name in names]
    rotation, shift = roma.rigid_points_registration(ours[keep], theirs[keep])
    error = (ours[keep] @ rotation.T + shift - theirs[keep]).norm(dim=-1)
    assert error.max() < 5e-4, names[int(error.argmax())]
    assert error.median() < 1e-5


def test_trans_chain_has_ca_distance() -> None:
    torsions = random_torsions(EVERY)
    torsions[..., 0] = math.pi
    _, atoms, caps = build(EVERY, torsions)
    distance = (atoms[:, 1:, 1] - atoms[:, :-1, 1]).norm(dim=-1)
    assert distance == pytest.approx(np.full(distance.shape, 0.380), abs=0.002)
    bond = (atoms[:, 1:, 0] - atoms[:, :-1, 2]).norm(dim=-1)
    assert bond == pytest.approx(np.full(bond.shape, 0.133), abs=1e-6)
    assert (caps[:, 1] - atoms[:, 0, 0]).norm(dim=-1) == pytest.approx(np.full(3, 0.133), abs=1e-6)
    assert (caps[:, 3] - atoms[:, -1, 2]).norm(dim=-1) == pytest.approx(np.full(3, 0.133), abs=1e-6)


def test_cap_atoms_continue_the_chain() -> None:
    """Caps lie where a longer chain with the same torsions has its atoms."""
    torsions = random_torsions("AAAAA")
    torsions[..., 0] = math.pi
    _, long, _ = build("AAAAA", torsions)
    types, inner = atom14.types_of("AAA"), torsions[:, 1:4]
    frames = atom14.frames_of(long[:, 1:4])
    caps = atom14.cap_atoms(frames, atom14.sincos(inner), types)
    expected = torch.stack(
        [long[:, 0, 1], long[:, 0, 2], long[:, 0, 3], long[:, 4, 0], long[:, 4, 1]], dim=1
    )
    assert torch.allclose(caps, expected, atol=1e-4)  # ideal C=O angles vary by type


def test_terminal_oxygen_mirrors_o() -> None:
    torsions = random_torsions("GAV")
    frames, atoms, _ = build("GAV", torsions)
    end = atom14.terminal_oxygen(frames, atom14.sincos(torsions), atom14.types_of("GAV"))
    c, o = atoms[:, -1, 2], atoms[:, -1, 3]
    assert (end - c).norm(dim=-1) == pytest.approx((o - c).norm(dim=-1).numpy(), abs=1e-9)
    cosine = ((end - c) * (o - c)).sum(-1) / 0.123**2
    assert np.degrees(np.arccos(cosine.numpy())) == pytest.approx(np.full(3, 119), abs=1)


def test_gradients() -> None:
    torsions = random_torsions("RW", batch=1)
    types = atom14.types_of("RW")
    frames, _, _ = build("RW", torsions)

    def placed(angle: Tensor, shift: Tensor) -> Tensor:
        moved = Frames(frames.rotations, frames.translations + shift)
        return atom14.to_atoms(moved, atom14.sincos(angle), types)[0]

    shift = torch.zeros_like(frames.translations)
    inputs = (torsions.requires_grad_(), shift.requires_grad_())
    assert torch.autograd.gradcheck(placed, inputs)
    # Omega and phi move no atom of their own residue, psi its O alone, chi1 seven of arginine's.
    jacobian = torch.autograd.functional.jacobian(lambda a: placed(a, shift)[0, 0], torsions)
    moved = (jacobian[..., 0, 0, :].abs() > 1e-6).any(1)
    assert moved.sum(0).tolist() == [0, 0, 1, 6, 5, 4, 3]


def test_undefined_torsions_place_atoms_finitely() -> None:
    turns = atom14.sincos(torch.full((1, 3, 7), math.nan))
    assert torch.equal(turns, torch.tensor([0.0, 1.0]).expand(turns.shape))
    frames = Frames(torch.eye(3).expand(1, 3, 3, 3), torch.zeros(1, 3, 3))
    assert torch.isfinite(atom14.to_atoms(frames, turns, atom14.types_of("GAW"))[0]).all()
    angle = torch.tensor([0.3, -3.0, 3.1])
    assert torch.allclose(atom14.angles(atom14.sincos(angle)), angle)


def test_renaming_symmetric_atoms() -> None:
    torsions = random_torsions(EVERY)
    _, atoms, _ = build(EVERY, torsions)
    types = atom14.types_of(EVERY)
    other = atom14.renamed(atoms, types)
    assert torch.equal(atom14.renamed(other, types), atoms)
    changed = (other != atoms).any(-1).any(0)
    expected = {"D": 2, "E": 2, "F": 4, "Y": 4, "R": 2}
    for place, code in enumerate(EVERY):
        assert int(changed[place].sum()) == expected.get(code, 0), code
    before, after = (atom14.torsions_of(a, types)[..., 3:] for a in (atoms, other))
    turned = wrapped(after - before).abs()
    for place, code in enumerate(EVERY):
        last = {"D": 1, "E": 2, "F": 1, "Y": 1}.get(code)
        for chi in range(4):
            value = turned[:, place, chi].nan_to_num()
            assert value == pytest.approx(np.full(3, math.pi if chi == last else 0), abs=0.05)


def test_canonical_names() -> None:
    torsions = random_torsions(EVERY)
    _, atoms, _ = build(EVERY, torsions)
    types = atom14.types_of(EVERY)
    names = atom14.canonical(atoms, types)
    assert torch.equal(names, atom14.canonical(atom14.renamed(atoms, types), types))
    chi = atom14.torsions_of(names, types)
    for place, code in enumerate(EVERY):
        last = {"D": 1, "E": 2, "F": 1, "Y": 1}.get(code)
        if last is not None:
            assert chi[:, place, 3 + last].abs().max() <= math.pi / 2 + 0.05
    arginine = EVERY.index("R")
    cd, nh1 = names[:, arginine, 6], names[:, arginine, 9]
    assert ((cd - nh1).norm(dim=-1) < 0.32).all()  # cis; trans it is 0.37
    free = torch.tensor([code not in "DEFYR" for code in EVERY])
    assert torch.equal(names[:, free], atoms[:, free])


def test_named_like_finds_the_nearer_naming() -> None:
    torsions = random_torsions(EVERY)
    frames, atoms, _ = build(EVERY, torsions)
    types = atom14.types_of(EVERY)
    near, _ = atom14.to_atoms(frames, atom14.sincos(torsions + 0.1), types)
    assert torch.equal(atom14.named_like(near, atoms, types), near)
    assert torch.equal(atom14.named_like(atom14.renamed(near, types), atoms, types), near)
