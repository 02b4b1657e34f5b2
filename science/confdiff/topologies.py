"""Structures of a chain as mdtraj topologies and trajectories, and as files.

Shape legend: S structures, N residues, 14 slots of heavy atoms (residues.ATOMS). Coordinates are
in nm; PDB files have Angstrom and xtc files nm, as their formats want.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparring.launch.errors import SparringError
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.residues import ATOMS, THREE_LETTERS, encode
from sparring.science.confdiff.structures import FloatArray, mdtraj_module

if TYPE_CHECKING:
    import mdtraj


def topology(sequence: str, capped: bool = False, terminal: bool = False) -> mdtraj.Topology:
    """Heavy atoms of a chain by their slots, ACE before and NME after it if capped.

    Names are PDB's, which mdtraj, OpenMM, MDAnalysis and PyMOL know. OXT is no slot; with
    `terminal` an uncapped chain has it as its last atom.
    """
    mdtraj = mdtraj_module()
    encode(sequence)
    top = mdtraj.Topology()
    chain = top.add_chain()
    ace = [("ACE", [atom for residue, atom in atom14.CAPS if residue == "ACE"])] if capped else []
    nme = [("NME", [atom for residue, atom in atom14.CAPS if residue == "NME"])] if capped else []
    middle = [(THREE_LETTERS[code], list(ATOMS[code])) for code in sequence]
    if terminal and not capped:
        middle[-1][1].append("OXT")
    for number, (name, atoms) in enumerate([*ace, *middle, *nme]):
        # The sequence counts from 1, so ACE is 0.
        residue = top.add_residue(name, chain, resSeq=number + (0 if capped else 1))
        for atom in atoms:
            top.add_atom(atom, mdtraj.element.get_by_symbol(atom[0]), residue)
    top.create_standard_bonds()
    return top


def trajectory(
    sequence: str, atoms: FloatArray, caps: FloatArray | None = None
) -> mdtraj.Trajectory:
    """An mdtraj trajectory of structures (S, N, 14, 3) nm, with caps (S, 5, 3) nm if given.

    Raises:
        SparringError: an atom of the topology has a coordinate that is not finite.
    """
    there = atom14.exists(atom14.types_of(sequence)).numpy()
    xyz = np.asarray(atoms, dtype=np.float32)[:, there]
    if caps is not None:
        cap = np.asarray(caps, dtype=np.float32)
        xyz = np.concatenate([cap[:, :3], xyz, cap[:, 3:]], axis=1)
    bad = ~np.isfinite(xyz).all(axis=(1, 2))
    if bad.any():
        raise SparringError(
            f"structure {int(np.argmax(bad))} of {sequence[:40]} has missing or infinite "
            "coordinates and cannot be written"
        )
    return mdtraj_module().Trajectory(xyz, topology(sequence, caps is not None))


def write(
    folder: Path, sequence: str, atoms: FloatArray, caps: FloatArray | None = None
) -> tuple[Path, Path]:
    """Write topology.pdb (the first structure) and samples.xtc; arguments as `trajectory`.

    xtc rounds to 0.001 nm.

    Raises:
        SparringError: no structure at all, and as `trajectory`.
    """
    if not len(atoms):
        raise SparringError(f"there is no structure of {sequence[:40]} to write")
    ensemble = trajectory(sequence, atoms, caps)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "topology.pdb", folder / "samples.xtc"
    ensemble[0].save_pdb(str(paths[0]))
    ensemble.save_xtc(str(paths[1]))
    return paths
