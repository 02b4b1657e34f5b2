"""Stage `conf-structures`: structure files and trajectories become rows."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures, many
from sparring.science.confdiff import structures
from sparring.science.confdiff.config import StructuresConfig
from sparring.science.confdiff.dataset import CONFORMATIONS
from sparring.science.confdiff.rows import Conformation

HELDOUT = "heldout.parquet"
_ENDINGS = (".pdb", ".cif", ".ent", ".pdb.gz", ".cif.gz", ".ent.gz")


def structure_files(paths: Sequence[Path]) -> list[Path]:
    """Files, and those in folders, in order.

    Raises:
        SparringError: a path that is not there, or a folder without structures.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if p.name.lower().endswith(_ENDINGS))
        if not inside:
            raise SparringError(f"{path} holds no file that ends in {', '.join(_ENDINGS[:3])}")
        found += inside
    return found


def _from_files(
    config: StructuresConfig, pdb: Sequence[Path], traj: Sequence[Path], context: Context
) -> tuple[list[Conformation], int, int]:
    """Rows, atoms that were ignored, and files that were left out."""
    files = structure_files(pdb)
    if not files:
        raise UsageError("give structures with --pdb, or set --source bioemu")
    rows: list[Conformation] = []
    ignored = 0
    alone: list[tuple[Path, Path | None]] = [(path, None) for path in files]
    read = [(path, files[0]) for path in traj] or alone
    failures: list[SparringError] = []
    for number, (path, topology) in enumerate(read):
        try:
            reading = structures.read(path, topology, stride=config.stride)
        except SparringError as error:
            if topology is not None or len(read) == 1:
                raise
            # Of the PDB's files every fifth has a gap or a residue that is none of the twenty.
            failures.append(error)
            context.emit(note=f"left out: {error}")
            continue
        rows += reading.conformations
        ignored += reading.ignored
        context.emit(done=number + 1, total=len(read), unit="files")
    if not rows:
        raise failures[0]
    return rows, ignored, len(failures)


def collect(
    config: StructuresConfig, pdb: Sequence[Path], traj: Sequence[Path], context: Context
) -> tuple[list[Conformation], Figures]:
    """Rows of all sources, and what was left out.

    Raises:
        SparringError: nothing is left, or a file cannot be used (structures.read says why).
    """
    if config.source == "bioemu":
        if pdb or traj:
            raise UsageError("--source bioemu takes no --pdb and no --traj")
        rows, skipped = structures.benchmark_structures(config.max_length)
        for name, reason in skipped.items():
            if "more than" not in reason:  # long ones are many, and counted
                context.emit(note=f"left out {name}: {reason}")
        figures: Figures = {"left_out": len(skipped)}
    else:
        rows, ignored, files = _from_files(config, pdb, traj, context)
        figures = {"ignored_atoms": ignored, "left_out": files}
    kept = [r for r in rows if config.min_length <= len(r.sequence) <= config.max_length]
    figures["left_out"] += len({r.chain for r in rows}) - len({r.chain for r in kept})
    if not kept:
        lengths = sorted({len(r.sequence) for r in rows})
        raise SparringError(
            f"no chain has {config.min_length} to {config.max_length} residues; the lengths are "
            f"{lengths}: change min_length or max_length"
        )
    if config.temperature:
        kept = [dataclasses.replace(r, temperature=config.temperature) for r in kept]
    return kept, figures


def split(
    rows: Sequence[Conformation], share: float, seed: int
) -> tuple[list[Conformation], list[Conformation]]:
    """Training and held-out rows: whole sequences, or the last structures of the only one."""
    sequences = sorted({r.sequence for r in rows})
    if len(sequences) == 1:
        cut = len(rows) - round(share * len(rows))
        return list(rows[:cut]), list(rows[cut:])
    order = np.random.default_rng(derive(seed, "heldout")).permutation(len(sequences))
    out = {sequences[n] for n in order[: round(share * len(sequences))]}
    return [r for r in rows if r.sequence not in out], [r for r in rows if r.sequence in out]


def run(
    config: StructuresConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write conformations.parquet, and heldout.parquet if some are held out."""
    rows, figures = collect(config, many("pdb", inputs), many("traj", inputs), context)
    train, heldout = split(rows, config.heldout, context.seed)
    if not train:
        raise SparringError(f"heldout = {config.heldout} of {len(rows)} leaves none to train on")
    write_rows(output / CONFORMATIONS, Conformation, train)
    if heldout:
        write_rows(output / HELDOUT, Conformation, heldout)
    lengths = Counter(len(r.sequence) for r in train)
    return {
        "conformations": len(train),
        "heldout": len(heldout),
        "chains": len({r.chain for r in rows}),
        "shortest": min(lengths),
        "longest": max(lengths),
        **figures,
    }
