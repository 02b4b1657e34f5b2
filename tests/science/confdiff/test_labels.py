"""Labels of rows: completeness, agreement with direct evaluation, order, and bad rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sparring.launch.errors import SparringError
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff import labels, structures
from sparring.science.confdiff.physics import Molecule, Potential
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import atoms_array, forces_array, torsions_array


def rows_of(sequence: str, capped: bool, count: int = 2, shake: float = 0.2) -> list[Conformation]:
    """Ideal chains near the extended one."""
    generator = np.random.default_rng(len(sequence))
    torsions = np.tile(np.asarray(atom14.standard_torsions(sequence)), (count, 1, 1))
    torsions[..., 1:3] += shake * generator.standard_normal(torsions[..., 1:3].shape)
    types = atom14.types_of(sequence)
    turns = atom14.sincos(atom14.torch.from_numpy(torsions))
    frames = atom14.chain_frames(turns, types)
    atoms = np.asarray(atom14.to_atoms(frames, turns, types)[0])
    caps = np.asarray(atom14.cap_atoms(frames, turns, types)) if capped else None
    return structures.rows_of(sequence, atoms, caps)


@pytest.fixture(scope="module")
def labelled() -> tuple[list[Conformation], list[Conformation], list[int]]:
    """Rows of two chains, mixed, one of them with labels already."""
    first, second = rows_of("GSA", True), rows_of("KD", False)
    done = dataclasses.replace(second[0], energy=1.5, forces=np.ones((2, 6), np.float32).tobytes())
    rows = [first[0], done, first[1], second[1]]
    calls: list[int] = []
    return rows, labels.label(rows, platform="Reference", progress=calls.append), calls


def test_order_and_what_stays(
    labelled: tuple[list[Conformation], list[Conformation], list[int]],
) -> None:
    rows, found, calls = labelled
    assert calls == [1, 2, 3]
    assert found[1] is rows[1]
    for before, after in zip(rows, found, strict=True):
        kept = ("chain", "number", "sequence", "capped", "atoms", "torsions", "temperature")
        assert all(getattr(before, name) == getattr(after, name) for name in kept)
        assert after.energy is not None
        assert forces_array(after).shape == (len(after.sequence), 6)
    assert labels.label(found) == found


def test_label_is_a_minimum_over_hydrogens(
    labelled: tuple[list[Conformation], list[Conformation], list[int]],
) -> None:
    _, found, _ = labelled
    row = found[0]
    molecule = Molecule("GSA", capped=True)
    heavy = molecule.place_heavy(atoms_array(row)[None], torsions_array(row)[None])
    relaxation = labels.Relaxation(molecule, platform="Reference")
    before = relaxation.add_hydrogens(heavy)
    energy = Potential(molecule, "Reference")(before).energies[0]
    assert row.energy is not None
    assert row.energy < energy
    # No net force and no net torque on the whole, whatever was held.
    forces = forces_array(row).astype(np.float64)
    assert np.abs(forces[:, :3].sum(0)).max() < 1e-3 * np.abs(forces).max()
    ca = atoms_array(row)[:, 1]
    torque = forces[:, 3:] + np.cross(ca, forces[:, :3])
    assert np.abs(torque.sum(0)).max() < 2e-3 * np.abs(forces).max()


def test_forces_are_the_slope_of_labels(
    labelled: tuple[list[Conformation], list[Conformation], list[int]],
) -> None:
    """At a minimum over hydrogens, moving a residue's heavy atoms changes the label by its force.

    The envelope theorem: hydrogens follow, and the force on them is nearly nothing. This would
    fail with the force of a restraint in the label.
    """
    row = labelled[1][0]
    molecule = Molecule("GSA", capped=True)
    relaxation = labels.Relaxation(molecule, tolerance=0.02, platform="Reference")
    heavy = molecule.place_heavy(atoms_array(row)[None], torsions_array(row)[None])
    positions = relaxation.minimise(relaxation.add_hydrogens(heavy))
    own = molecule.owners == 1
    forces = labels.rigid_forces(molecule, positions, relaxation.potential(positions).forces)[0, 1]
    h = 1e-4
    for axis in range(3):
        energies = []
        for sign in (1, -1):
            moved = positions.copy()
            moved[:, own, axis] += sign * h
            energies.append(relaxation.potential(relaxation.minimise(moved)).energies[0])
        slope = -(energies[0] - energies[1]) / (2 * h)
        assert slope == pytest.approx(forces[axis], abs=0.02 * np.abs(forces).max())


def test_missing_atoms_are_completed() -> None:
    whole = rows_of("GFA", True, 1)[0]
    atoms = atoms_array(whole)
    atoms[1, 6:] = np.nan
    row = dataclasses.replace(whole, atoms=atoms.tobytes())
    found = labels.label([row])[0]
    assert found.atoms == row.atoms
    assert found.energy is not None
    assert np.isfinite(forces_array(found)).all()


def test_a_relaxed_energy_stands_beside_the_measured_one() -> None:
    row = rows_of("AWA", True, 1)[0]
    thermal = dataclasses.replace(
        row, energy=7.0, energy_kind="thermal", forces=np.ones((3, 6), np.float32).tobytes()
    )
    built, kept = labels.label([row, thermal], platform="Reference", relaxed=True)
    assert (built.energy_kind, kept.energy_kind) == ("hydrogens", "thermal")
    assert (kept.energy, kept.forces) == (7.0, thermal.forces)
    assert built.energy is not None
    assert built.relaxed_energy is not None
    assert built.relaxed_energy < built.energy
    assert kept.relaxed_energy == pytest.approx(built.relaxed_energy)
    assert labels.label([built, kept], platform="Reference", relaxed=True) == [built, kept]


def test_minimised_energies() -> None:
    rows = rows_of("AFA", True, 3)
    atoms = np.stack([atoms_array(row) for row in rows])
    torsions = np.stack([torsions_array(row) for row in rows])
    energies = labels.minimised_energies("AFA", atoms, torsions, capped=True)
    labelled = [row.energy for row in labels.label(rows)]
    assert (energies < np.array(labelled, dtype=float)).all()
    # Moving an ensemble as a whole changes nothing.
    assert labels.minimised_energies("AFA", atoms + 1, torsions, capped=True) == pytest.approx(
        energies, abs=0.5
    )
    for broken in (
        np.nan,
        atoms[1, :1, :1],
        atoms[1, :1],
    ):  # missing; all atoms, all residues on one
        atoms[1] = broken
        bad = labels.minimised_energies("AFA", atoms, torsions, capped=True)
        assert np.isnan(bad[1])
        assert bad[[0, 2]] == pytest.approx(energies[[0, 2]], abs=0.5)


def test_bad_rows_are_named() -> None:
    row = dataclasses.replace(rows_of("AAG", False)[1], number=17, chain="mine")
    atoms = atoms_array(row)
    atoms[1] = atoms[0]
    bad = dataclasses.replace(row, atoms=atoms.tobytes())
    with pytest.raises(SparringError, match=r"structure 17 of mine: .*atoms lie on each other"):
        labels.label([bad], platform="Reference")
    with pytest.raises(SparringError, match="peptide A has one residue"):
        labels.label([dataclasses.replace(rows_of("A", True)[0], capped=False)])
