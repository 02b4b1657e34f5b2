"""Frames and torsions to atoms and back, for batches on any device, differentiable.

Shape legend: ... batch dimensions, N residues, 14 slots of heavy atoms (residues.ATOMS), 7
torsions (rows.TORSIONS), 8 rigid groups (residues.PARENTS), 5 atoms of caps (CAPS).
Coordinates are in nm, torsions in radians by the sign of IUPAC-IUB 1970. The rigid groups are the
idea of AlphaFold 2 (Jumper et al. 2021), algorithm 24; the coordinates are residues.geometry's.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparring.science.confdiff import residues as amino
from sparring.science.confdiff.frames import Frames, from_backbone
from sparring.science.confdiff.rows import TORSIONS

CAPS = (("ACE", "CH3"), ("ACE", "C"), ("ACE", "O"), ("NME", "N"), ("NME", "C"))
"""Residue and name of the five heavy atoms of the caps, in their order here."""
_ACE = [amino.NEIGHBOURS.index(name) for name in ("previous CA", "previous C", "previous O")]
_NME = [amino.NEIGHBOURS.index(name) for name in ("next N", "next CA")]
_OXT = [amino.NEIGHBOURS.index("OXT")]
_N, _CA, _C, _O = range(4)


class _Tables(NamedTuple):
    """residues.Geometry as tensors, the renaming of symmetric atoms and the chi atoms' slots."""

    positions: Tensor
    groups: Tensor
    exists: Tensor
    has_torsion: Tensor
    rotations: Tensor
    origins: Tensor
    neighbours: Tensor
    neighbour_groups: Tensor
    rest: Tensor
    swaps: Tensor
    """(20, 14) slot whose atom takes this one's name in `renamed`."""
    signs: Tensor
    """(20, 7) -1 for the torsion that turns by pi with that, else 1."""
    chis: Tensor
    """(20, 4, 4) slots of the atoms of chi1 to chi4."""


@lru_cache(maxsize=16)
def _tables(device: torch.device, dtype: torch.dtype) -> _Tables:
    swaps = torch.arange(amino.SLOTS).repeat(len(amino.CODES), 1)
    signs = torch.ones(len(amino.CODES), len(TORSIONS), dtype=dtype)
    chis = torch.zeros(len(amino.CODES), 4, 4, dtype=torch.long)
    for number, code in enumerate(amino.CODES):
        if code in amino.SYMMETRIC and code != "R":
            signs[number, TORSIONS.index(f"chi{len(amino.CHIS[code])}")] = -1
        for pair in amino.SYMMETRIC.get(code, ()):
            a, b = (amino.slot(code, name) for name in pair)
            swaps[number, a], swaps[number, b] = b, a
        for chi, names in enumerate(amino.CHIS[code]):
            chis[number, chi] = torch.tensor([amino.slot(code, name) for name in names])
    arrays = [torch.tensor(array) for array in amino.geometry()]
    moved = [a.to(device, dtype) if a.is_floating_point() else a.to(device) for a in arrays]
    return _Tables(*[*moved, swaps.to(device), signs.to(device), chis.to(device)])


def types_of(sequence: str, device: torch.device | str = "cpu") -> Tensor:
    """(N,) int64 types of a sequence of one-letter codes; errors as residues.encode."""
    return torch.tensor(amino.encode(sequence), device=device)


def exists(types: Tensor) -> Tensor:
    """(..., N, 14) bool: the slots that types (..., N) fill."""
    return _tables(types.device, torch.float32).exists[types]


def has_torsion(types: Tensor) -> Tensor:
    """(..., N, 7) bool: the torsions that types (..., N) have, ends of the chain not regarded."""
    return _tables(types.device, torch.float32).has_torsion[types]


def sincos(angles: Tensor) -> Tensor:
    """(..., 2) sine and cosine of angles (...); those of NaN (undefined) are (0, 1)."""
    angles = torch.nan_to_num(angles, nan=0.0)
    return torch.stack([angles.sin(), angles.cos()], dim=-1)


def angles(torsions: Tensor) -> Tensor:
    """(...) angles in (-pi, pi] of pairs (..., 2) of sine and cosine."""
    return torch.atan2(torsions[..., 0], torsions[..., 1])


def standard_torsions(
    sequence: str, phi: Tensor | float | None = None, psi: Tensor | float | None = None
) -> Tensor:
    """(N, 7) radians, float64: a trans chain with standard side chains (residues.Geometry.rest).

    Args:
        sequence: one-letter codes.
        phi: radians, of all residues or (N,); without it extended (-120 degrees).
        psi: radians, of all residues or (N,); without it extended (140 degrees).
    """
    types = types_of(sequence)
    torsions = _tables(types.device, torch.float64).rest[types]
    for name, value in (("phi", phi), ("psi", psi)):
        if value is not None:
            torsions[:, TORSIONS.index(name)] = value
    return torsions


def to_atoms(frames: Frames, torsions: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
    """Heavy atoms of residues from their backbone frames and torsions, by ideal geometry.

    Omega and phi move no atom of their own residue; psi places O.

    Args:
        frames: (..., N).
        torsions: (..., N, 7, 2) sine and cosine, of unit length; of undefined ones any finite pair.
        types: (..., N) int64 in [0, 20).

    Returns:
        (..., N, 14, 3) coordinates in nm, those of empty slots at CA, and (..., N, 14) bool,
        whether the slot has an atom.
    """
    tables = _tables(types.device, frames.translations.dtype)
    groups = group_frames(frames, torsions, types)
    chosen = _pick(groups, tables.groups[types])
    atoms = (chosen.rotations @ tables.positions[types][..., None])[..., 0] + chosen.translations
    filled = tables.exists[types].expand(atoms.shape[:-1])
    return torch.where(filled[..., None], atoms, frames.translations[..., None, :]), filled


def group_frames(frames: Frames, torsions: Tensor, types: Tensor) -> Frames:
    """(..., N, 8) frames of the rigid groups: the backbone's, then one a torsion."""
    tables = _tables(types.device, frames.translations.dtype)
    groups: list[Frames] = [frames] * (1 + len(amino.PARENTS))
    for torsion in amino.ORDER:
        rest = Frames(
            tables.rotations[types][..., torsion, :, :], tables.origins[types][..., torsion, :]
        )
        turn = Frames(
            _about_first(torsions[..., torsion, :]), torch.zeros_like(frames.translations)
        )
        groups[1 + torsion] = groups[amino.PARENTS[torsion]].compose(rest).compose(turn)
    return Frames(
        torch.stack([g.rotations for g in groups], dim=-3),
        torch.stack([g.translations for g in groups], dim=-2),
    )


def neighbours(frames: Frames, torsions: Tensor, types: Tensor) -> Tensor:
    """(..., N, 6, 3) nm: residues.NEIGHBOURS of each residue, as its own torsions place them."""
    tables = _tables(types.device, frames.translations.dtype)
    groups = group_frames(frames, torsions, types)
    index = tables.neighbour_groups.expand(*types.shape, len(amino.NEIGHBOURS))
    chosen = _pick(groups, index)
    local = tables.neighbours[types]
    return (chosen.rotations @ local[..., None])[..., 0] + chosen.translations


def cap_atoms(frames: Frames, torsions: Tensor, types: Tensor) -> Tensor:
    """(..., 5, 3) nm: heavy atoms of ACE and NME, in the order of CAPS.

    ACE follows from the first residue's phi and omega (trans is the pair (0, -1)), NME from the
    last one's psi, its own peptide bond trans.
    """
    placed = neighbours(frames, torsions, types)
    return torch.cat([placed[..., 0, _ACE, :], placed[..., -1, _NME, :]], dim=-2)


def terminal_oxygen(frames: Frames, torsions: Tensor, types: Tensor) -> Tensor:
    """(..., 3) nm: OXT of a chain that ends without a cap, from the last residue's psi."""
    return neighbours(frames, torsions, types)[..., -1, _OXT[0], :]


def frames_of(atoms: Tensor) -> Frames:
    """Backbone frames of atoms (..., N, 14, 3) nm, or of their first three slots alone."""
    return from_backbone(atoms[..., _N, :], atoms[..., _CA, :], atoms[..., _C, :])


def rigid_frames(atoms: Tensor, types: Tensor) -> Frames:
    """Frames (..., N) that stand for atoms (..., N, 14, 3): where ideal residues lie best.

    Those of `frames_of`, turned in the plane of N, CA and C by half of what N-CA-C is wider than
    the ideal angle, so that N and C each miss by that half. Of ideal residues both are the same.
    Else all is missed by N, and atoms built from frames of a simulation (AAAAA, ff14SB, 400 K) have
    phi off by -4.5 ± 7.5 degrees and psi by 2.6 ± 4.2, instead of -2.0 ± 3.9 and 1.0 ± 2.8.
    """
    frames = frames_of(atoms)
    ideal = _tables(types.device, atoms.dtype).positions[types][..., _N, :]
    real = frames.invert_apply(atoms[..., _N : _N + 1, :])[..., 0, :]
    half = (_angle_in_plane(real) - _angle_in_plane(ideal)) / 2
    zero, one = torch.zeros_like(half), torch.ones_like(half)
    rows = [half.cos(), -half.sin(), zero, half.sin(), half.cos(), zero, zero, zero, one]
    turn = torch.stack(rows, dim=-1).reshape(*half.shape, 3, 3)
    return Frames(frames.rotations @ turn, frames.translations)


def torsions_of(atoms: Tensor, types: Tensor, caps: Tensor | None = None) -> Tensor:
    """(..., N, 7) torsions in radians, NaN where undefined or where an atom is NaN.

    Psi is that of N-CA-C-O plus pi: what places O, and what a residue says alone. It equals the
    psi of :func:`backbone_torsions` where the peptide group is planar.

    Args:
        atoms: (..., N, 14, 3) nm; slots that are empty or missing are NaN or masked by the type.
        types: (..., N).
        caps: (..., 5, 3) nm in the order of CAPS; they give the first residue omega and phi.
    """
    omega, phi, _ = backbone_torsions(atoms, caps).unbind(-1)
    oxygen = _dihedral(*(atoms[..., i, :] for i in (_N, _CA, _C, _O)))
    psi = torch.remainder(oxygen, 2 * math.pi) - math.pi
    index = _tables(types.device, atoms.dtype).chis[types].flatten(-2)
    index = index.expand(*atoms.shape[:-2], 16)
    chosen = torch.gather(atoms, -2, index[..., None].expand(*index.shape, 3))
    chi = _dihedral(*chosen.reshape(*index.shape[:-1], 4, 4, 3).unbind(-2))
    every = torch.cat([torch.stack([omega, phi, psi], dim=-1), chi], dim=-1)
    return every.masked_fill(~has_torsion(types), math.nan)


def backbone_torsions(atoms: Tensor, caps: Tensor | None = None) -> Tensor:
    """(..., N, 3) omega, phi, psi from the residues' N, CA and C alone, NaN at ends without caps.

    These are mdtraj's compute_omega, compute_phi and compute_psi; omega belongs to the bond
    before the residue, as everywhere here.
    """
    n, ca, c = (atoms[..., i, :] for i in (_N, _CA, _C))
    end = torch.full_like(n[..., :1, :], math.nan)
    first = last = (end, end)
    if caps is not None:
        first = (caps[..., 0:1, :], caps[..., 1:2, :])
        last = (caps[..., 3:4, :], end)
    before_ca = torch.cat([first[0], ca[..., :-1, :]], dim=-2)
    before_c = torch.cat([first[1], c[..., :-1, :]], dim=-2)
    after_n = torch.cat([n[..., 1:, :], last[0]], dim=-2)
    omega = _dihedral(before_ca, before_c, n, ca)
    return torch.stack([omega, _dihedral(before_c, n, ca, c), _dihedral(n, ca, c, after_n)], dim=-1)


def chain_frames(torsions: Tensor, types: Tensor) -> Frames:
    """Frames of a chain with ideal bonds from its torsions; the first one is the identity.

    Residue i + 1 lies such that CA, C of residue i and its own N, placed by psi of residue i, fall
    on the same three atoms placed by omega and phi of residue i + 1.

    Args:
        torsions: (..., N, 7, 2) sine and cosine; chi is not looked at.
        types: (..., N).
    """
    shape = torsions.shape[:-2]
    eye = torch.eye(3, dtype=torsions.dtype, device=torsions.device).expand(*shape, 3, 3)
    zero = torsions.new_zeros(*shape, 3)
    types = types.expand(shape)
    own = Frames(eye, zero)
    atoms, _ = to_atoms(own, torsions, types)
    placed = neighbours(own, torsions, types)
    here = from_backbone(atoms[..., _CA, :], atoms[..., _C, :], placed[..., _NME[0], :])
    there = from_backbone(placed[..., _ACE[0], :], placed[..., _ACE[1], :], atoms[..., _N, :])
    inverse = there.rotations.mT
    back = Frames(inverse, -(inverse @ there.translations[..., None])[..., 0])
    chain = [_one(own, 0)]
    for i in range(1, types.shape[-1]):
        chain.append(chain[-1].compose(_one(here, i - 1).compose(_one(back, i))))
    return Frames(
        torch.stack([f.rotations for f in chain], dim=-3),
        torch.stack([f.translations for f in chain], dim=-2),
    )


def renamed(atoms: Tensor, types: Tensor) -> Tensor:
    """Atoms (..., N, 14, 3) with the names of symmetric pairs (residues.SYMMETRIC) exchanged."""
    index = _tables(types.device, atoms.dtype).swaps[types].expand(atoms.shape[:-1])
    return torch.gather(atoms, -2, index[..., None].expand(atoms.shape))


def turned_over(torsions: Tensor, types: Tensor) -> Tensor:
    """Torsions (..., N, 7, 2), as sine and cosine, under the other names of symmetric atoms.

    The last chi of ASP, GLU, PHE and TYR turns by pi.
    """
    sign = _tables(types.device, torsions.dtype).signs[types]
    return torsions * sign[..., None]


def canonical(atoms: Tensor, types: Tensor) -> Tensor:
    """Atoms (..., N, 14, 3) named as IUPAC says: symmetric pairs have one naming only.

    The last chi of ASP, GLU, PHE and TYR is brought into [-pi/2, pi/2), and of arginine's NH1 and
    NH2 the first is the one cis to CD.
    """
    # Whether the first atom of a pair is the wrong one, by its torsion about the bond before it.
    chi = torsions_of(atoms, types)[..., 3:]
    last = torch.full(types.shape, math.nan, dtype=atoms.dtype, device=atoms.device)
    last = last.expand(chi.shape[:-1]).clone()
    for code in amino.SYMMETRIC:
        here = (types == amino.CODES.index(code)).expand(last.shape)
        if code == "R":
            names = [amino.slot(code, name) for name in ("CD", "NE", "CZ", "NH1")]
            value = _dihedral(*(atoms[..., i, :] for i in names))
        else:
            value = chi[..., len(amino.CHIS[code]) - 1]
        last = torch.where(here, value, last)
    wrong = (last < -math.pi / 2) | (last >= math.pi / 2)  # false for NaN
    return torch.where(wrong[..., None, None], renamed(atoms, types), atoms)


def named_like(atoms: Tensor, reference: Tensor, types: Tensor) -> Tensor:
    """Atoms (..., N, 14, 3) with the naming of each residue's symmetric pairs nearer to reference.

    Both are compared in the axes of their own residues, so no superposition is needed.
    """
    local = frames_of(reference).invert_apply(reference)
    other = renamed(atoms, types)
    frames = frames_of(atoms)
    error = [
        (frames.invert_apply(a) - local).nan_to_num().square().sum((-1, -2)) for a in (atoms, other)
    ]
    return torch.where((error[1] < error[0])[..., None, None], other, atoms)


def _one(frames: Frames, residue: int) -> Frames:
    """(...) frames of one residue of frames (..., N)."""
    return Frames(frames.rotations[..., residue, :, :], frames.translations[..., residue, :])


def _angle_in_plane(points: Tensor) -> Tensor:
    """(...) radians from the first axis to points (..., 3) of the plane of the first two."""
    return torch.atan2(points[..., 1], points[..., 0])


def _about_first(torsions: Tensor) -> Tensor:
    """(..., 3, 3) rotations about the first axis by pairs (..., 2) of sine and cosine."""
    sin, cos = torsions.unbind(-1)
    zero, one = torch.zeros_like(sin), torch.ones_like(sin)
    rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    return torch.stack(rows, dim=-1).reshape(*sin.shape, 3, 3)


def _pick(groups: Frames, index: Tensor) -> Frames:
    """(..., N, P) frames: for each of P points the one of its group, index (..., N, P)."""
    index = index.expand(*groups.translations.shape[:-2], index.shape[-1])
    rotations = torch.gather(
        groups.rotations, -3, index[..., None, None].expand(*index.shape, 3, 3)
    )
    translations = torch.gather(groups.translations, -2, index[..., None].expand(*index.shape, 3))
    return Frames(rotations, translations)


def _dihedral(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """(...) torsions in (-pi, pi] of four points (..., 3) each."""
    axis = c - b
    left = torch.linalg.cross(axis, a - b)
    right = torch.linalg.cross(axis, d - c)
    length = torch.linalg.vector_norm(axis, dim=-1)
    sine = (torch.linalg.cross(left, right) * axis).sum(-1) / length
    return torch.atan2(sine, (left * right).sum(-1))
