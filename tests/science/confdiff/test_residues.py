"""Names, torsions and ideal geometry of the twenty amino acids."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import openmm.app
import pytest

from sparring.launch.errors import SparringError
from sparring.science.confdiff import residues
from sparring.science.confdiff.residues import ATOMS, CHIS, CODES, SYMMETRIC, THREE_LETTERS
from sparring.science.confdiff.rows import TORSIONS

DATA = f"{openmm.app.__path__[0]}/data"


def test_names_are_openmms() -> None:
    tree = ElementTree.parse(f"{DATA}/amber14/protein.ff14SB.xml")
    templates = {
        t.attrib["name"]: {a.attrib["name"] for a in t.findall("Atom")}
        for t in tree.iter("Residue")
    }
    for code, three in THREE_LETTERS.items():
        template = templates["HIE" if three == "HIS" else three]
        assert set(ATOMS[code]) == {name for name in template if not name.startswith("H")}, three
        assert len(ATOMS[code]) <= residues.SLOTS
        assert (
            ATOMS[code][: 4 if code == "G" else 5]
            == ("N", "CA", "C", "O", "CB")[: len(ATOMS[code])]
        )


def test_chis_go_along_bonds() -> None:
    tree = ElementTree.parse(f"{DATA}/residues.xml")
    bonds = {
        residue.attrib["name"]: {
            frozenset((b.attrib["from"], b.attrib["to"])) for b in residue.findall("Bond")
        }
        for residue in tree.iter("Residue")
    }
    for code, chis in CHIS.items():
        for atoms in chis:
            for pair in pairwise(atoms):
                assert frozenset(pair) in bonds[THREE_LETTERS[code]], (code, atoms)
    assert {code: len(chis) for code, chis in CHIS.items()} == {
        **dict.fromkeys("AG", 0), **dict.fromkeys("CSTV", 1), **dict.fromkeys("DFHILNPWY", 2),
        **dict.fromkeys("EMQ", 3), **dict.fromkeys("KR", 4),
    }  # fmt: skip


def test_geometry_has_sensible_bonds() -> None:
    """Bond lengths between atoms of the same rigid group, from their elements alone."""
    table = residues.geometry()
    assert table.exists.sum() == sum(len(names) for names in ATOMS.values())
    assert table.positions[CODES.index("A"), 2] == pytest.approx([0.152, 0, 0], abs=1e-12)
    oxygen = table.positions[:, ATOMS["A"].index("O")]
    assert (oxygen[:, 1] < 0).all()  # opposite to the next N, whose torsion is psi
    assert np.abs(oxygen[:, 2]).max() < 1e-8
    assert (table.neighbours[:, residues.NEIGHBOURS.index("next N"), 1] > 0).all()
    lengths = np.linalg.norm(table.neighbours[:, residues.NEIGHBOURS.index("OXT")], axis=-1)
    assert lengths == pytest.approx(0.123, abs=1e-6)


def test_l_amino_acids() -> None:
    table = residues.geometry()
    n, ca, c, _, cb = np.moveaxis(table.positions[:, :5], 1, 0)
    handed = np.einsum("ri,ri->r", np.cross(n - ca, c - ca), cb - ca)
    is_glycine = np.array([code == "G" for code in CODES])
    assert (handed[~is_glycine] > 1e-3).all()


def test_side_chain_stereochemistry() -> None:
    """(2S,3R)-threonine, (2S,3S)-isoleucine; pro-R and pro-S methyls of valine and leucine."""
    table = residues.geometry()
    branches = (
        ("T", "OG1", "CG2", -1),
        ("I", "CG1", "CG2", -1),
        ("V", "CG1", "CG2", 1),
        ("L", "CD1", "CD2", 1),
    )
    for code, first, second, sign in branches:
        a, b = (table.positions[CODES.index(code), residues.slot(code, x)] for x in (first, second))
        turn = np.degrees(np.arctan2(b[2], b[1]) - np.arctan2(a[2], a[1]))
        assert turn == pytest.approx(sign * 120, abs=4), code


def test_tree_of_groups() -> None:
    assert [residues.atom_group("R", name) for name in ATOMS["R"]] == [
        0,
        0,
        0,
        3,
        0,
        4,
        5,
        6,
        7,
        7,
        7,
    ]
    assert {residues.atom_group("W", name) for name in ATOMS["W"][6:]} == {5}
    done: set[int] = set()
    for torsion in residues.ORDER:
        assert residues.PARENTS[torsion] in {0, *(1 + t for t in done)}
        done.add(torsion)
    assert len(done) == len(TORSIONS)


def test_symmetric_pairs_exist() -> None:
    for code, pairs in SYMMETRIC.items():
        for pair in pairs:
            assert all(name in ATOMS[code] for name in pair)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [("AXA", "residue 2 of AXA is 'X'"), ("aa", "residue 1 of aa is 'a'"), ("", "is empty")],
)
def test_unknown_letters(sequence: str, message: str) -> None:
    with pytest.raises(SparringError, match=re.escape(message)):
        residues.encode(sequence)
    assert residues.encode("ARV") == [0, 1, 19]


def test_imports_no_torch() -> None:
    code = (
        "import sys; from sparring.science.confdiff import residues; "
        "sys.exit('torch' in sys.modules or 'openmm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_peptidebuilder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PeptideBuilder", None)
    residues.geometry.cache_clear()
    try:
        with pytest.raises(SparringError, match=re.escape('pip install "sparring[proteins]"')):
            residues.geometry()
    finally:
        monkeypatch.undo()
        residues.geometry()
