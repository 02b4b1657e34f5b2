"""Conformations as batches of tensors.

Shape legend: B structures of a batch, N residues (padded), S structures of one chain, 14 slots of
heavy atoms (residues.ATOMS), 7 torsions (rows.TORSIONS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import atoms_array, torsions_array

CONFORMATIONS = "conformations.parquet"
REPRESENTATIONS = ("node", "edge")


@dataclass(frozen=True)
class Batch:
    """Structures side by side; float32, padding is zero and not in `mask`."""

    frames: Frames
    """(B, N), the centre of CA at 0; the identity where padded."""
    mask: Tensor
    """(B, N) bool."""
    types: Tensor
    """(B, N) amino acids, 0 where padded."""
    index: Tensor
    """(B, N) number of the residue in its chain."""
    torsions: Tensor
    """(B, N, 7, 2) sines and cosines."""
    torsion_mask: Tensor
    """(B, N, 7) bool."""
    atoms: Tensor
    """(B, N, 14, 3) nm, about the same centre; 0 where missing."""
    atom_mask: Tensor
    """(B, N, 14) bool."""
    node: Tensor | None = None
    """(B, N, D) pretrained representation of residues."""
    edge: Tensor | None = None
    """(B, N, N, E) of pairs."""

    def to(self, device: torch.device) -> Batch:
        """On another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value if value is None else value.to(device)
        return Batch(**moved)


class Representations:
    """Pretrained arrays of sequences, such as ESM-2's or OpenFold's, from a .npz file.

    The file holds ``SEQUENCE.node`` (N, D) and, optionally, ``SEQUENCE.edge`` (N, N, E) for every
    sequence.

    Raises:
        SparringError: the file cannot be read, or shapes do not fit.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                data = np.load(file, allow_pickle=False)
                if isinstance(data, np.ndarray):
                    raise ValueError("it is a single array")
                self._arrays: Mapping[str, np.ndarray] = {k: data[k] for k in data.files}
        except (OSError, ValueError, BadZipFile) as error:
            raise SparringError(f"{path} is no .npz file of arrays: {error}") from None
        found = {kind: self._widths(kind) for kind in REPRESENTATIONS}
        self.node_dim, self.edge_dim = found["node"], found["edge"]
        if not self.node_dim and not self.edge_dim:
            raise SparringError(f"{path} has no array called SEQUENCE.node or SEQUENCE.edge")

    def _widths(self, kind: str) -> int:
        widths = {v.shape[-1] for k, v in self._arrays.items() if k.endswith(f".{kind}")}
        if len(widths) > 1:
            raise SparringError(f"{self._path}: {kind} arrays have several widths: {widths}")
        return widths.pop() if widths else 0

    def of(self, sequence: str, kind: str) -> Tensor | None:
        """Of a sequence: node (N, D) or edge (N, N, E); None where the file has no such arrays."""
        if not {"node": self.node_dim, "edge": self.edge_dim}[kind]:
            return None
        array = self._arrays.get(f"{sequence}.{kind}")
        if array is None:
            raise SparringError(f"{self._path} has no array {sequence}.{kind}; add it")
        size = len(sequence)
        if array.shape[:-1] != ((size,) if kind == "node" else (size, size)):
            raise SparringError(
                f"{self._path}: {sequence}.{kind} has shape {array.shape}, for {size} residues"
            )
        return torch.from_numpy(np.asarray(array, dtype=np.float32))


class Dataset:
    """Structures of any number of chains.

    Args:
        rows: at least one.
        representations: of all their sequences.
    """

    def __init__(
        self, rows: Sequence[Conformation], representations: Representations | None = None
    ) -> None:
        if not rows:
            raise SparringError("there are no conformations to train on")
        self.rows = rows
        self.lengths = [len(row.sequence) for row in rows]
        self._representations = representations
        self._frames, self._atoms, self._torsions = [], [], []
        for row in rows:
            atoms = torch.from_numpy(atoms_array(row))
            atoms = atoms - atoms[:, 1].mean(0)
            self._atoms.append(atoms)
            self._frames.append(atom14.rigid_frames(atoms, atom14.types_of(row.sequence)))
            self._torsions.append(torch.from_numpy(torsions_array(row)))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Some structures, padded to the longest."""
        sequences = [self.rows[n].sequence for n in numbers]
        empty = blank(sequences, self._representations)
        rotations, translations = empty.frames.rotations.clone(), empty.frames.translations.clone()
        torsions, torsion_mask = empty.torsions.clone(), empty.torsion_mask.clone()
        atoms, atom_mask = empty.atoms.clone(), empty.atom_mask.clone()
        for row, n in enumerate(numbers):
            size = self.lengths[n]
            rotations[row, :size] = self._frames[n].rotations
            translations[row, :size] = self._frames[n].translations
            known = ~self._torsions[n].isnan()
            torsions[row, :size] = atom14.sincos(self._torsions[n])
            torsion_mask[row, :size] = known
            there = ~self._atoms[n].isnan().any(-1)
            atoms[row, :size] = self._atoms[n].nan_to_num()
            atom_mask[row, :size] = there
        return Batch(
            frames=Frames(rotations, translations),
            mask=empty.mask,
            types=empty.types,
            index=empty.index,
            torsions=torsions,
            torsion_mask=torsion_mask,
            atoms=atoms,
            atom_mask=atom_mask,
            node=empty.node,
            edge=empty.edge,
        )


def blank(sequences: Sequence[str], representations: Representations | None = None) -> Batch:
    """What is known of sequences before any structure is: types, masks, representations."""
    rows, size = len(sequences), max(len(s) for s in sequences)
    mask = torch.arange(size) < torch.tensor([len(s) for s in sequences])[:, None]
    types = torch.zeros(rows, size, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        types[row, : len(sequence)] = atom14.types_of(sequence)
    index = torch.arange(size).expand(rows, size) * mask
    return Batch(
        frames=Frames(torch.eye(3).repeat(rows, size, 1, 1), torch.zeros(rows, size, 3)),
        mask=mask,
        types=types,
        index=index,
        torsions=torch.tensor([0.0, 1.0]).repeat(rows, size, 7, 1),
        torsion_mask=torch.zeros(rows, size, 7, dtype=torch.bool),
        atoms=torch.zeros(rows, size, 14, 3),
        atom_mask=torch.zeros(rows, size, 14, dtype=torch.bool),
        node=_padded(sequences, representations, "node"),
        edge=_padded(sequences, representations, "edge"),
    )


def _padded(
    sequences: Sequence[str], representations: Representations | None, kind: str
) -> Tensor | None:
    if representations is None:
        return None
    arrays = [representations.of(sequence, kind) for sequence in sequences]
    known = [array for array in arrays if array is not None]
    if not known:
        return None
    size = max(len(s) for s in sequences)
    axes = [size] if kind == "node" else [size, size]
    out = torch.zeros(len(sequences), *axes, known[0].shape[-1])
    for row, array in enumerate(known):
        if kind == "node":
            out[row, : len(array)] = array
        else:
            out[row, : len(array), : len(array)] = array
    return out


def read_conformations(folders: Sequence[Path]) -> list[Conformation]:
    """All rows of some artifacts, or of parquet files such as one's heldout.parquet.

    Raises:
        SparringError: a folder holds none.
    """
    if not folders:
        raise SparringError("no conformations are given; name artifacts with --data")
    rows: list[Conformation] = []
    for folder in folders:
        path = folder if folder.suffix == ".parquet" else folder / CONFORMATIONS
        if not path.is_file():
            raise SparringError(
                f"{folder} has no {CONFORMATIONS}; conf md, conf structures and conf label make one"
            )
        rows += read_rows(path, Conformation)
    return rows


def one_kind(rows: Sequence[Conformation]) -> None:
    """Refuse energies that do not compare.

    Raises:
        SparringError: thermal energies beside those of relaxed hydrogens, or of unknown kind.
    """
    kinds = sorted({row.energy_kind or "unknown" for row in rows})
    if len(kinds) > 1:
        raise SparringError(
            f"energies are of several kinds ({', '.join(kinds)}), which do not compare; give data "
            "of conf md alone, or structures that conf label labelled all"
        )


def bucketed(
    lengths: Sequence[int], size: int, steps: int, seed: int, *, window: int = 32
) -> list[list[int]]:
    """Row numbers of every optimizer step: batches of similar lengths, from the seed alone.

    Rows are shuffled, sorted by length within windows of `window` batches, cut, and the batches
    shuffled; with one length this is a shuffle. Every epoch has its own order and drops what does
    not fill a batch, unless it is all there is.
    """
    from sparring.launch.seeds import derive

    count = len(lengths)
    found: list[list[int]] = []
    epoch = 0
    while len(found) < steps:
        rng = np.random.default_rng(derive(seed, "epoch", epoch))
        order = rng.permutation(count)
        made: list[list[int]] = []
        for start in range(0, count, size * window):
            part = sorted(order[start : start + size * window].tolist(), key=lambda n: lengths[n])
            made += [part[i : i + size] for i in range(0, len(part), size)]
        full = [batch for batch in made if len(batch) == size] or made
        found += [full[n] for n in rng.permutation(len(full))]
        epoch += 1
    return found[:steps]
