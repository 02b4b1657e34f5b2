"""Stage `conf-md`: replicas of a simulation, dealt out to ranks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparring.launch.errors import SparringError, Stopped, UsageError
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures
from sparring.science.confdiff import md
from sparring.science.confdiff.config import MdConfig
from sparring.science.confdiff.dataset import CONFORMATIONS
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.starts import torsion_start
from sparring.science.confdiff.structures import read

_STARTS = {"extended": ("extended",), "helix": ("helix",), "both": ("extended", "helix")}


def read_fasta(path: Path) -> str:
    """The sequence of a FASTA file.

    Raises:
        SparringError: the file has no sequence, or several.
    """
    try:
        blocks = path.read_text(encoding="utf-8").split(">")
    except (OSError, UnicodeDecodeError) as error:
        raise SparringError(f"{path} cannot be read as FASTA: {error}") from None
    # Before the first heading there may be a sequence, or nothing.
    found = ["".join(blocks[0].split())]
    found += ["".join(block.splitlines()[1:]).replace(" ", "") for block in blocks[1:]]
    sequences = [sequence.upper() for sequence in found if sequence]
    if len(sequences) != 1:
        raise SparringError(
            f"{path} holds {len(sequences)} sequences; one file with one sequence is wanted"
        )
    return sequences[0]


def chosen_sequence(given: str, inputs: Mapping[str, Path]) -> tuple[str, bool | None]:
    """The one sequence that --sequence, --fasta and --pdb name, and its ends if a file shows them.

    Raises:
        UsageError: more than one of them is given.
        SparringError: a file has no sequence, or several.
    """
    sources = [name for name in ("fasta", "pdb") if name in inputs]
    if len(sources) + bool(given) > 1:
        named = ", ".join(["--sequence"] * bool(given) + [f"--{name}" for name in sources])
        raise UsageError(f"{named} are given; one of them is enough")
    if "fasta" in inputs:
        return read_fasta(inputs["fasta"]), None
    if "pdb" in inputs:
        rows = read(inputs["pdb"]).conformations
        chains = {(row.sequence, row.capped) for row in rows}
        if len(chains) > 1:
            raise SparringError(f"{inputs['pdb']} has {len(chains)} chains; leave one")
        return chains.pop()
    return given, None


def simulation(
    config: MdConfig, inputs: Mapping[str, Path], seed: int, replica: int
) -> md.Simulation:
    """What one replica is.

    Raises:
        UsageError: no sequence is given, or more than one.
    """
    sequence, capped = chosen_sequence(config.sequence, inputs)
    if not sequence:
        raise UsageError("give a sequence: --sequence AAAAA, --fasta FILE or --pdb FILE")
    starts = _STARTS[config.start]
    if config.torsions:
        starts += (torsion_start(config.torsions),)
    start = str(inputs["pdb"]) if "pdb" in inputs else starts[replica % len(starts)]
    return md.Simulation(
        sequence=sequence,
        capped=config.capped if capped is None else capped,
        temperature=config.temperature,
        frames=max(1, round(1000 * config.nanoseconds / config.save_every)),
        interval=config.save_every,
        equilibration=1000 * config.equilibration,
        start=start,
        seed=derive(seed, "replica", replica),
        timestep=config.timestep,
        friction=config.friction,
        solvent=config.solvent,
        platform=config.platform,
    )


def _folder(work: Path, replica: int) -> Path:
    return work / f"replica{replica}"


def run(config: MdConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Simulate this rank's replicas, from where an earlier call stopped."""
    world = context.world
    mine = list(range(config.replicas))[world.rank :: world.size]

    def progress(done: int, total: int) -> None:
        context.emit(done=done, total=total, unit="segments", rank=world.rank)
        if context.stopped() and done < total:
            raise Stopped("stopped; run the same command again to go on")

    for replica in mine:
        made = simulation(config, inputs, context.seed, replica)
        md.simulate(made, _folder(context.work, replica), progress)
    return {}


def finish(config: MdConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Put the replicas together.

    Writes topology.pdb, replica<r>.xtc (all atoms), replica<r>.npz (see `md.run_replica`) and
    conformations.parquet.
    """
    rows: list[Conformation] = []
    temperatures = []
    for replica in range(config.replicas):
        folder = _folder(context.work, replica)
        first = len(rows)
        rows += [
            dataclasses.replace(row, number=first + place)
            for place, row in enumerate(md.conformations(folder))
        ]
        for ending in ("xtc", "npz"):
            shutil.copy(folder / f"replica0.{ending}", output / f"replica{replica}.{ending}")
        with np.load(folder / "replica0.npz") as data:
            temperatures.append(float(data["temperature"].mean()))
    shutil.copy(_folder(context.work, 0) / "topology.pdb", output / "topology.pdb")
    write_rows(output / CONFORMATIONS, Conformation, rows)
    energies = np.array([row.energy for row in rows], dtype=np.float64)
    return {
        "conformations": len(rows),
        "residues": len(rows[0].sequence),
        "replicas": config.replicas,
        "temperature": float(np.mean(temperatures)),
        "energy": float(energies.mean()),
        "energy_std": float(energies.std()),
    }
