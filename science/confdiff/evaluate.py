"""Stage `conf-evaluate`: an ensemble beside a reference of the same chain.

Shape legend: S structures of the ensemble, R of the reference, N residues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sparring.launch.errors import SparringError
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff import comparison, coverage, metrics
from sparring.science.confdiff.config import (
    ConformationEvaluateConfig,
    inverse_temperature_change,
)
from sparring.science.confdiff.dataset import one_kind, read_conformations
from sparring.science.confdiff.labels import minimised_energies
from sparring.science.confdiff.results import PANELS
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import atoms_array, torsions_array
from sparring.science.confdiff.tica import TicaModel

Array = npt.NDArray[np.float64]


class Ensemble:
    """Rows of one chain as arrays.

    Raises:
        SparringError: the rows are of several chains.
    """

    def __init__(self, rows: Sequence[Conformation], where: Path) -> None:
        chains = {(row.sequence, row.capped) for row in rows}
        if len(chains) != 1:
            raise SparringError(f"{where} has {len(chains)} chains; an ensemble is of one")
        ((self.sequence, self.capped),) = chains
        self.rows = rows
        self.atoms: Array = np.stack([atoms_array(row) for row in rows]).astype(np.float64)
        self.torsions: Array = np.stack([torsions_array(row) for row in rows]).astype(np.float64)

    @property
    def chain(self) -> str:
        """For messages."""
        return self.sequence[:40] + (" with caps" if self.capped else "")

    @property
    def ca(self) -> Array:
        """(S, N, 3) nm."""
        return self.atoms[:, :, 1]

    def phi_psi(self) -> Array:
        """(S, N, 2) radians, NaN for the first phi and the last psi.

        No frame tells these two: in samples they are a prediction, nearly the same for all.
        """
        return atom14.backbone_torsions(torch.from_numpy(self.atoms)).numpy()[..., 1:]

    def replicas(self, where: Path) -> list[Array]:
        """CA of each replica of a simulation, or of each trajectory that was read.

        Structures that were read one by one are one ensemble.
        """
        count = len(list(where.glob("replica*.npz")))
        if count:
            return np.array_split(self.ca, count)
        names = [row.chain for row in self.rows]
        starts = [n for n in range(1, len(names)) if names[n] != names[n - 1]]
        parts = np.split(self.ca, starts)
        return parts if min(map(len, parts)) > 1 else [self.ca]


def weights_of(ensemble: Ensemble, reweight: float) -> Array | None:
    """(S,) log-weights: those of a corrected sample, and of a change of temperature.

    Raises:
        SparringError: the change is asked for, and energies or the temperature are not known.
    """
    rows = ensemble.rows
    logs = np.array([row.log_weight or 0.0 for row in rows])
    if not reweight:
        return logs if logs.any() else None
    temperatures = {row.temperature for row in rows}
    if temperatures == {None} or len(temperatures) > 1 or any(r.energy is None for r in rows):
        raise SparringError(
            "reweighting needs the energy and the temperature of every structure: those of conf md"
        )
    one_kind(rows)
    (source,) = temperatures
    assert source is not None
    energies = np.array([row.energy for row in rows], dtype=np.float64)
    change = inverse_temperature_change(reweight, source) * (energies - energies.mean())
    return np.asarray(logs - change, dtype=np.float64)


def relaxed_energies(
    ensemble: Ensemble, config: ConformationEvaluateConfig, seed: int
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Energies in kJ/mol of some structures with hydrogens added and side chains relaxed.

    The backbone is tied to where it is, by springs that the energy does not count.

    Returns:
        (E,) energies, and which structures they are of; those whose atoms lie on each other are
        left out.
    """
    count = min(config.energies, len(ensemble.rows))
    if not count:
        return np.empty(0), np.empty(0, dtype=np.int64)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(ensemble.rows))[:count])
    energies = minimised_energies(
        ensemble.sequence,
        ensemble.atoms[chosen],
        ensemble.torsions[chosen],
        ensemble.capped,
        config.solvent,
        config.platform,
    )
    finite = np.isfinite(energies)
    return np.asarray(energies[finite], dtype=np.float64), chosen[finite]


def _panel(ensemble: Ensemble, tica: TicaModel | None, logs: Array | None) -> dict[str, Array]:
    """What pictures are drawn from."""
    angles = np.degrees(ensemble.phi_psi())
    known = np.isfinite(angles[0]).all(-1)
    tic = tica(ensemble.ca) if tica else np.zeros((len(ensemble.rows), 2))
    return {
        "phi": angles[:, known, 0].ravel(),
        "psi": angles[:, known, 1].ravel(),
        "tic1": tic[:, 0],
        "tic2": tic[:, 1],
        "rg": metrics.radius_of_gyration(ensemble.ca),
        "weights": metrics.normalised(logs, len(ensemble.rows)),
    }


def _energy_figures(energies: Array, logs: Array | None) -> dict[str, float]:
    if not len(energies):
        return {}
    mean = metrics.weighted_mean(energies, logs)
    spread = metrics.weighted_mean((energies - mean) ** 2, logs)
    # Beside the mean: one structure whose atoms lie on each other has the energy of a million.
    order = np.argsort(energies)
    shares = metrics.normalised(logs, len(energies))[order].cumsum()
    middle = energies[order][min(int(np.searchsorted(shares, 0.5)), len(energies) - 1)]
    return {
        "energy": mean,
        "energy_median": float(middle),
        "energy_std": float(np.sqrt(spread)),
        "energies": float(len(energies)),
    }


def _torsion_figures(
    sample: Ensemble, reference: Ensemble, replicas: int, logs: Array | None
) -> dict[str, float]:
    ours, theirs = sample.phi_psi(), reference.phi_psi()
    found: dict[str, float] = {}
    compared = {"js_phi_psi": metrics.js_phi_psi}
    if np.isfinite(theirs[0]).all(-1).any():  # a dipeptide without caps has no pair of them
        compared["js_ramachandran"] = metrics.js_ramachandran
    for name, metric in compared.items():
        distance = metric(ours, theirs, logs)
        found |= {name: distance.js, f"{name}_hit_rate": distance.hit_rate}
        floor = comparison.noise_floor(metric, np.array_split(theirs, replicas), len(ours))
        found[f"{name}_floor"] = floor.js
    return found


def _states(inputs: Mapping[str, Path], sequence: str) -> Array | None:
    """(K, N, 3) CA of the known states of this sequence, if they are given.

    Raises:
        SparringError: none of them is of this sequence.
    """
    if "states" not in inputs:
        return None
    rows = [r for r in read_conformations([inputs["states"]]) if r.sequence == sequence]
    if not rows:
        raise SparringError(f"{inputs['states']} has no structure of {sequence[:40]}")
    return np.stack([atoms_array(row)[:, 1] for row in rows]).astype(np.float64)


def _note_other_law(
    sample: Ensemble, reference: Ensemble, config: ConformationEvaluateConfig, context: Context
) -> None:
    """Say that ensembles of two temperatures are compared; it may be meant."""
    ours, theirs = ({row.temperature for row in e.rows} for e in (sample, reference))
    if config.reweight:
        ours = {config.reweight}
    if None not in ours | theirs and ours != theirs:
        names = [" and ".join(f"{t:g} K" for t in sorted(filter(None, k))) for k in (ours, theirs)]
        context.emit(note=f"the samples are of {names[0]}, the reference of {names[1]}")


def run(
    config: ConformationEvaluateConfig,
    inputs: Mapping[str, Path],
    output: Path,
    context: Context,
) -> Figures:
    """Figures in the manifest, and panels.npz for pictures.

    Raises:
        SparringError: different chains, or energies that reweighting needs are missing.
    """
    rows = read_conformations([inputs["samples"]])
    if config.structures:
        kept = comparison.thinned(len(rows), config.structures, derive(context.seed, "structures"))
        rows = [rows[n] for n in kept]
    sample = Ensemble(rows, inputs["samples"])
    reference = Ensemble(read_conformations([inputs["reference"]]), inputs["reference"])
    if (sample.sequence, sample.capped) != (reference.sequence, reference.capped):
        raise SparringError(
            f"the samples are of {sample.chain}, the reference of {reference.chain}"
        )
    _note_other_law(sample, reference, config, context)
    logs = weights_of(sample, config.reweight)
    replicas = reference.replicas(inputs["reference"])
    tica = TicaModel(replicas, config.lag) if config.lag and len(sample.sequence) > 2 else None
    figures: Figures = comparison.compare(sample.ca, replicas, tica, logs)
    figures |= _torsion_figures(sample, reference, len(replicas), logs)
    figures |= {
        "peptide_break": metrics.peptide_break(sample.atoms, logs),
        "structures": float(len(sample.rows)),
        "ess": metrics.effective_sample_size(logs) if logs is not None else 1.0,
    }
    known = _states(inputs, sample.sequence)
    figures |= coverage.figures(sample.ca, reference.ca, logs, known, sample.sequence)
    panels = _panel(sample, tica, logs)
    panels |= {f"reference_{k}": v for k, v in _panel(reference, tica, None).items()}
    # The same draw for all ensembles that are compared with this reference.
    for name, ensemble, weights in (("", sample, logs), ("reference_", reference, None)):
        energies, chosen = relaxed_energies(ensemble, config, derive(context.seed, "energies"))
        mine = None if weights is None else weights[chosen]
        figures |= {f"{name}{k}": v for k, v in _energy_figures(energies, mine).items()}
        panels |= {
            f"{name}energy": energies,
            f"{name}energy_of": np.array([ensemble.rows[n].number for n in chosen], dtype=float),
            f"{name}energy_weights": metrics.normalised(mine, len(energies))
            if len(energies)
            else energies,
        }
    arrays: dict[str, Any] = panels
    with (output / PANELS).open("wb") as file:
        np.savez(file, **arrays)
    return figures
