"""Stage `conf-label`: energies and forces of structures, in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparring.launch import shards
from sparring.launch.rows import write_rows
from sparring.launch.stages import Context, Figures
from sparring.science.confdiff.config import LabelConfig
from sparring.science.confdiff.dataset import CONFORMATIONS, read_conformations
from sparring.science.confdiff.labels import label
from sparring.science.confdiff.rows import Conformation


def run(config: LabelConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Label this rank's shards."""
    shards.make(
        read_conformations([inputs["data"]]),
        config.chunk,
        Conformation,
        lambda rows: label(rows, config.solvent, config.platform, config.relaxed),
        context,
        unit="conformations",
    )
    return {}


def finish(
    config: LabelConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Put the shards together into conformations.parquet."""
    before = read_conformations([inputs["data"]])
    rows = shards.merge(-(-len(before) // config.chunk), Conformation, context.work)
    write_rows(output / CONFORMATIONS, Conformation, rows)
    figures: Figures = {
        "conformations": len(rows),
        "labelled": sum(row.energy is None for row in before),
        "kinds": sorted({row.energy_kind or "unknown" for row in rows}),
    }
    for name in ("energy", "relaxed_energy") if config.relaxed else ("energy",):
        energies = np.array([getattr(row, name) for row in rows], dtype=np.float64)
        figures |= {name: float(energies.mean()), f"{name}_std": float(energies.std())}
    return figures
