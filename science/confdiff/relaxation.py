"""Hydrogens for structures of heavy atoms, restrained minimisation, and missing atoms.

Shape legend: S structures, A atoms with hydrogens, N residues. Units as in physics.py.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from sparring.launch.errors import SparringError
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.physics import (
    Evaluation,
    Float64,
    Molecule,
    Platform,
    Potential,
    context,
    openmm_module,
)
from sparring.science.confdiff.residues import ATOMS
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import FloatArray, atoms_array, rows_of, torsions_array
from sparring.science.confdiff.topologies import topology

Hold = Literal["heavy", "backbone"]
STIFFNESS = 4184.0
"""kJ/mol/nm^2, 10 kcal/mol/A^2: the restraint that ConfDiff (arXiv 2403.14088) relaxes with."""
TOLERANCE = 1.0
"""kJ/mol/nm, root mean square force where minimisation ends. OpenMM's 10 leaves 5 kJ/mol of a
pentapeptide's energy to where it lies in space, this 0.1 but for a rotor at its barrier."""
MAX_ITERATIONS = 2000
"""Enough for peptides and small proteins; clashed structures would go on for minutes."""
_BACKBONE = ("N", "CA", "C", "O")


class Relaxation:
    """Adds hydrogens to heavy atoms and minimises the energy while some atoms are held.

    Args:
        molecule: what the structures are of.
        hold: "heavy" moves hydrogens alone, all others stay where they are exactly; "backbone"
            ties N, CA, C and O by harmonic springs, k/2 |x - x0|^2, to where they are and moves
            side chains, hydrogens and caps' methyl groups freely.
        stiffness: k of these springs, kJ/mol/nm^2.
        tolerance: kJ/mol/nm, see TOLERANCE.
        max_iterations: steps of L-BFGS at most; 0 is until the tolerance is met, however long.
        platform: OpenMM's.
    """

    def __init__(
        self,
        molecule: Molecule,
        hold: Hold = "heavy",
        stiffness: float = STIFFNESS,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
        platform: Platform = "CPU",
    ) -> None:
        if hold not in ("heavy", "backbone"):
            raise SparringError(f'hold must be "heavy" or "backbone", got {hold!r}')
        self.molecule, self.tolerance, self.max_iterations = molecule, tolerance, max_iterations
        self.potential = Potential(molecule, platform)
        self._openmm = openmm_module()
        system = molecule.system()
        self._springs: Any = None
        self._held: list[int] = []
        if hold == "heavy":
            for atom in np.flatnonzero(~molecule.hydrogen):
                system.setParticleMass(int(atom), 0.0)  # OpenMM's minimiser leaves massless ones
        else:
            self._springs = self._openmm.CustomExternalForce(
                "stiffness/2*((x-x0)^2+(y-y0)^2+(z-z0)^2)"
            )
            self._springs.addGlobalParameter("stiffness", stiffness)
            for axis in "xyz":
                self._springs.addPerParticleParameter(f"{axis}0")
            self._held = [
                number
                for number, atom in enumerate(molecule.topology.atoms())
                # NME's methyl is named C too.
                if atom.name in _BACKBONE and (atom.residue.name, atom.name) != ("NME", "C")
            ]
            for atom in self._held:
                self._springs.addParticle(atom, [0.0, 0.0, 0.0])
            system.addForce(self._springs)
        self._context = context(system, self._openmm.VerletIntegrator(0.001), platform)
        self._neighbourhoods = list(_neighbourhoods(molecule))

    def add_hydrogens(self, heavy: FloatArray) -> Float64:
        """(S, A, 3) nm: hydrogens (NaN in `heavy`) put where the molecule's template has them.

        Each goes along with the rigid motion that best takes its heavy atom's surroundings in the
        template to the structure (Kabsch), so bonds have their length and stereochemistry.
        """
        placed = np.array(heavy, dtype=np.float64)
        template = self.molecule.template
        for parent, around, weights, hydrogens in self._neighbourhoods:
            here = template[around] - template[parent]
            there = placed[:, around] - placed[:, None, parent]
            left, _, right = np.linalg.svd(np.einsum("a,sai,aj->sij", weights, there, here))
            left[..., -1] *= np.linalg.det(left @ right)[:, None]
            turned = np.einsum("sij,hj->shi", left @ right, template[hydrogens] - template[parent])
            placed[:, hydrogens] = placed[:, None, parent] + turned
        return placed

    def minimise(self, positions: FloatArray) -> Float64:
        """(S, A, 3) nm, each structure of positions (S, A, 3) minimised.

        Raises:
            SparringError: minimisation came to something that is not finite.
        """
        relaxed = np.empty(np.shape(positions))
        unit = self._openmm.unit
        tolerance = self.tolerance * unit.kilojoule_per_mole / unit.nanometer
        for number, frame in enumerate(np.asarray(positions, dtype=np.float64)):
            for spring, atom in enumerate(self._held):
                self._springs.setParticleParameters(spring, atom, frame[atom])
            if self._held:
                self._springs.updateParametersInContext(self._context)
            self._context.setPositions(frame)
            start = self._context.getState(energy=True).getPotentialEnergy()._value
            if np.isfinite(start):  # from an infinite energy OpenMM's minimiser does not return
                self._openmm.LocalEnergyMinimizer.minimize(
                    self._context, tolerance, self.max_iterations
                )
            state = self._context.getState(positions=True)
            relaxed[number] = state.getPositions(asNumpy=True)._value
            if not (np.isfinite(start) and np.isfinite(relaxed[number]).all()):
                raise SparringError(
                    f"structure {number} of {self.molecule.sequence[:40]} cannot be minimised: "
                    "atoms lie on each other"
                )
        return relaxed

    def __call__(
        self, atoms: FloatArray, torsions: FloatArray | None = None
    ) -> tuple[Float64, Evaluation]:
        """Hydrogens, minimisation, then the bare energy of atoms (S, N, 14, 3) nm.

        Args:
            atoms: heavy atoms in their slots.
            torsions: (S, N, 7) radians; capped molecules need those of their ends.

        Returns:
            (S, A, 3) nm, and energies and forces there without springs.

        Raises:
            SparringError: as Molecule.place_heavy, minimise and Potential.
        """
        heavy = self.molecule.place_heavy(atoms, torsions)
        positions = self.minimise(self.add_hydrogens(heavy))
        return positions, self.potential(positions)


def complete(row: Conformation) -> Conformation:
    """The row with missing heavy atoms added by pdbfixer; the row itself if none is missing.

    Raises:
        SparringError: pdbfixer is not installed.
    """
    atoms = atoms_array(row)
    types = atom14.types_of(row.sequence)
    expected = atom14.exists(types).numpy()
    there: npt.NDArray[np.bool_] = np.asarray(np.isfinite(atoms).all(axis=-1))
    if there[expected].all():
        return row
    caps = None
    if row.capped:
        angle = torch.from_numpy(torsions_array(row).astype(np.float64))
        frames = atom14.frames_of(torch.from_numpy(atoms.astype(np.float64)))
        caps = np.asarray(atom14.cap_atoms(frames, atom14.sincos(angle), types))
    fixed = _fixed(row, atoms, there & expected, caps)
    new = np.where(there[..., None], atoms, fixed)
    done = rows_of(row.sequence, new[None], None if caps is None else caps[None], row.chain)[0]
    return dataclasses.replace(row, atoms=done.atoms, torsions=done.torsions)


def _fixed(
    row: Conformation, atoms: FloatArray, there: npt.NDArray[np.bool_], caps: FloatArray | None
) -> FloatArray:
    """(N, 14, 3) nm with pdbfixer's atoms."""
    try:
        import pdbfixer
    except ModuleNotFoundError:
        raise SparringError(
            'adding missing atoms needs pdbfixer: pip install "sparring[proteins]"'
        ) from None
    app, unit = openmm_module().app, openmm_module().unit
    full, offset = topology(row.sequence, row.capped), int(row.capped)
    keep = [
        atom.index for atom in full.atoms
        if not 0 <= (place := atom.residue.index - offset) < len(row.sequence)
        or there[place, ATOMS[row.sequence[place]].index(atom.name)]
    ]  # fmt: skip
    xyz = atoms[there] if caps is None else np.concatenate([caps[:3], atoms[there], caps[3:]])
    text = io.StringIO()
    app.PDBFile.writeFile(full.subset(keep).to_openmm(), xyz * unit.nanometer, text)
    text.seek(0)
    fixer = pdbfixer.PDBFixer(pdbfile=text)
    fixer.findMissingResidues()
    fixer.missingResidues = {}
    fixer.findMissingAtoms()
    fixer.addMissingAtoms(seed=1)
    places = np.array(fixer.positions.value_in_unit(unit.nanometer))
    fixed = np.full(atoms.shape, np.nan)
    for atom in fixer.topology.atoms():
        place = atom.residue.index - offset
        if 0 <= place < len(row.sequence) and atom.name in ATOMS[row.sequence[place]]:
            fixed[place, ATOMS[row.sequence[place]].index(atom.name)] = places[atom.index]
    return fixed


def _neighbourhoods(molecule: Molecule) -> Iterator[tuple[int, list[int], Float64, list[int]]]:
    """For each heavy atom with hydrogens: it, heavy atoms near it, their weights, its hydrogens."""
    bonded: dict[int, list[int]] = {i: [] for i in range(len(molecule.owners))}
    for a, b in molecule.topology.bonds():
        bonded[a.index].append(b.index)
        bonded[b.index].append(a.index)
    heavy = np.flatnonzero(~molecule.hydrogen)
    for parent in heavy.tolist():
        hydrogens = [i for i in bonded[parent] if molecule.hydrogen[i]]
        if not hydrogens:
            continue
        first = [i for i in bonded[parent] if not molecule.hydrogen[i]]
        second = sorted(
            {j for i in first for j in bonded[i] if not molecule.hydrogen[j]} - {parent, *first}
        )
        # Direct bonds decide; what lies beyond says how the rest is turned about a single bond.
        weights = np.array([1.0] * len(first) + [0.05] * len(second))
        yield parent, first + second, weights, hydrogens
