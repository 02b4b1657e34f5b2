"""Reference molecular dynamics: temperature, energies, resuming, and what can go wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sparring.launch import runs
from sparring.launch.errors import SparringError, Stopped
from sparring.science.confdiff import md, md_stage, structures, topologies
from sparring.science.confdiff.config import GAS_CONSTANT
from sparring.science.confdiff.md import Simulation, conformations, run_replica, simulate
from sparring.science.confdiff.physics import Molecule, Potential, rigid_forces
from sparring.science.confdiff.starts import STARTS, torsion_start
from sparring.science.confdiff.structures import atoms_array, forces_array, torsions_array

SHORT = Simulation(
    sequence="A", temperature=400, frames=6, interval=0.04, equilibration=0.4, replicas=2,
    segment=2, seed=3, platform="Reference",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("md")
    simulate(SHORT, folder)
    return folder


def positions(folder: Path, replica: int = 0) -> np.ndarray:
    with np.load(folder / f"replica{replica}.npz") as data:
        return data["positions"]


def test_files(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {
        "simulation.json", "topology.pdb", "replica0.xtc", "replica0.npz", "replica1.xtc",
        "replica1.npz",
    }  # fmt: skip
    trajectory = mdtraj.load(folder / "replica1.xtc", top=folder / "topology.pdb")
    assert np.abs(trajectory.xyz - positions(folder, 1)).max() < 6e-4
    assert trajectory.time == pytest.approx(0.04 * np.arange(1, 7))
    assert np.abs(positions(folder).mean(1)).max() < 1e-6
    assert not np.allclose(positions(folder, 0), positions(folder, 1), atol=1e-3)


def test_saved_energies_and_forces_are_those_of_the_frames(folder: Path) -> None:
    molecule = Molecule("A", capped=True)
    with np.load(folder / "replica0.npz") as data:
        energies, forces = Potential(molecule, "Reference")(data["positions"])
        assert data["energy"] == pytest.approx(energies, abs=1e-6)
        projected = rigid_forces(molecule, data["positions"], forces)
        assert data["forces"] == pytest.approx(projected, rel=1e-5, abs=1e-3)
    # Constrained bonds to hydrogens are as long as the bare force field wants them.
    bonds = [
        (a.index, b.index) for a, b in molecule.topology.bonds()
        if molecule.hydrogen[[a.index, b.index]].any()
    ]  # fmt: skip
    xyz = positions(folder)
    lengths = np.linalg.norm(xyz[:, [a for a, _ in bonds]] - xyz[:, [b for _, b in bonds]], axis=-1)
    assert np.ptp(lengths, axis=0).max() < 1e-5


def test_conformations(folder: Path) -> None:
    rows = conformations(folder)
    assert [row.number for row in rows] == list(range(12))
    for row in rows:
        assert (row.chain, row.sequence, row.capped, row.temperature) == ("A", "A", True, 400)
        assert np.isfinite(torsions_array(row)[0, :3]).all()
    with np.load(folder / "replica1.npz") as data:
        assert rows[8].energy == data["energy"][2]
        assert np.array_equal(forces_array(rows[8]), data["forces"][2])
        molecule = Molecule("A", capped=True)
        slots = molecule.heavy_slots(data["positions"][2:3])[0, :, :5]
        assert np.array_equal(atoms_array(rows[8])[:, :5], slots.astype(np.float32))
        built = mdtraj.Trajectory(data["positions"], mdtraj.load_topology(folder / "topology.pdb"))
    phi = mdtraj.compute_phi(built)[1][2, 0]
    assert torsions_array(rows[8])[0, 1] == pytest.approx(phi, abs=1e-4)
    assert [row.number for row in conformations(folder, stride=4)] == [0, 4, 6, 10]


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
def test_a_stopped_replica_goes_on_to_the_same_trajectory(tmp_path: Path, platform: str) -> None:
    simulation = dataclasses.replace(SHORT, replicas=1, platform=platform)

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise Stopped("enough")

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    simulate(simulation, whole)
    with pytest.raises(Stopped):
        simulate(simulation, cut, stop)
    parts = sorted((cut / "replica0.parts").iterdir())
    assert [p.name for p in parts] == ["000000.npz", "000001.npz"]
    # A segment that was not complete leaves a scratch file only, which the next call replaces.
    parts[1].unlink()
    (cut / "replica0.parts" / ".000001.npz").write_bytes(b"half")
    calls: list[int] = []
    simulate(simulation, cut, lambda done, _: calls.append(done))
    assert calls == [2, 3]
    for name in ("replica0.npz", "replica0.xtc", "topology.pdb"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (cut / "replica0.parts").exists()
    assert np.array_equal(positions(cut), positions(whole))
    before = (cut / "replica0.npz").stat().st_mtime_ns
    simulate(simulation, cut)
    assert (cut / "replica0.npz").stat().st_mtime_ns == before


def test_a_replica_depends_on_seed_and_number_alone(tmp_path: Path, folder: Path) -> None:
    run_replica(SHORT, tmp_path / "a", 1)
    assert np.array_equal(positions(tmp_path / "a", 1), positions(folder, 1))
    with pytest.raises(SparringError, match=r"replica 0 in .* is not complete"):
        conformations(tmp_path / "a")
    other = dataclasses.replace(SHORT, seed=4, replicas=1)
    simulate(other, tmp_path / "b")
    assert not np.allclose(positions(tmp_path / "b"), positions(folder), atol=1e-3)


def test_temperature(tmp_path: Path) -> None:
    """Mean kinetic temperature and its spread, T sqrt(2/f), of a canonical ensemble."""
    simulation = Simulation(
        sequence="A", temperature=400, frames=300, interval=0.1, equilibration=3, friction=10,
        segment=300, solvent="vacuum", platform="Reference",
    )  # fmt: skip
    simulate(simulation, tmp_path)
    with np.load(tmp_path / "replica0.npz") as data:
        kinetic = data["temperature"]
    freedom = 3 * 22 - 12
    spread = 400 * np.sqrt(2 / freedom)
    assert kinetic.mean() == pytest.approx(400, abs=5 * spread / np.sqrt(60))
    assert kinetic.std() == pytest.approx(spread, rel=0.25)


def test_starts(tmp_path: Path) -> None:
    own = [-60.0, -30, -110, 130, 70, 20]
    given = {start: [*angles] * 3 for start, angles in STARTS.items()}
    for start, degrees in {**given, torsion_start(own): own}.items():
        simulation = dataclasses.replace(SHORT, sequence="AAA", start=start)
        molecule, position = md.starting_point(simulation)
        row = structures.rows_of(
            "AAA", molecule.heavy_slots(position[None]), position[None, molecule.caps]
        )[0]
        angles = np.degrees(torsions_array(row)[:, 1:3])
        assert angles == pytest.approx(np.reshape(degrees, (3, 2)), abs=1e-2)
        assert np.isfinite(position).all()
    _, position = md.starting_point(dataclasses.replace(SHORT, sequence="AAA", start="helix"))
    heavy = molecule.heavy_slots(position[None])
    pdb, _ = topologies.write(tmp_path, "AAA", heavy, position[None, molecule.caps])
    _, again = md.starting_point(dataclasses.replace(SHORT, sequence="AAA", start=str(pdb)))
    heavy_again = molecule.heavy_slots(again[None])
    assert np.nanmax(np.abs(heavy_again - heavy)) < 6e-5  # PDB rounds to 0.001 A
    with pytest.raises(SparringError, match="has no chain AAAA with caps; it has AAA with caps"):
        md.starting_point(dataclasses.replace(SHORT, sequence="AAAA", start=str(pdb)))
    with pytest.raises(SparringError, match="phi and psi of 4 residues, not 6 numbers"):
        md.starting_point(dataclasses.replace(SHORT, sequence="AAAA", start=torsion_start(own)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1}, "temperature must be positive, got -1"),
        ({"frames": 0}, "frames must be positive, got 0"),
        ({"equilibration": -1}, "equilibration must not be negative"),
        ({"interval": 0.001}, "shorter than one time step of 4.0 fs"),
        ({"start": "folded"}, "start 'folded' is no file and none of extended, helix"),
    ],
)
def test_wrong_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(SparringError, match=message):
        dataclasses.replace(SHORT, **change)  # type: ignore[arg-type]


def test_wrong_folders(folder: Path, tmp_path: Path) -> None:
    before = (folder / "replica0.npz").read_bytes()
    with pytest.raises(SparringError, match="temperature is 400 there and 300 here"):
        simulate(dataclasses.replace(SHORT, temperature=300), folder)
    assert (folder / "replica0.npz").read_bytes() == before
    assert json.loads((folder / "simulation.json").read_text())["temperature"] == 400
    with pytest.raises(SparringError, match="no replica 2 among 2"):
        run_replica(SHORT, folder, 2)
    with pytest.raises(SparringError, match="holds no simulation"):
        conformations(tmp_path)


def test_a_step_too_long_says_so(tmp_path: Path) -> None:
    simulation = dataclasses.replace(SHORT, timestep=20.0, interval=0.4, hydrogen_mass=1.0)
    with pytest.raises(
        SparringError, match=r"broke down at .* try a shorter timestep than 20\.0 fs"
    ):
        simulate(simulation, tmp_path)
    assert not (tmp_path / "replica0.npz").exists()


@pytest.mark.slow
def test_two_replicas_agree_and_reweight(tmp_path: Path) -> None:
    """phi/psi of two seeds; mean energy of 400 K frames reweighted to 350 K against direct MD."""
    simulations = {
        kelvin: Simulation(
            sequence="A", temperature=kelvin, frames=1000, interval=1.0, equilibration=50,
            replicas=2, seed=1,
        )
        for kelvin in (400.0, 350.0)
    }  # fmt: skip
    energy, angles = {}, {}
    for kelvin, simulation in simulations.items():
        simulate(simulation, tmp_path / f"{kelvin:g}")
        rows = conformations(tmp_path / f"{kelvin:g}")
        energy[kelvin] = np.array([row.energy for row in rows])
        angles[kelvin] = np.array([torsions_array(row)[0, 1:3] for row in rows])
    half = len(energy[400.0]) // 2
    counts = [
        np.histogram2d(*part.T, bins=8, range=[[-np.pi, np.pi]] * 2)[0].ravel() / half
        for part in (angles[400.0][:half], angles[400.0][half:])
    ]
    assert np.abs(counts[0] - counts[1]).sum() / 2 < 0.2  # total variation
    k = 1 / (GAS_CONSTANT * 350) - 1 / (GAS_CONSTANT * 400)
    weights = np.exp(-k * (energy[400.0] - energy[400.0].min()))
    weights /= weights.sum()
    reweighted = weights @ energy[400.0]
    direct = energy[350.0].mean()
    gap = energy[400.0].mean() - direct
    error = energy[350.0].std() * np.sqrt(20 / len(energy[350.0]) + 20 * (weights**2).sum())
    assert gap > 5 * error / np.sqrt(20)
    assert reweighted == pytest.approx(direct, abs=max(error, 0.15 * gap))


# Of PDB 5AWL (CC0), in angstrom.
CRYSTAL = """
24.935 20.652 10.774  21.801 19.381  9.017  18.477 20.539 10.432  16.223 17.660 11.537
13.040 19.289 10.212  14.200 20.806  6.941  17.256 18.676  6.039  19.242 21.760  5.125
22.762 22.680  6.241  23.135 25.467  8.794
"""


def test_cln025_starts_folded_in_its_recipe() -> None:
    _, recipe = runs.load_recipe(Path(__file__).parents[3] / "recipes" / "confdiff-cln025.toml")
    start = md_stage.simulation(recipe.md, {}, 0, 1)
    molecule, positions = md.starting_point(start)
    atoms = molecule.heavy_slots(positions[None])[0]
    carbons = np.array(CRYSTAL.split(), dtype=np.float64).reshape(10, 3) / 10
    _, distance = Rotation.align_vectors(
        atoms[:, 1] - atoms[:, 1].mean(0), carbons - carbons.mean(0)
    )
    assert distance / np.sqrt(10) < 0.025
    # N...O of its hydrogen bonds; N is slot 0, O is slot 3.
    for donor, acceptor in ((1, 10), (10, 1), (3, 8), (7, 3)):
        assert np.linalg.norm(atoms[donor - 1, 0] - atoms[acceptor - 1, 3]) < 0.31
    apart = np.linalg.norm(positions[:, None] - positions, axis=-1)
    assert apart[np.triu_indices(len(apart), 1)].min() > 0.08  # nothing lies on anything else
