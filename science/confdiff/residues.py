"""The twenty amino acids: names of their heavy atoms, torsions, and ideal rigid groups.

A residue is a tree of rigid groups. The root is the backbone (N, CA, C, CB). A torsion turns one
group about a bond of its parent: psi carries O and the next N; chi1 to chi4 carry the side chain;
phi carries the C of the residue before, and omega, beyond it, that residue's CA and O. The last
three carry the caps ACE and NME as well.

Imports no torch. Coordinates come from PeptideBuilder's standard geometry (Tien et al. 2013).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparring.launch.errors import SparringError
from sparring.science.confdiff.rows import TORSIONS

CODES = "ARNDCQEGHILKMFPSTWYV"
"""One-letter codes; a residue's type is its place here (AlphaFold's order)."""
_NAMES = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL"
THREE_LETTERS = dict(zip(CODES, _NAMES.split(), strict=True))
ONE_LETTER = {
    **{name: code for code, name in THREE_LETTERS.items()},
    # Force fields name a residue by its protonation; crystals have selenomethionine for phasing.
    **dict.fromkeys(("HID", "HIE", "HIP", "HSD", "HSE", "HSP"), "H"),
    **dict.fromkeys(("CYX", "CYM"), "C"),
    "ASH": "D",
    "GLH": "E",
    "LYN": "K",
    "MSE": "M",
}
"""Code of a three-letter name, force fields' names of protonation states among them."""

SLOTS = 14
"""Places for heavy atoms in a residue (tryptophan fills them)."""
BACKBONE = ("N", "CA", "C", "O")
_SIDE_CHAINS = {
    "A": "CB",
    "R": "CB CG CD NE CZ NH1 NH2",
    "N": "CB CG OD1 ND2",
    "D": "CB CG OD1 OD2",
    "C": "CB SG",
    "Q": "CB CG CD OE1 NE2",
    "E": "CB CG CD OE1 OE2",
    "G": "",
    "H": "CB CG ND1 CD2 CE1 NE2",
    "I": "CB CG1 CG2 CD1",
    "L": "CB CG CD1 CD2",
    "K": "CB CG CD CE NZ",
    "M": "CB CG SD CE",
    "F": "CB CG CD1 CD2 CE1 CE2 CZ",
    "P": "CB CG CD",
    "S": "CB OG",
    "T": "CB OG1 CG2",
    "W": "CB CG CD1 CD2 NE1 CE2 CE3 CZ2 CZ3 CH2",
    "Y": "CB CG CD1 CD2 CE1 CE2 CZ OH",
    "V": "CB CG1 CG2",
}
ATOMS = {code: (*BACKBONE, *side.split()) for code, side in _SIDE_CHAINS.items()}
"""Names of the heavy atoms of each code, in the order of the 14 slots."""

_PATHS = {
    "R": "CG CD NE CZ",
    "N": "CG OD1",
    "D": "CG OD1",
    "C": "SG",
    "Q": "CG CD OE1",
    "E": "CG CD OE1",
    "H": "CG ND1",
    "I": "CG1 CD1",
    "L": "CG CD1",
    "K": "CG CD CE NZ",
    "M": "CG SD CE",
    "F": "CG CD1",
    "P": "CG CD",
    "S": "OG",
    "T": "OG1",
    "W": "CG CD1",
    "Y": "CG CD1",
    "V": "CG1",
}


def _chis(code: str) -> tuple[tuple[str, str, str, str], ...]:
    path = ["N", "CA", "CB", *_PATHS.get(code, "").split()]
    return tuple(
        (a, b, c, d) for a, b, c, d in zip(path, path[1:], path[2:], path[3:], strict=False)
    )


CHIS = {code: _chis(code) for code in CODES}
"""Four atoms of each of the torsions chi1 to chi4 that a code has (IUPAC-IUB 1970)."""

SYMMETRIC: Mapping[str, tuple[tuple[str, str], ...]] = {
    "D": (("OD1", "OD2"),),
    "E": (("OE1", "OE2"),),
    "F": (("CD1", "CD2"), ("CE1", "CE2")),
    "Y": (("CD1", "CD2"), ("CE1", "CE2")),
    "R": (("NH1", "NH2"),),
}
"""Pairs of atoms whose names may be exchanged (all pairs of a code at once) without another
molecule. Arginine's chi torsions do not change by it; the last one of the others turns by pi."""

_REMOTENESS = "BGDEZH"  # beta, gamma, ... : the second letter of a side chain's atom

NEIGHBOURS = ("previous C", "previous CA", "previous O", "next N", "next CA", "OXT")
"""Atoms of the bonds before and after a residue that its groups place, with trans omega after it.
In a capped chain they are C, CH3 and O of ACE before the first residue, N and C of NME after the
last; OXT is the second oxygen of a chain's end without cap."""
_NEIGHBOUR_GROUPS = (2, 1, 1, 3, 3, 3)
PARENTS = (2, 0, 0, 0, 4, 5, 6)
"""Group that each torsion turns against. Group 0 is the backbone, group 1 + k is that of torsion k
in the order of `rows.TORSIONS`."""
ORDER = (1, 0, 2, 3, 4, 5, 6)
"""Torsions such that parents come first."""


class Geometry(NamedTuple):
    """Ideal coordinates of all types in nm, float64, in the axes of rigid groups.

    A torsion about the bond B-C of A-B-C-D has a frame: origin C, first axis from B to C, A in the
    half plane of the second axis. Turned about the first axis by the torsion's value it holds D
    in that half plane.
    """

    positions: npt.NDArray[np.float64]
    """(20, 14, 3) of each atom in its own group's frame, zero where there is none."""
    groups: npt.NDArray[np.int64]
    """(20, 14) group of each atom."""
    exists: npt.NDArray[np.bool_]
    """(20, 14) whether a type has an atom in this slot."""
    has_torsion: npt.NDArray[np.bool_]
    """(20, 7) whether a type has this torsion."""
    rotations: npt.NDArray[np.float64]
    """(20, 7, 3, 3) axes of a torsion's frame at torsion 0, in its parent group's frame."""
    origins: npt.NDArray[np.float64]
    """(20, 7, 3) its origin there."""
    neighbours: npt.NDArray[np.float64]
    """(20, 6, 3) of NEIGHBOURS in the frames of their groups, see `neighbour_groups`."""
    neighbour_groups: npt.NDArray[np.int64]
    """(6,)."""
    rest: npt.NDArray[np.float64]
    """(20, 7) radians: torsions of PeptideBuilder's models (extended, common rotamers), 0 where
    there is none."""


def encode(sequence: str) -> list[int]:
    """Types of a sequence of one-letter codes.

    Raises:
        SparringError: a letter that is none of the twenty, or no letter at all.
    """
    if not sequence:
        raise SparringError("the sequence is empty; give the one-letter codes of its residues")
    for place, letter in enumerate(sequence):
        if letter not in CODES:
            raise SparringError(
                f"residue {place + 1} of {sequence[:40]} is {letter!r}; known are {CODES} "
                "(capital letters)"
            )
    return [CODES.index(letter) for letter in sequence]


def slot(code: str, atom: str) -> int:
    """The slot of an atom's name."""
    return ATOMS[code].index(atom)


def atom_group(code: str, atom: str) -> int:
    """The rigid group that an atom of a residue belongs to."""
    if atom == "O":
        return 1 + TORSIONS.index("psi")
    if atom in BACKBONE:
        return 0
    turned = min(_REMOTENESS.index(atom[1]), len(CHIS[code]))
    return TORSIONS.index("chi1") + turned if turned else 0


def torsion_atoms(code: str, torsion: int) -> tuple[str, str, str, str] | None:
    """Names A, B, C, D of a torsion's atoms, from the root of the tree outwards."""
    backbone = {
        "omega": ("CA", "N", "previous C", "previous CA"),
        "phi": ("C", "CA", "N", "previous C"),
        "psi": ("N", "CA", "C", "next N"),
    }
    name = TORSIONS[torsion]
    if name in backbone:
        return backbone[name]
    chi = torsion - TORSIONS.index("chi1")
    return CHIS[code][chi] if chi < len(CHIS[code]) else None


def triad(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """(3, 3) axes in columns: the first from b to c, a in the half plane of the second."""
    a, b, c = (np.asarray(x, dtype=np.float64) for x in (a, b, c))
    first = (c - b) / np.linalg.norm(c - b)
    second = (a - b) - ((a - b) @ first) * first
    second /= np.linalg.norm(second)
    return np.stack([first, second, np.cross(first, second)], axis=-1)


@cache
def geometry() -> Geometry:
    """The ideal geometry of the twenty types.

    Raises:
        SparringError: PeptideBuilder is not installed.
    """
    types = len(CODES)
    table = Geometry(
        positions=np.zeros((types, SLOTS, 3)),
        groups=np.zeros((types, SLOTS), dtype=np.int64),
        exists=np.zeros((types, SLOTS), dtype=np.bool_),
        has_torsion=np.zeros((types, len(TORSIONS)), dtype=np.bool_),
        rotations=np.tile(np.eye(3), (types, len(TORSIONS), 1, 1)),
        origins=np.zeros((types, len(TORSIONS), 3)),
        neighbours=np.zeros((types, len(NEIGHBOURS), 3)),
        neighbour_groups=np.array(_NEIGHBOUR_GROUPS),
        rest=np.zeros((types, len(TORSIONS))),
    )
    for number, code in enumerate(CODES):
        _measure(table, number, code)
    for array in table:
        array.flags.writeable = False
    return table


def _measure(table: Geometry, number: int, code: str) -> None:
    """Fill one type's entries from a model of it."""
    model = _model(code)
    origin, axes = _groups_of(model, code)
    for torsion, parent in enumerate(PARENTS):
        atoms = torsion_atoms(code, torsion)
        if atoms is None:
            continue
        a, b, c, _ = (model[name] for name in atoms)
        at_zero = triad(a, b, c)
        second = at_zero.T @ axes[1 + torsion][:, 1]
        table.has_torsion[number, torsion] = True
        table.rest[number, torsion] = np.arctan2(second[2], second[1])
        table.rotations[number, torsion] = axes[parent].T @ at_zero
        table.origins[number, torsion] = axes[parent].T @ (c - origin[parent])
    for place, atom in enumerate(ATOMS[code]):
        group = atom_group(code, atom)
        table.exists[number, place] = True
        table.groups[number, place] = group
        table.positions[number, place] = axes[group].T @ (model[atom] - origin[group])
    for place, (atom, group) in enumerate(zip(NEIGHBOURS, _NEIGHBOUR_GROUPS, strict=True)):
        table.neighbours[number, place] = axes[group].T @ (model[atom] - origin[group])


def _groups_of(
    model: dict[str, npt.NDArray[np.float64]], code: str
) -> tuple[list[npt.NDArray[np.float64]], list[npt.NDArray[np.float64]]]:
    """Origins (3,) and axes (3, 3) of a model's eight groups, turned by the model's torsions."""
    # The backbone frame of frames.from_backbone: origin CA, first axis to C, N in the plane.
    origins, axes = [model["CA"]], [triad(model["N"], model["CA"], model["C"])]
    for torsion in range(len(TORSIONS)):
        atoms = torsion_atoms(code, torsion)
        if atoms is None:
            origins.append(origins[0])
            axes.append(axes[0])
            continue
        _, b, c, d = (model[name] for name in atoms)
        # D lies in the half plane of the second axis once the frame is turned by the torsion.
        origins.append(c)
        axes.append(triad(d, b, c))
    return origins, axes


def _model(code: str) -> dict[str, npt.NDArray[np.float64]]:
    """Coordinates in nm of a residue between two glycines, all peptide bonds trans."""
    try:
        import PeptideBuilder
    except ModuleNotFoundError:
        raise SparringError(
            'protein geometry needs PeptideBuilder: pip install "sparring[proteins]"'
        ) from None
    geos = [PeptideBuilder.Geometry.geometry(letter) for letter in f"G{code}G"]
    if code == "L":
        # PeptideBuilder 1.1 has CD2 on CD1's other side (66.7 degrees), which is D-like: in real
        # leucine it follows CD1 by 120 degrees, as CG2 follows CG1 in its valine.
        geos[1].CA_CB_CG_CD2_diangle = geos[1].CA_CB_CG_CD1_diangle + 120
    with warnings.catch_warnings():  # its trigonometry divides by zero before it takes the limit
        warnings.simplefilter("ignore", RuntimeWarning)
        structure = PeptideBuilder.make_structure_from_geos(geos)
    before, residue, after = structure[0]["A"]
    model = {atom.name: np.asarray(atom.coord, dtype=np.float64) / 10 for atom in residue}
    for name in ("C", "CA", "O"):
        model[f"previous {name}"] = np.asarray(before[name].coord, dtype=np.float64) / 10
    for name in ("N", "CA"):
        model[f"next {name}"] = np.asarray(after[name].coord, dtype=np.float64) / 10
    # The two oxygens of a carboxylate mirror each other in the bond CA-C.
    along = triad(model["N"], model["CA"], model["C"])[:, 0]
    bond = model["O"] - model["C"]
    model["OXT"] = model["C"] + 2 * (bond @ along) * along - bond
    return model
