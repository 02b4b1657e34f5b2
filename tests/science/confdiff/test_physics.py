"""OpenMM energies, forces, their projection on rigid residues, hydrogens and minimisation."""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy as np
import openmm
import openmm.app
import pytest
from scipy.spatial.transform import Rotation

from sparring.launch.errors import SparringError
from sparring.science.confdiff import physics, relaxation, structures
from sparring.science.confdiff.physics import Molecule, Potential, rigid_forces
from sparring.science.confdiff.relaxation import Relaxation, complete
from sparring.science.confdiff.residues import CODES
from sparring.science.confdiff.structures import atoms_array, torsions_array

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def alanines() -> Molecule:
    return Molecule("AAAAA", capped=True)


@pytest.fixture(scope="module")
def every() -> Molecule:
    return Molecule(CODES, capped=False)


def shaken(molecule: Molecule, count: int = 2) -> np.ndarray:
    """The template with every atom moved by a few picometres."""
    noise = RNG.standard_normal((count, *molecule.template.shape))
    return molecule.template + 0.003 * noise


@pytest.mark.parametrize("sequence", ["AAAAA", "YYDPETGTWY"])
def test_native_obc_is_the_xmls(sequence: str) -> None:
    """GBSAOBCForce against implicit/obc2.xml's CustomGBForce, on double precision."""
    molecule = Molecule(sequence)
    forcefield = openmm.app.ForceField("amber14/protein.ff14SB.xml", "implicit/obc2.xml")
    system = forcefield.createSystem(molecule.topology, nonbondedMethod=openmm.app.NoCutoff)
    reference = physics.context(system, openmm.VerletIntegrator(0.001), "Reference")
    for platform, tolerance in (("Reference", 4e-4), ("CPU", 2e-2)):
        positions = shaken(molecule, 1)
        ours = Potential(molecule, platform)(positions)  # type: ignore[arg-type]
        reference.setPositions(positions[0])
        state = reference.getState(energy=True, forces=True)
        assert abs(state.getPotentialEnergy()._value - ours.energies[0]) <= tolerance
        forces = state.getForces(asNumpy=True)._value
        assert np.abs(forces - ours.forces[0]).max() < (1e-3 if platform == "Reference" else 1)
    kinds = {type(force) for force in molecule.system().getForces()}
    assert openmm.GBSAOBCForce in kinds
    assert openmm.CustomGBForce not in kinds


def test_solvents(alanines: Molecule) -> None:
    energies = {
        solvent: Potential(Molecule("AAAAA", True, solvent), "Reference")(  # type: ignore[arg-type]
            alanines.template[None]
        ).energies[0]
        for solvent in ("obc2", "gbn2", "vacuum")
    }
    assert energies["obc2"] == pytest.approx(energies["gbn2"], abs=20)
    assert energies["vacuum"] - energies["obc2"] > 80  # solvation of six peptide groups


def test_forces_are_minus_the_gradient(alanines: Molecule) -> None:
    potential, h = Potential(alanines, "Reference"), 1e-5
    position = shaken(alanines, 1)[0]
    forces = potential(position[None]).forces[0]
    for atom in RNG.choice(len(position), 12, replace=False):
        for axis in range(3):
            moved = np.stack([position, position])
            moved[:, atom, axis] += [h, -h]
            plus, minus = potential(moved).energies
            # The first label defect of the authors' code would be a sign here.
            assert -(plus - minus) / (2 * h) == pytest.approx(forces[atom, axis], abs=2e-3)


def test_no_constraint_and_no_restraint(alanines: Molecule) -> None:
    system = alanines.system()
    assert system.getNumConstraints() == 0
    external = (openmm.CustomExternalForce, openmm.CMMotionRemover)
    assert not any(isinstance(force, external) for force in system.getForces())
    assert alanines.system(constraints=True).getNumConstraints() == alanines.hydrogen.sum()
    heavy = alanines.system(hydrogen_mass=3.0)
    for atom in np.flatnonzero(alanines.hydrogen):
        assert heavy.getParticleMass(int(atom))._value == pytest.approx(3.0)
    total = sum(s.getParticleMass(i)._value for i in range(62) for s in (heavy,))
    assert total == pytest.approx(sum(system.getParticleMass(i)._value for i in range(62)))


@pytest.mark.parametrize("capped", [True, False])
def test_projection_is_the_derivative_of_rigid_motions(capped: bool) -> None:
    """F and tau of a residue, caps with their neighbours, against finite differences of E."""
    molecule = Molecule("AKWG", capped)
    potential, h = Potential(molecule, "Reference"), 1e-5
    position = shaken(molecule, 1)[0]
    projected = rigid_forces(molecule, position[None], potential(position[None]).forces)[0]
    for residue in range(4):
        own = molecule.owners == residue
        ca = position[molecule.slots[residue, 1]]
        for axis in range(3):
            step = h * np.eye(3)[axis]
            shifts, turns = np.stack([position] * 2), np.stack([position] * 2)
            for place, sign in enumerate((1, -1)):
                shifts[place, own] += sign * step
                turn = Rotation.from_rotvec(sign * step).as_matrix()
                turns[place, own] = (position[own] - ca) @ turn.T + ca
            for slot, moved in ((axis, shifts), (3 + axis, turns)):
                plus, minus = potential(moved).energies
                assert -(plus - minus) / (2 * h) == pytest.approx(
                    projected[residue, slot], abs=5e-3
                )


def test_total_force_and_torque_vanish(every: Molecule) -> None:
    positions = shaken(every)
    evaluation = Potential(every, "Reference")(positions)
    projected = rigid_forces(every, positions, evaluation.forces)
    scale = np.abs(projected).max()
    assert scale > 100
    assert np.abs(projected[..., :3].sum(1)).max() < 1e-6 * scale
    ca = positions[:, every.slots[:, 1]]
    torque = (projected[..., 3:] + np.cross(ca, projected[..., :3])).sum(1)
    assert np.abs(torque).max() < 1e-6 * scale * np.abs(ca).max()


def test_a_step_along_the_force_lowers_the_energy(every: Molecule) -> None:
    potential = Potential(every)
    position = shaken(every, 1)
    energies, forces = potential(position)
    assert potential(position + 1e-7 * forces).energies < energies


def test_energy_of_moved_and_mirrored_structures() -> None:
    """A rigid motion changes nothing; neither does a mirror, as ff14SB's torsion terms are even.

    So energies cannot guard chirality: that the model's atoms are L is tested in test_residues.
    """
    molecule = Molecule("AT", capped=True)
    turn = Rotation.from_rotvec([0.3, 1, -2]).as_matrix()
    position = shaken(molecule, 1)[0]
    copies = np.stack([position, position @ turn.T + 2, position * [1, 1, -1]])
    energies = Potential(molecule, "Reference")(copies).energies
    assert energies == pytest.approx(np.full(3, energies[0]), abs=1e-8)


def test_nan_and_overlapping_atoms(alanines: Molecule) -> None:
    potential = Potential(alanines, "Reference")
    positions = np.stack([alanines.template] * 3)
    positions[1, 4, 0] = np.nan
    with pytest.raises(SparringError, match="frame 8 of AAAAA has coordinates that are not finite"):
        potential(positions, first=7)
    positions[1] = 0
    with pytest.raises(SparringError, match="a force of frame 1 of AAAAA is not finite: atoms lie"):
        potential(positions)


def test_ranks_of_a_host_have_accelerators_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert physics._device("CUDA") == {}
    for name, value in {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(name, str(value))
    assert physics._device("CPU") == {}
    for count, index in ((0, "3"), (2, "1"), (8, "3")):
        monkeypatch.setattr(physics.torch.cuda, "device_count", lambda count=count: count)
        assert physics._device("CUDA") == {"DeviceIndex": index}


def test_wrong_molecules(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparringError, match="peptide A has one residue"):
        Molecule("A")
    with pytest.raises(SparringError, match="residue 2 of AX is 'X'"):
        Molecule("AX")
    with pytest.raises(SparringError, match="solvent 'tip3p' is unknown"):
        Molecule("AA", solvent="tip3p")  # type: ignore[arg-type]
    with pytest.raises(SparringError, match="OpenMM has no platform 'CUDA' here; it has Reference"):
        physics.context(openmm.System(), openmm.VerletIntegrator(0.001), "CUDA")
    with pytest.raises(SparringError, match='hold must be "heavy" or "backbone"'):
        Relaxation(Molecule("A", capped=True), "all")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(SparringError, match=re.escape('OpenMM: pip install "sparring[proteins]"')):
        physics.openmm_module()


def test_molecule_and_its_slots(every: Molecule) -> None:
    assert np.array_equal(Molecule(CODES).template, every.template)
    names = [atom.name for atom in every.topology.atoms()]
    for place, code in enumerate(CODES):
        slots = every.slots[place]
        assert [names[i] for i in slots[slots >= 0]] == list(structures.ATOMS[code])
    assert names.count("OXT") == 1
    histidine = next(r for r in every.topology.residues() if r.name == "HIS")
    own = {atom.name for atom in histidine.atoms()}
    assert "HE2" in own
    assert "HD1" not in own
    heavy = every.heavy_slots(every.template[None])
    back = every.place_heavy(heavy)
    known = ~every.hydrogen
    assert np.isnan(back[:, ~known]).all()
    assert np.abs(back[0, known] - every.template[known]).max() < 1e-9
    with pytest.raises(SparringError, match="the caps of GA need the torsions"):
        Molecule("GA", capped=True).place_heavy(np.zeros((1, 2, 14, 3)))
    heavy[0, 3, 1] = np.nan
    with pytest.raises(SparringError, match=r"structure 0 of .* lacks heavy atoms"):
        every.place_heavy(heavy)


def test_caps_follow_the_torsions() -> None:
    molecule = Molecule("GVA", capped=True)
    heavy = molecule.heavy_slots(molecule.template[None])
    caps = molecule.template[None, molecule.caps]
    row = structures.rows_of("GVA", heavy, caps)[0]
    again = molecule.place_heavy(atoms_array(row)[None], torsions_array(row)[None])
    assert np.abs(again[0, molecule.caps] - caps[0]).max() < 1e-6


def test_hydrogens_are_put_back(every: Molecule) -> None:
    """Hydrogens of a chain that is folded otherwise: bonds, stereochemistry, no energy lost."""
    relax = Relaxation(every)
    heavy = np.where(every.hydrogen[None, :, None], np.nan, every.template)
    assert np.abs(relax.add_hydrogens(heavy)[0] - every.template).max() < 1e-9
    positions, evaluation = relax(every.heavy_slots(every.template[None]))
    moved = positions[0] - every.template
    assert np.abs(moved[~every.hydrogen]).max() < 1e-9
    assert np.linalg.norm(moved[every.hydrogen], axis=-1).max() < 0.1  # hydroxyls turn
    assert evaluation.energies[0] <= relax.potential(every.template[None]).energies[0] + 1
    assert evaluation.energies[0] == relax.potential(positions).energies[0]


def test_methyls_of_caps_are_free() -> None:
    molecule = Molecule("A", capped=True)
    atoms = list(molecule.topology.atoms())
    held = [(atoms[n].residue.name, atoms[n].name) for n in Relaxation(molecule, "backbone")._held]
    alanine = [("ALA", name) for name in ("N", "CA", "C", "O")]
    assert held == [("ACE", "C"), ("ACE", "O"), *alanine, ("NME", "N")]


def test_backbone_is_restrained_and_the_spring_not_counted() -> None:
    molecule = Molecule("AWA", capped=True)
    types = molecule.heavy_slots(molecule.template[None])
    caps = molecule.template[None, molecule.caps]
    row = structures.rows_of("AWA", types, caps)[0]
    atoms, torsions = atoms_array(row)[None], torsions_array(row)[None]
    free = Relaxation(molecule, "backbone", stiffness=0.0, tolerance=1.0)(atoms, torsions)
    loose, tight = (
        Relaxation(molecule, "backbone", stiffness=k, tolerance=1.0)(atoms, torsions)
        for k in (relaxation.STIFFNESS, 1e6)
    )
    ca = [
        np.linalg.norm(
            p[0, molecule.slots[:, 1]] - molecule.template[molecule.slots[:, 1]], axis=-1
        ).max()
        for p, _ in (free, loose, tight)
    ]
    assert ca[0] > ca[1] > ca[2]
    assert ca[2] < 5e-4
    energy = [e.energies[0] for _, e in (free, loose, tight)]
    assert energy[0] <= energy[1] <= energy[2]
    for positions, evaluation in (free, loose, tight):
        assert evaluation.energies == pytest.approx(Potential(molecule)(positions).energies)


def test_missing_side_chains_are_completed() -> None:
    molecule = Molecule("GFAK", capped=True)
    heavy = molecule.heavy_slots(molecule.template[None])
    caps = molecule.template[None, molecule.caps]
    row = dataclasses.replace(structures.rows_of("GFAK", heavy, caps, "x")[0], number=5)
    assert complete(row) is row
    heavy[0, 1, 6:] = np.nan
    broken = dataclasses.replace(structures.rows_of("GFAK", heavy, caps, "x")[0], number=5)
    whole = complete(broken)
    assert (whole.chain, whole.number, whole.capped) == ("x", 5, True)
    kept = np.isfinite(atoms_array(broken))
    assert np.array_equal(atoms_array(whole)[kept], atoms_array(broken)[kept])
    assert np.isfinite(atoms_array(whole)[1, :11]).all()
    assert np.isfinite(torsions_array(whole)[1, :5]).all()
    relax = Relaxation(molecule, "backbone")
    _, evaluation = relax(atoms_array(whole)[None], torsions_array(whole)[None])
    assert evaluation.energies[0] < 0


def test_disulfide_bonds() -> None:
    molecule = Molecule("GCGGCGC", disulfides=[(1, 4)])
    sulfur = [a for a in molecule.topology.atoms() if a.name == "SG"]
    assert len(molecule.owners) == len(Molecule("GCGGCGC").owners) - 2
    assert any({a, b} == set(sulfur[:2]) for a, b in molecule.topology.bonds())
    heavy = molecule.heavy_slots(molecule.template[None])
    assert physics.disulfides(structures.rows_of("GCGGCGC", heavy)[0]) == ()
    heavy[0, 4, 5] = heavy[0, 1, 5] + [0, 0.205, 0]
    row = structures.rows_of("GCGGCGC", heavy)[0]
    assert physics.disulfides(row) == ((1, 4),)
    assert Molecule.of(row).disulfides == ((1, 4),)
