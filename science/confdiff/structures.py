"""Structures and trajectories of proteins: from files to rows.

Shape legend: S structures, N residues, 14 slots of heavy atoms (residues.ATOMS). Coordinates are
in nm (PDB files have Angstrom; mdtraj converts).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sparring.launch.errors import SparringError
from sparring.launch.packaged import packaged
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.residues import ATOMS, ONE_LETTER, SLOTS
from sparring.science.confdiff.rows import TORSIONS, Conformation

if TYPE_CHECKING:
    import mdtraj

FloatArray = npt.NDArray[np.floating[Any]]

BREAK = 0.2
"""nm between C and the next N above which a chain is broken (a bond is 0.133)."""
_PDB_ENTRY = re.compile(r"\.ent(\.gz)?$")
_ALIASES = {("NME", "CH3"): "C", ("MET", "SE"): "SD"}
_BENCHMARKS = "bioemu_benchmarks"


@dataclass(frozen=True)
class Reading:
    """What a file holds."""

    conformations: list[Conformation]
    """One row a chain and structure."""
    ignored: int
    """Atoms of one structure that are no protein (water, ions, ligands, lone caps)."""


def mdtraj_module() -> Any:
    """The module mdtraj.

    Raises:
        SparringError: it is not installed.
    """
    try:
        import mdtraj
    except ModuleNotFoundError:
        raise SparringError(
            'reading and writing structures needs mdtraj: pip install "sparring[proteins]"'
        ) from None
    return mdtraj


def read(
    path: Path | str, topology: Path | str | None = None, name: str = "", stride: int = 1
) -> Reading:
    """Read a structure file or a trajectory.

    Args:
        path: PDB, mmCIF, or any trajectory that mdtraj reads.
        topology: structure file with the trajectory's atoms, where `path` has no names itself.
        name: the chain's name in the rows; without it the file's. Where a file has several protein
            chains, each name is followed by the chain's letter or number.
        stride: read only one structure of so many; numbers are those in the file.

    Raises:
        SparringError: no such file, or one that mdtraj cannot read; a trajectory that does not
            match its topology; no protein; and as `from_trajectory`.
    """
    mdtraj = mdtraj_module()
    path = Path(path)
    for wanted in [path] if topology is None else [path, Path(topology)]:
        if not wanted.is_file():
            raise SparringError(f"{wanted}: no such file")
    top = None if topology is None else _load(mdtraj, Path(topology), None).topology
    reading = from_trajectory(_load(mdtraj, path, top, stride), name or path.stem, str(path))
    numbered = [replace(row, number=stride * row.number) for row in reading.conformations]
    return Reading(numbered, reading.ignored)


def _load(mdtraj: Any, path: Path, topology: Any, stride: int = 1) -> mdtraj.Trajectory:
    # The PDB's own archive names its files so, and mdtraj goes by the ending.
    load = mdtraj.load_pdb if _PDB_ENTRY.search(path.name.lower()) else mdtraj.load
    options = {"stride": stride} if stride > 1 else {}
    try:
        with warnings.catch_warnings():  # crystal records without a crystal, of no interest here
            warnings.simplefilter("ignore", UserWarning)
            return load(str(path), **({} if topology is None else {"top": topology}), **options)
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        if topology is None:
            raise SparringError(
                f"{path} cannot be read as a structure; trajectories also need a topology file: "
                f"{reason}"
            ) from error
        raise SparringError(
            f"{path} does not match its topology of {topology.n_atoms} atoms; give the structure "
            f"file that it was written with: {reason}"
        ) from error


def from_trajectory(trajectory: mdtraj.Trajectory, name: str, source: str = "") -> Reading:
    """Rows of the protein chains of a trajectory.

    Symmetric atoms get their IUPAC names (`atoms.canonical`). A chain is capped if it has both
    ACE and NME; a lone cap is left out and counted. Torsions of caps are those of their atoms.

    Raises:
        SparringError: an unknown amino acid, a backbone atom that is missing, a broken chain, a
            chain of one residue without caps, a coordinate that is not finite, no protein.
    """
    source = source or name
    chains = [
        (chain, residues) for chain in trajectory.topology.chains
        if (residues := list(_amino_acids(chain.residues, source)))
    ]  # fmt: skip
    if not chains:
        raise SparringError(f"{source} has no amino acid; a protein chain is needed")
    # Beside a chain a lone amino acid is a ligand.
    chains = [(chain, residues) for chain, residues in chains if len(residues) > 1] or chains
    rows: list[Conformation] = []
    used = 0
    for number, (chain, residues) in enumerate(chains):
        letter = getattr(chain, "chain_id", None) or str(number)
        reader = _Chain(residues, f"{source}, chain {letter.strip() or number}")
        label = name if len(chains) == 1 else f"{name}_{letter.strip() or number}"
        rows.extend(reader.rows(trajectory.xyz, label))
        used += reader.used
    return Reading(rows, trajectory.n_atoms - used)


def _amino_acids(residues: Iterable[Any], source: str) -> Iterator[Any]:
    """Those residues that belong to a protein chain, caps included."""
    for residue in residues:
        names = {atom.name for atom in residue.atoms}
        if residue.name in ONE_LETTER or residue.name in ("ACE", "NME"):
            yield residue
        elif {"N", "CA", "C"} <= names and any(
            a.name == "CA" and _carbon(a) for a in residue.atoms
        ):
            raise SparringError(
                f"{source}: residue {residue} is no amino acid of the standard twenty; mutate it "
                "to one of them (pdbfixer's replaceNonstandardResidues does) or leave it out"
            )


def _carbon(atom: Any) -> bool:
    return atom.element is None or atom.element.symbol == "C"  # not calcium


class _Chain:
    """One protein chain: where the atoms of its slots lie among a trajectory's atoms."""

    def __init__(self, residues: Sequence[Any], source: str) -> None:
        self.source = source
        caps = {r.name: r for r in residues if r.name in ("ACE", "NME")}
        self.residues = [r for r in residues if r.name in ONE_LETTER]
        if not self.residues:
            raise SparringError(f"{source} consists of caps only; it needs amino acids")
        self.capped = len(caps) == 2
        if len(self.residues) == 1 and not self.capped:
            raise SparringError(
                f"{source} has one residue, {self.residues[0]}; a peptide needs two, or the caps "
                "ACE and NME"
            )
        self.sequence = "".join(ONE_LETTER[r.name] for r in self.residues)
        self.index = np.full((len(self.residues), SLOTS), -1)
        for place, residue in enumerate(self.residues):
            found = _indices(residue)
            for slot, atom in enumerate(ATOMS[self.sequence[place]]):
                self.index[place, slot] = found.get(atom, -1)
            if missing := [atom for atom in ("N", "CA", "C") if atom not in found]:
                raise SparringError(
                    f"{source}: residue {residue} has no {', '.join(missing)}; frames need N, CA "
                    "and C of every residue (pdbfixer adds missing atoms)"
                )
        cap = {name: _indices(residue) for name, residue in caps.items()}
        self.cap_index = np.array(
            [cap[residue].get(atom, -1) for residue, atom in atom14.CAPS] if self.capped else []
        )
        self.capped = self.capped and bool((self.cap_index >= 0).all())
        cap_atoms = sum(len(found) for found in cap.values()) if self.capped else 0
        self.used = sum(r.n_atoms for r in self.residues) + cap_atoms

    def rows(self, xyz: FloatArray, name: str) -> list[Conformation]:
        """Rows of the structures of coordinates (S, atoms, 3) nm."""
        there = self.index >= 0
        atoms = np.where(there[..., None], xyz[:, self.index], np.nan)
        caps = xyz[:, self.cap_index] if self.capped else None
        finite = np.isfinite(atoms[:, there]).all(axis=(1, 2))
        if caps is not None:
            finite &= np.isfinite(caps).all(axis=(1, 2))
        if not finite.all():
            raise SparringError(
                f"{self.source}: structure {int(np.argmin(finite))} has coordinates that are not "
                "finite; cut the trajectory before it"
            )
        self._check_bonds(atoms)
        return rows_of(self.sequence, atoms, caps, name)

    def _check_bonds(self, atoms: FloatArray) -> None:
        bonds = np.linalg.norm(atoms[:, 1:, 0] - atoms[:, :-1, 2], axis=-1)
        if (bonds > BREAK).any():
            frame, place = np.argwhere(bonds > BREAK)[0]
            raise SparringError(
                f"{self.source}: the chain is broken between {self.residues[place]} and "
                f"{self.residues[place + 1]}, C-N is {10 * bonds[frame, place]:.2f} A in structure "
                f"{frame} (a bond is 1.33 A, the limit {10 * BREAK:g} A); model the missing "
                "residues, or make molecules whole that a periodic box splits"
            )


def _indices(residue: Any) -> dict[str, int]:
    """Index of each heavy atom's name, force fields' names translated."""
    name = "MET" if residue.name == "MSE" else residue.name
    heavy = (a for a in residue.atoms if a.element is None or a.element.symbol != "H")
    return {_ALIASES.get((name, a.name), a.name): a.index for a in heavy}


def rows_of(
    sequence: str,
    atoms: FloatArray,
    caps: FloatArray | None = None,
    name: str = "",
    first: int = 0,
    temperature: float | None = None,
) -> list[Conformation]:
    """Rows of structures of one chain.

    Args:
        sequence: N one-letter codes.
        atoms: (S, N, 14, 3) nm, NaN where missing or empty.
        caps: (S, 5, 3) nm in the order of atoms.CAPS where the chain is capped.
        name: the chain's name; without it the sequence.
        first: number of the first structure.
        temperature: K, if they come from a simulation.
    """
    types = atom14.types_of(sequence)
    tensor = torch.from_numpy(np.asarray(atoms, dtype=np.float64))
    tensor = tensor.masked_fill(~atom14.exists(types)[..., None], np.nan)
    tensor = atom14.canonical(tensor, types)
    cap = None if caps is None else torch.from_numpy(np.asarray(caps, dtype=np.float64))
    torsions = atom14.torsions_of(tensor, types, cap)
    return [
        Conformation(
            chain=name or sequence,
            number=first + number,
            sequence=sequence,
            capped=caps is not None,
            atoms=a.tobytes(),
            torsions=t.tobytes(),
            temperature=temperature,
        )
        for number, (a, t) in enumerate(
            zip(tensor.float().numpy(), torsions.float().numpy(), strict=True)
        )
    ]


def atoms_array(row: Conformation) -> npt.NDArray[np.float32]:
    """(N, 14, 3) nm, NaN where missing."""
    return np.frombuffer(row.atoms, dtype=np.float32).reshape(len(row.sequence), SLOTS, 3).copy()


def torsions_array(row: Conformation) -> npt.NDArray[np.float32]:
    """(N, 7) radians, NaN where undefined."""
    array = np.frombuffer(row.torsions, dtype=np.float32)
    return array.reshape(len(row.sequence), len(TORSIONS)).copy()


def forces_array(row: Conformation) -> npt.NDArray[np.float32]:
    """(N, 6) force in kJ/mol/nm and torque in kJ/mol.

    Raises:
        SparringError: the row has no forces.
    """
    if row.forces is None:
        raise SparringError(
            f"structure {row.number} of {row.chain} has no forces; conf label computes them"
        )
    return np.frombuffer(row.forces, dtype=np.float32).reshape(len(row.sequence), 6).copy()


def benchmark_structures(
    max_length: int = 256, sets: Sequence[str] = ()
) -> tuple[list[Conformation], dict[str, str]]:
    """Real structures that the package `bioemu-benchmarks` (MIT) carries as data.

    Only its files are used, none of its code. Chains are named by their files below the package,
    as in `crypticpocket/reference/Q16658/3P53_A`.

    Args:
        max_length: residues; longer chains are left out.
        sets: parts of the paths that are wanted, as ("crypticpocket",); all if empty.

    Returns:
        The rows, and for each file that was left out why.

    Raises:
        SparringError: the package is not installed, or nothing is left.
    """
    rows: list[Conformation] = []
    skipped: dict[str, str] = {}
    for path in benchmark_files():
        name = str(path.with_suffix("")).split("/assets/")[-1].partition("/")[2]
        if sets and not any(part in name for part in sets):
            continue
        try:
            found = read(path, name=name).conformations
        except SparringError as error:
            skipped[name] = str(error)
            continue
        short = [row for row in found if len(row.sequence) <= max_length]
        if not short:
            skipped[name] = f"{len(found[0].sequence)} residues, more than {max_length}"
        rows.extend(short)
    if not rows:
        raise SparringError(
            f"no structure of {_BENCHMARKS} has at most {max_length} residues"
            + (f" and one of {', '.join(sets)} in its path" if sets else "")
        )
    return rows, skipped


def benchmark_files() -> list[Path]:
    """The PDB files of `bioemu-benchmarks`, sorted; errors as `benchmark_structures`."""
    return sorted(packaged(_BENCHMARKS, "", "bioemu-benchmarks").rglob("*.pdb"))
