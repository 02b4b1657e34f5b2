"""Energies and forces of a peptide by OpenMM: Amber ff14SB in implicit solvent.

Shape legend: S structures, A atoms with hydrogens, N residues. Coordinates are in nm, energies in
kJ/mol, forces (-dE/dx) in kJ/mol/nm, torques in kJ/mol.

Energies and forces here are of the bare force field: no constraint, no restraint, no cutoff.
(The authors' labels of 2403.14088 held the force of a position restraint.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.residues import ATOMS, SLOTS
from sparring.science.confdiff.rows import TORSIONS, Conformation
from sparring.science.confdiff.structures import FloatArray, atoms_array
from sparring.science.confdiff.topologies import topology

Solvent = Literal["obc2", "gbn2", "vacuum"]
"""Implicit water: OBC2 (Onufriev 2004), GBn2 (Nguyen 2013), or none."""
Platform = Literal["CPU", "Reference", "CUDA", "OpenCL"]
Float64 = npt.NDArray[np.float64]

DISULFIDE = 0.25
"""nm between two SG below which they are taken to be bonded (a bond is 0.205)."""

_XML = "amber14/protein.ff14SB.xml"
_OBC_OFFSET = 0.009  # nm; the XML's radii are already less by it, GBSAOBCForce subtracts it itself
_PROPERTIES = {
    # One thread gives the same numbers in every run; replicas are what fills the cores.
    "CPU": {"Threads": "1"},
    "Reference": {},
    "CUDA": {"Precision": "mixed", "DeterministicForces": "true"},
    "OpenCL": {"Precision": "mixed"},
}


def openmm_module() -> Any:
    """The module openmm.

    Raises:
        SparringError: it is not installed.
    """
    try:
        import openmm
        import openmm.app
    except ModuleNotFoundError:
        raise SparringError(
            'energies and molecular dynamics need OpenMM: pip install "sparring[proteins]"'
        ) from None
    return openmm


class Molecule:
    """A peptide with hydrogens: its topology, its force field and where its atoms are.

    Protonation is that of pH 7 with neutral histidines (HIE), the same for all structures, so that
    their energies compare. Without caps the ends are charged.

    Args:
        sequence: one-letter codes.
        capped: with ACE and NME.
        solvent: see `Solvent`.
        disulfides: pairs of residues (from 0) whose cysteines are bonded.

    Raises:
        SparringError: an unknown residue or solvent, one residue without caps, OpenMM missing.
    """

    def __init__(
        self,
        sequence: str,
        capped: bool = False,
        solvent: Solvent = "obc2",
        disulfides: Sequence[tuple[int, int]] = (),
    ) -> None:
        if solvent not in ("obc2", "gbn2", "vacuum"):
            raise SparringError(f"solvent {solvent!r} is unknown; known are obc2, gbn2 and vacuum")
        types = atom14.types_of(sequence)
        if len(sequence) == 1 and not capped:
            raise SparringError(
                f"the peptide {sequence} has one residue; the force field needs two, or the caps "
                "ACE and NME"
            )
        self.sequence, self.capped, self.solvent = sequence, capped, solvent
        self.disulfides = tuple(disulfides)
        self._openmm = openmm_module()
        files = [_XML] + ([] if solvent == "vacuum" else [f"implicit/{solvent}.xml"])
        self._forcefield = self._openmm.app.ForceField(*files)
        torsions = atom14.standard_torsions(sequence)
        frames = atom14.chain_frames(atom14.sincos(torsions), types)
        atoms, _ = atom14.to_atoms(frames, atom14.sincos(torsions), types)
        heavy = topology(sequence, capped, terminal=True)
        self._build(heavy.to_openmm(), _in_order(sequence, capped, atoms[None], torsions[None])[0])

    def _build(self, heavy: Any, positions: Float64) -> None:
        """Add hydrogens to a topology of heavy atoms and find the slots' atoms."""
        app, unit = self._openmm.app, self._openmm.unit
        sulfur = [a for a in heavy.atoms() if a.name == "SG"]
        offset = int(self.capped)
        by_residue = {atom.residue.index - offset: atom for atom in sulfur}
        for i, j in self.disulfides:
            heavy.addBond(by_residue[i], by_residue[j])
        modeller = app.Modeller(heavy, positions * unit.nanometer)
        variants = ["HIE" if r.name == "HIS" else None for r in heavy.residues()]
        reference = self._openmm.Platform.getPlatformByName("Reference")
        with _seeded():
            modeller.addHydrogens(self._forcefield, pH=7.0, variants=variants, platform=reference)
        self.topology = modeller.topology
        self.template: Float64 = np.array(modeller.positions.value_in_unit(unit.nanometer))
        """(A, 3) nm, an extended chain."""
        last = len(self.sequence) - 1
        self.owners = np.array(
            [min(max(a.residue.index - offset, 0), last) for a in self.topology.atoms()]
        )
        """(A,) residue of each atom; the caps belong to their neighbours."""
        self.hydrogen = np.array([a.element.symbol == "H" for a in self.topology.atoms()])
        """(A,)."""
        self.slots = np.full((len(self.sequence), SLOTS), -1)
        """(N, 14) atom of each slot, -1 if empty."""
        named = {(a.residue.index - offset, a.name): a.index for a in self.topology.atoms()}
        for place, code in enumerate(self.sequence):
            for slot, name in enumerate(ATOMS[code]):
                self.slots[place, slot] = named[place, name]
        cap = {"ACE": -1, "NME": last + 1}
        self.caps = np.array([named[cap[r], a] for r, a in atom14.CAPS] if self.capped else [], int)
        """(5,) atoms of the caps in the order of atoms.CAPS."""

    @classmethod
    def of(cls, row: Conformation, solvent: Solvent = "obc2") -> Molecule:
        """The molecule of a row, disulfide bonds found by the distance of SG atoms."""
        return cls(row.sequence, row.capped, solvent, disulfides(row))

    def system(self, constraints: bool = False, hydrogen_mass: float | None = None) -> Any:
        """An openmm.System: no cutoff, centre of mass not held.

        Args:
            constraints: hold the lengths of bonds to hydrogens.
            hydrogen_mass: amu; their heavy atoms give the mass (default: the elements').
        """
        app, unit = self._openmm.app, self._openmm.unit
        system = self._forcefield.createSystem(
            self.topology,
            nonbondedMethod=app.NoCutoff,
            constraints=app.HBonds if constraints else None,
            hydrogenMass=None if hydrogen_mass is None else hydrogen_mass * unit.amu,
            removeCMMotion=False,
        )
        if self.solvent == "obc2":
            _use_native_obc(self._openmm, system)
        return system

    def heavy_slots(self, positions: FloatArray) -> FloatArray:
        """(S, N, 14, 3) of positions (S, A, 3), NaN in empty slots."""
        return np.where((self.slots >= 0)[..., None], positions[:, self.slots], np.nan)

    def place_heavy(self, atoms: FloatArray, torsions: FloatArray | None = None) -> Float64:
        """(S, A, 3) nm with hydrogens NaN, from atoms (S, N, 14, 3) nm.

        Caps follow from the torsions (S, N, 7) of the ends, an end's OXT from its O.

        Raises:
            SparringError: an atom is missing; a capped molecule without torsions.
        """
        if self.capped and torsions is None:
            raise SparringError(f"the caps of {self.sequence} need the torsions of its ends")
        tensor = torch.from_numpy(np.asarray(atoms, dtype=np.float64))
        if torsions is None:
            angle = atom14.torsions_of(tensor, atom14.types_of(self.sequence))
        else:
            angle = torch.from_numpy(np.array(torsions, dtype=np.float64))
        full = np.full((len(atoms), len(self.owners), 3), np.nan)
        full[:, ~self.hydrogen] = _in_order(self.sequence, self.capped, tensor, angle)
        bad = ~np.isfinite(full[:, ~self.hydrogen]).all(axis=(1, 2))
        if bad.any():
            raise SparringError(
                f"structure {int(np.argmax(bad))} of {self.sequence[:40]} lacks heavy atoms; "
                "relaxation.complete adds them"
            )
        return full


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's random numbers from a fixed seed: addHydrogens starts from random places."""
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def disulfides(row: Conformation) -> tuple[tuple[int, int], ...]:
    """Pairs of cysteines of a row whose SG atoms are within DISULFIDE."""
    atoms = atoms_array(row)
    places = [i for i, code in enumerate(row.sequence) if code == "C"]
    sulfur = {i: atoms[i, ATOMS["C"].index("SG")] for i in places}
    free = list(places)
    pairs = []
    for i in places:
        for j in places:
            near = i < j and i in free and j in free
            if near and np.linalg.norm(sulfur[i] - sulfur[j]) < DISULFIDE:
                pairs.append((i, j))
                free = [k for k in free if k not in (i, j)]
    return tuple(pairs)


def _in_order(sequence: str, capped: bool, atoms: torch.Tensor, torsions: torch.Tensor) -> Float64:
    """(S, heavy atoms, 3) nm in the order of `topology(sequence, capped, terminal=True)`."""
    types = atom14.types_of(sequence)
    torsions = torsions.clone()
    omega = TORSIONS.index("omega")
    torsions[..., omega] = torch.nan_to_num(torsions[..., omega], nan=np.pi)
    frames, turns = atom14.frames_of(atoms), atom14.sincos(torsions)
    own = atoms[:, atom14.exists(types)]
    if capped:
        caps = atom14.cap_atoms(frames, turns, types)
        return np.asarray(torch.cat([caps[:, :3], own, caps[:, 3:]], dim=1))
    end = atom14.terminal_oxygen(frames, turns, types)
    return np.asarray(torch.cat([own, end[:, None]], dim=1))


def _use_native_obc(openmm: Any, system: Any) -> None:
    """Replace implicit/obc2.xml's CustomGBForce by GBSAOBCForce: same energy, five times faster."""
    index = next(i for i, f in enumerate(system.getForces()) if isinstance(f, openmm.CustomGBForce))
    custom, native = system.getForce(index), openmm.GBSAOBCForce()
    for particle in range(custom.getNumParticles()):
        charge, reduced, scaled = custom.getParticleParameters(particle)
        native.addParticle(charge, reduced + _OBC_OFFSET, scaled / reduced)
    native.setSoluteDielectric(1.0)
    native.setSolventDielectric(78.5)
    native.setSurfaceAreaEnergy(2.25936)  # kJ/mol/nm^2, the XML's ACE term
    native.setNonbondedMethod(openmm.GBSAOBCForce.NoCutoff)
    system.removeForce(index)
    system.addForce(native)


def context(system: Any, integrator: Any, platform: Platform = "CPU") -> Any:
    """An openmm.Context on a platform with the settings of this package.

    Raises:
        SparringError: the platform is not there.
    """
    openmm = openmm_module()
    known = [
        openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())
    ]
    if platform not in known or platform not in _PROPERTIES:
        raise SparringError(
            f"OpenMM has no platform {platform!r} here; it has {', '.join(known)} "
            "(CUDA comes with openmm-cuda-12 or openmm-cuda-13)"
        )
    chosen = openmm.Platform.getPlatformByName(platform)
    return openmm.Context(system, integrator, chosen, _PROPERTIES[platform] | _device(platform))


def _device(platform: Platform) -> dict[str, str]:
    """The accelerator of this rank, where a host has several ranks: all of them see all of its."""
    world = World.from_environment()
    if platform not in ("CUDA", "OpenCL") or world.local_size == 1:
        return {}
    count = torch.cuda.device_count() or world.local_size
    return {"DeviceIndex": str(world.local_rank % count)}


class Evaluation(NamedTuple):
    """Energies and forces of S structures."""

    energies: Float64
    """(S,) kJ/mol."""
    forces: Float64
    """(S, A, 3) kJ/mol/nm, -dE/dx of each atom."""


class Potential:
    """The potential energy of a molecule's structures."""

    def __init__(self, molecule: Molecule, platform: Platform = "CPU") -> None:
        self.molecule, self.platform = molecule, platform

    @cached_property
    def _context(self) -> Any:
        integrator = openmm_module().VerletIntegrator(0.001)
        return context(self.molecule.system(), integrator, self.platform)

    def __call__(self, positions: FloatArray, first: int = 0) -> Evaluation:
        """Evaluate positions (S, A, 3) nm; `first` is the number of the first one in errors.

        Raises:
            SparringError: a coordinate, energy or force is not finite.
        """
        energies = np.empty(len(positions))
        forces = np.empty(np.shape(positions))
        for number, frame in enumerate(positions):
            if not np.isfinite(frame).all():
                raise SparringError(
                    f"frame {first + number} of {self.molecule.sequence[:40]} has coordinates that "
                    "are not finite"
                )
            self._context.setPositions(np.asarray(frame, dtype=np.float64))
            state = self._context.getState(energy=True, forces=True)
            energies[number] = state.getPotentialEnergy()._value
            forces[number] = state.getForces(asNumpy=True)._value
            if not (np.isfinite(energies[number]) and np.isfinite(forces[number]).all()):
                raise SparringError(
                    f"the energy or a force of frame {first + number} of "
                    f"{self.molecule.sequence[:40]} is not finite: atoms lie on each other; leave "
                    "the frame out, or take a shorter time step if it is from a simulation"
                )
        return Evaluation(energies, forces)


def rigid_forces(molecule: Molecule, positions: FloatArray, forces: FloatArray) -> Float64:
    """Forces on residues as rigid bodies, of positions and forces (S, A, 3).

    F_i = sum_a f_a and tau_i = sum_a (x_a - CA_i) x f_a over all atoms of residue i, hydrogens
    too; ACE counts to the first and NME to the last residue. They are -dE of moving a whole
    residue by dx and turning it about CA by d theta. Constraint forces of bonds to hydrogens act
    within residues and cancel in both.

    Returns:
        (S, N, 6): F in kJ/mol/nm, then tau in kJ/mol, in the laboratory's axes.
    """
    positions = np.asarray(positions, dtype=np.float64)
    arms = positions - positions[:, molecule.slots[:, 1]][:, molecule.owners]
    both = np.concatenate([forces, np.cross(arms, forces)], axis=-1)
    member = np.eye(len(molecule.sequence))[molecule.owners]
    return np.asarray(np.einsum("sac,an->snc", both, member))
