"""Molecular dynamics by OpenMM: the reference ensemble of a sequence, with energies and forces.

Langevin dynamics (LFMiddle, Zhang et al. 2019) of the whole molecule with constrained bonds to
hydrogens and heavy hydrogens. Saved frames have the energy and the forces of the bare force field
(physics.py); at the constrained bond lengths its bond terms vanish, so energies are those that
the dynamics sees.

A replica is a chain of segments. Each is simulated from the stored positions and velocities of the
one before with a random stream of its own, and is stored whole or not at all; so a run that is
killed goes on with the segment that it was in. On the Reference and the CPU platform (one thread)
the trajectory then is the same, bit by bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparring.launch import artifacts
from sparring.launch.errors import SparringError
from sparring.launch.seeds import derive
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.config import GAS_CONSTANT
from sparring.science.confdiff.physics import (
    Float64,
    Molecule,
    Platform,
    Potential,
    Solvent,
    context,
    disulfides,
    openmm_module,
    rigid_forces,
)
from sparring.science.confdiff.relaxation import Relaxation, complete
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.starts import STARTS, by_angles, start_angles
from sparring.science.confdiff.structures import (
    atoms_array,
    from_trajectory,
    mdtraj_module,
    read,
    torsions_array,
)

Progress = Callable[[int, int], None]
"""Called with the segments that are done and their number; what it raises stops the replica."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is simulated and how."""

    sequence: str
    """One-letter codes."""
    capped: bool = True
    """ACE before and NME after it; else the ends are charged."""
    temperature: float = 300.0
    """K."""
    frames: int = 1000
    """Frames that each replica saves."""
    interval: float = 1.0
    """ps between frames."""
    equilibration: float = 100.0
    """ps before the first frame, not saved."""
    replicas: int = 1
    """Independent runs."""
    start: str = "extended"
    """A name of starts.STARTS, what `torsion_start` makes, or the path of a structure file."""
    seed: int = 0
    """Of velocities and noise; replica r and segment s have streams of their own."""
    timestep: float = 4.0
    """fs."""
    friction: float = 1.0
    """1/ps."""
    hydrogen_mass: float = 3.0
    """amu; heavier ones allow 4 fs (Hopkins et al. 2015) and change no average of positions."""
    segment: int = 100
    """Frames between two points where a killed run can go on."""
    solvent: Solvent = "obc2"
    platform: Platform = "CPU"

    def __post_init__(self) -> None:
        positive = ("temperature", "frames", "interval", "replicas", "timestep", "friction")
        for name in (*positive, "hydrogen_mass", "segment"):
            if not getattr(self, name) > 0:
                raise SparringError(f"{name} must be positive, got {getattr(self, name)}")
        if self.equilibration < 0:
            raise SparringError(f"equilibration must not be negative, got {self.equilibration}")
        if self.interval * 1000 < self.timestep:
            raise SparringError(
                f"interval {self.interval} ps is shorter than one time step of {self.timestep} fs"
            )
        if not by_angles(self.start) and not Path(self.start).is_file():
            raise SparringError(f"start {self.start!r} is no file and none of {', '.join(STARTS)}")

    @property
    def segments(self) -> int:
        """Segments with frames of one replica."""
        return -(-self.frames // self.segment)


def simulate(simulation: Simulation, folder: Path, progress: Progress | None = None) -> None:
    """All replicas, one after the other; see `run_replica`."""
    for replica in range(simulation.replicas):
        run_replica(simulation, folder, replica, progress)


def run_replica(
    simulation: Simulation, folder: Path, replica: int, progress: Progress | None = None
) -> None:
    """Simulate one replica into a folder, from where an earlier call stopped.

    Different replicas may run at the same time in different processes. The folder gets
    simulation.json, topology.pdb, replica<r>.xtc for viewers, and replica<r>.npz with F frames:
    `positions` (F, A, 3) nm of all atoms, centred, `time` ps, `energy` kJ/mol, kinetic
    `temperature` K, and `forces` (F, N, 6) as physics.rigid_forces.

    Raises:
        SparringError: another simulation lies in the folder; the replica's number is too high; the
            simulation came to a frame that is not finite; and as Molecule.
    """
    if not 0 <= replica < simulation.replicas:
        raise SparringError(f"there is no replica {replica} among {simulation.replicas}")
    folder.mkdir(parents=True, exist_ok=True)
    _claim(simulation, folder)
    if not (folder / f"replica{replica}.npz").is_file():
        run = _Replica(simulation, folder, replica)
        for segment in range(run.done, simulation.segments):
            run.advance(segment)
            if progress:
                progress(segment + 1, simulation.segments)
        run.finish()
    parts = _parts(folder, replica)
    if parts.is_dir():
        shutil.rmtree(parts)


def _parts(folder: Path, replica: int) -> Path:
    """Folder of a replica's segments while it is not complete."""
    return folder / f"replica{replica}.parts"


def _claim(simulation: Simulation, folder: Path) -> None:
    """Write simulation.json, or compare with the one that is there."""
    path = folder / "simulation.json"
    settings = dataclasses.asdict(simulation)
    if not path.is_file():
        artifacts.write_json(path, settings)
        return
    there = json.loads(path.read_text())
    for name, value in settings.items():
        if there.get(name) != value:
            raise SparringError(
                f"{folder} holds another simulation: {name} is {there.get(name)!r} there and "
                f"{value!r} here; give another folder, or the same settings to go on"
            )


def starting_point(simulation: Simulation) -> tuple[Molecule, Float64]:
    """The molecule and (A, 3) nm of the start, hydrogens added, not minimised.

    Raises:
        SparringError: the structure file has no chain of this sequence and these ends.
    """
    sequence, capped = simulation.sequence, simulation.capped
    given = start_angles(sequence, simulation.start)
    if given is not None:
        molecule = Molecule(sequence, capped, simulation.solvent)
        torsions = atom14.standard_torsions(sequence, *given)
        types, turns = atom14.types_of(sequence), atom14.sincos(torsions)
        atoms = np.asarray(atom14.to_atoms(atom14.chain_frames(turns, types), turns, types)[0])
        angles = np.asarray(torsions)
    else:
        rows = read(simulation.start).conformations
        fitting = [row for row in rows if (row.sequence, row.capped) == (sequence, capped)]
        if not fitting:
            found = ", ".join(_ends(row.sequence, row.capped) for row in rows[:3])
            raise SparringError(
                f"{simulation.start} has no chain {_ends(sequence, capped)}; it has {found}"
            )
        row = complete(fitting[0])
        molecule = Molecule(sequence, capped, simulation.solvent, disulfides(row))
        atoms, angles = atoms_array(row), torsions_array(row)
    heavy = molecule.place_heavy(atoms[None], angles[None])
    return molecule, Relaxation(molecule, platform="Reference").add_hydrogens(heavy)[0]


def _ends(sequence: str, capped: bool) -> str:
    return f"{sequence[:40]} {'with' if capped else 'without'} caps"


class _Replica:
    """One replica: its contexts, and the files of its segments."""

    def __init__(self, simulation: Simulation, folder: Path, replica: int) -> None:
        self.simulation, self.folder, self.replica = simulation, folder, replica
        self.parts = _parts(folder, replica)
        self.parts.mkdir(exist_ok=True)
        self.molecule, self.start = starting_point(simulation)
        self.potential = Potential(self.molecule, simulation.platform)
        openmm = openmm_module()
        unit = openmm.unit
        system = self.molecule.system(True, simulation.hydrogen_mass)
        self.freedom = 3 * system.getNumParticles() - system.getNumConstraints()
        self.integrator = openmm.LangevinMiddleIntegrator(
            simulation.temperature * unit.kelvin,
            simulation.friction / unit.picosecond,
            simulation.timestep * unit.femtosecond,
        )
        self.context = context(system, self.integrator, simulation.platform)
        self.done = 0
        while self._part(self.done).is_file():
            self.done += 1

    def _part(self, segment: int) -> Path:
        return self.parts / f"{segment:06d}.npz"

    def _seed(self, *names: str | int) -> int:
        # OpenMM takes 31 bits, and 0 as a wish for a random one.
        return 1 + derive(self.simulation.seed, "md", self.replica, *names) % (2**31 - 2)

    def _steps(self, picoseconds: float) -> int:
        return round(1000 * picoseconds / self.simulation.timestep)

    def _set_out(self, segment: int) -> None:
        """State and noise of a segment's beginning."""
        self.integrator.setRandomNumberSeed(self._seed("noise", segment))
        self.context.reinitialize()
        if segment:
            with np.load(self._part(segment - 1)) as before:
                self.context.setPositions(before["end_positions"])
                self.context.setVelocities(before["end_velocities"])
            return
        openmm = openmm_module()
        self.context.setPositions(self.start)
        self.context.applyConstraints(self.integrator.getConstraintTolerance())
        openmm.LocalEnergyMinimizer.minimize(self.context)
        kelvin = self.simulation.temperature * openmm.unit.kelvin
        self.context.setVelocitiesToTemperature(kelvin, self._seed("velocities"))
        self._step(self._steps(self.simulation.equilibration), "equilibration")

    def _step(self, steps: int, what: str) -> None:
        import openmm

        try:
            self.integrator.step(steps)
        except openmm.OpenMMException as error:
            raise SparringError(self._broken(what, str(error))) from error

    def _broken(self, what: str, reason: str) -> str:
        return (
            f"replica {self.replica} of {self.simulation.sequence[:40]} broke down at {what} "
            f"({reason}); try a shorter timestep than {self.simulation.timestep} fs or another "
            "start; what came before is kept"
        )

    def advance(self, segment: int) -> None:
        """Simulate one segment and store it."""
        self._set_out(segment)
        simulation = self.simulation
        numbers = range(
            segment * simulation.segment, min((segment + 1) * simulation.segment, simulation.frames)
        )
        frames, temperatures = [], []
        state: Any = None
        for number in numbers:
            self._step(self._steps(simulation.interval), f"frame {number}")
            state = self.context.getState(positions=True, velocities=True, energy=True)
            positions = np.asarray(state.getPositions(asNumpy=True)._value)
            if not np.isfinite(positions).all():
                raise SparringError(self._broken(f"frame {number}", "a coordinate is not finite"))
            # The molecule diffuses; near the origin single precision keeps its bonds exact.
            frames.append(positions - positions.mean(0))
            kinetic = state.getKineticEnergy()._value
            temperatures.append(2 * kinetic / (self.freedom * GAS_CONSTANT))
        stored = np.array(frames, dtype=np.float32)
        energies, forces = self.potential(stored, numbers[0])
        _save(
            self._part(segment),
            positions=stored,
            energy=energies,
            temperature=np.array(temperatures),
            forces=rigid_forces(self.molecule, stored, forces).astype(np.float32),
            end_positions=frames[-1],
            end_velocities=np.asarray(state.getVelocities(asNumpy=True)._value),
        )

    def finish(self) -> None:
        """Put the segments together: first what viewers read, last what proves it complete."""
        mdtraj = mdtraj_module()
        parts: dict[str, list[Any]] = {}
        for segment in range(self.simulation.segments):
            with np.load(self._part(segment)) as part:
                for name in ("positions", "energy", "temperature", "forces"):
                    parts.setdefault(name, []).append(part[name])
        whole = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        whole["time"] = self.simulation.interval * np.arange(1, self.simulation.frames + 1)
        top = mdtraj.Topology.from_openmm(self.molecule.topology)
        trajectory = mdtraj.Trajectory(whole["positions"], top, time=whole["time"])
        if self.replica == 0:
            _replace(self.folder / "topology.pdb", trajectory[0].save_pdb)
        _replace(self.folder / f"replica{self.replica}.xtc", trajectory.save_xtc)
        _save(self.folder / f"replica{self.replica}.npz", **whole)


def _replace(path: Path, save: Callable[[str], None]) -> None:
    scratch = path.with_name(f".{path.name}")
    save(str(scratch))
    os.replace(scratch, path)


def _save(path: Path, **arrays: Any) -> None:
    """An npz file that is whole or absent."""
    scratch = path.with_name(f".{path.name}")
    with scratch.open("wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def conformations(folder: Path, stride: int = 1) -> list[Conformation]:
    """Rows of every stride-th frame of the replicas in a folder, with energies and forces.

    Frame f of replica r has the number r * frames + f.

    Raises:
        SparringError: no simulation is there, or a replica is not complete.
    """
    path = folder / "simulation.json"
    if not path.is_file():
        raise SparringError(f"{folder} holds no simulation: there is no simulation.json")
    simulation = Simulation(**{**json.loads(path.read_text()), "start": "extended"})
    rows: list[Conformation] = []
    for replica in range(simulation.replicas):
        whole = folder / f"replica{replica}.npz"
        if not whole.is_file():
            raise SparringError(
                f"replica {replica} in {folder} is not complete; simulate with the same settings "
                "to go on"
            )
        with np.load(whole) as data:
            positions, energy, forces = (
                data[name][::stride] for name in ("positions", "energy", "forces")
            )
        mdtraj = mdtraj_module()
        trajectory = mdtraj.Trajectory(positions, mdtraj.load_topology(folder / "topology.pdb"))
        found = from_trajectory(trajectory, simulation.sequence, str(whole)).conformations
        rows += [
            dataclasses.replace(
                row,
                number=replica * simulation.frames + stride * row.number,
                temperature=simulation.temperature,
                energy=float(energy[row.number]),
                energy_kind="thermal",
                forces=forces[row.number].tobytes(),
            )
            for row in found
        ]
    return rows
