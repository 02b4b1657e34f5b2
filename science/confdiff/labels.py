"""OpenMM's energies and forces for structures that lack them.

Hydrogens are built onto a row's heavy atoms and minimised while every heavy atom stays exactly
where it is (held, not sprung: there is no k and no restraint energy). Energy and forces are then of
the bare force field, at a minimum over hydrogens; they are not those of a thermal structure, whose
hydrogens move. So each row tells its `energy_kind`, and guides refuse both in one data set.

A relaxed energy is another thing beside them: side chains move too, and springs hold the backbone.
It forgets the thermal noise of all that the backbone says nothing about (guide.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sparring.launch.errors import SparringError
from sparring.science.confdiff.physics import Molecule, Platform, Solvent, disulfides, rigid_forces
from sparring.science.confdiff.relaxation import (
    MAX_ITERATIONS,
    STIFFNESS,
    Relaxation,
    complete,
)
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import FloatArray, atoms_array, torsions_array

Kind = tuple[str, bool, tuple[tuple[int, int], ...]]


def label(
    rows: Sequence[Conformation],
    solvent: Solvent = "obc2",
    platform: Platform = "CPU",
    relaxed: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Conformation]:
    """The rows, in their order, with energy (kJ/mol) and rigid forces where they had none.

    What a row has stays as it is, its atoms too. Missing side-chain atoms are added by pdbfixer.

    Args:
        rows: of any chains; a molecule is built once a chain.
        solvent: see physics.Solvent.
        platform: OpenMM's.
        relaxed: `relaxed_energy` too, where rows have none.
        progress: called with the number of rows that are done.

    Raises:
        SparringError: names the row whose structure has no finite energy; and as Molecule.
    """
    found, done = list(rows), 0
    for kind, places in _by_molecule(rows, relaxed).items():
        molecule = Molecule(kind[0], kind[1], solvent, kind[2])
        hydrogens = Relaxation(molecule, "heavy", platform=platform)
        backbone = Relaxation(molecule, "backbone", platform=platform) if relaxed else None
        for place in places:
            found[place] = _label(rows[place], hydrogens, backbone)
            done += 1
            if progress:
                progress(done)
    return found


def _by_molecule(rows: Sequence[Conformation], relaxed: bool) -> dict[Kind, list[int]]:
    """Places of the rows that lack a label, by what makes a molecule."""
    kinds: dict[Kind, list[int]] = {}
    for place, row in enumerate(rows):
        if _bare(row) or (relaxed and row.relaxed_energy is None):
            kinds.setdefault((row.sequence, row.capped, disulfides(row)), []).append(place)
    return kinds


def _bare(row: Conformation) -> bool:
    return row.energy is None or row.forces is None


def _label(row: Conformation, hydrogens: Relaxation, backbone: Relaxation | None) -> Conformation:
    whole = complete(row)
    given = (atoms_array(whole)[None], torsions_array(whole)[None] if row.capped else None)
    try:
        if _bare(row):
            positions, evaluation = hydrogens(*given)
            forces = rigid_forces(hydrogens.molecule, positions, evaluation.forces)[0]
            row = dataclasses.replace(
                row,
                energy=float(evaluation.energies[0]),
                forces=forces.astype(np.float32).tobytes(),
                energy_kind="hydrogens",
            )
        if backbone and row.relaxed_energy is None:
            _, evaluation = backbone(*given)
            row = dataclasses.replace(row, relaxed_energy=float(evaluation.energies[0]))
    except SparringError as error:
        raise SparringError(f"structure {row.number} of {row.chain}: {error}") from error
    return row


def minimised_energies(
    sequence: str,
    atoms: FloatArray,
    torsions: FloatArray | None = None,
    capped: bool = False,
    solvent: Solvent = "obc2",
    platform: Platform = "CPU",
    stiffness: float = STIFFNESS,
    max_iterations: int = MAX_ITERATIONS,
) -> FloatArray:
    """Energies after side chains and hydrogens relaxed, for comparing generated ensembles.

    N, CA, C and O are tied to their places by springs (ConfDiff's protocol, which ties all heavy
    atoms, leaves clashes of side chains); the energy is without the springs. Compare only
    ensembles that went through the same.

    Args:
        sequence: N one-letter codes.
        atoms: (S, N, 14, 3) nm.
        torsions: (S, N, 7) radians; capped chains need those of their ends.
        capped: with ACE and NME.
        solvent: see physics.Solvent.
        platform: OpenMM's.
        stiffness: kJ/mol/nm^2.
        max_iterations: of each structure; 0 is to convergence.

    Returns:
        (S,) kJ/mol; NaN where minimisation came to nothing finite (atoms on each other).
    """
    relaxation = Relaxation(
        Molecule(sequence, capped, solvent),
        "backbone",
        stiffness,
        max_iterations=max_iterations,
        platform=platform,
    )
    energies = np.full(len(atoms), np.nan)
    for number in range(len(atoms)):
        one = slice(number, number + 1)
        try:
            _, evaluation = relaxation(atoms[one], None if torsions is None else torsions[one])
        except SparringError:
            continue  # stays NaN, as promised: one bad sample must not lose the others
        energies[number] = evaluation.energies[0]
    return energies
