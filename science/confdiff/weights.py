"""Boltzmann weights of labelled structures: what guides learn from.

Guides need w(x_0) = E[e^(-k U) | x_0] of a structure's frames x_0. A single e^(-k U) estimates it
with all the thermal noise of bonds, hydrogens and side chains. By the tower rule any label whose
mean given the frames is the same will do, and one with less noise is better (Rao-Blackwell). Here

    U = a + b E + rest       least squares over the data, E the relaxed energy (labels.py)
    w = e^(-k (a + b E))

which is E[e^(-k U) | E] up to a constant if the rest does not depend on E. What frames tell of U
beyond E is lost: the law that is learnt is that of a + b E, a little wider than Boltzmann's.

Shape legend: D structures of the data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.launch.seeds import derive
from sparring.science.confdiff.config import inverse_temperature_change
from sparring.science.confdiff.dataset import Dataset, one_kind
from sparring.science.confdiff.guidance_losses import boltzmann_weights
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.smc import kish
from sparring.science.confdiff.structures import forces_array

Energy = Literal["measured", "relaxed"]


def regression(energies: Tensor, relaxed: Tensor) -> tuple[Tensor, float, float]:
    """The least-squares line of energies on relaxed energies.

    Args:
        energies: (D,) U in kJ/mol.
        relaxed: (D,) E in kJ/mol.

    Returns:
        (D,) a + b E in kJ/mol, b, and R^2, the share of U's variance that it explains.
    """
    x, y = relaxed - relaxed.mean(), energies - energies.mean()
    slope = float((x @ y) / (x @ x).clamp_min(1e-12))
    fitted = energies.mean() + slope * x
    return fitted, slope, float(slope * (x @ y) / (y @ y).clamp_min(1e-12))


class Labels:
    """Weights e^(-k U) of labelled structures, by chain; over their mean over a chain's data.

    Args:
        data: structures, all of one temperature.
        temperature: K that is aimed at.
        energy: U as measured, or as a + b E.
        forces: whether forces are needed too.

    Raises:
        SparringError: the data have no one temperature, or that which is aimed at; a structure
            lacks what is needed, or has it of another kind than the others, or not finite.
    """

    def __init__(
        self,
        data: Dataset,
        temperature: float,
        energy: Energy = "measured",
        *,
        forces: bool = False,
    ) -> None:
        self.temperature, self.source = temperature, _temperature(data)
        if temperature == self.source:
            raise SparringError(
                f"the data are of {self.source:g} K already, so that there is nothing to guide to; "
                "give another --temperature"
            )
        fields = {"energy": "energy"} | ({"relaxed_energy": "relaxed energy"} if energy ==
                                         "relaxed" else {})  # fmt: skip
        for field, named in fields.items():
            _all_have(data.rows, field, named)
        one_kind(data.rows)
        if forces:
            _finite_forces(data.rows)
        self.energy, self.data = energy, data
        self.chains: dict[tuple[str, bool], list[int]] = {}
        for number, row in enumerate(data.rows):
            self.chains.setdefault((row.sequence, row.capped), []).append(number)
        self.weights = torch.empty(len(data), dtype=torch.float64)
        self._figures: dict[str, list[float]] = {}
        for (sequence, _), numbers in self.chains.items():
            try:
                self.weights[numbers] = self._chain(numbers)
            except ValueError as error:
                raise SparringError(f"{sequence[:40]}: {error}") from None

    def _chain(self, numbers: list[int]) -> Tensor:
        k = inverse_temperature_change(self.temperature, self.source)
        energies = self._column("energy", numbers)
        weights = boltzmann_weights(k * energies)
        if self.energy == "relaxed":
            self._note("effective_measured", _share(weights))
            fitted, slope, explained = regression(energies, self._column("relaxed_energy", numbers))
            weights = boltzmann_weights(k * fitted)
            self._note("slope", slope)
            self._note("r2", explained)
        self._note("effective", _share(weights))
        return weights

    def _column(self, field: str, numbers: list[int]) -> Tensor:
        values = [getattr(self.data.rows[n], field) for n in numbers]
        return torch.tensor(values, dtype=torch.float64)

    def _note(self, name: str, value: float) -> None:
        self._figures.setdefault(name, []).append(value)

    def figures(self) -> dict[str, float]:
        """Kish's effective share of structures, the least of all chains; of "relaxed" also that of
        the measured energies, and the regression's slope and R^2, means over chains."""
        return {
            name: round(min(v) if name.startswith("effective") else math.fsum(v) / len(v), 4)
            for name, v in self._figures.items()
        }

    def plan(self, size: int, steps: int, seed: int) -> list[list[int]]:
        """Row numbers of every step: batches of one chain each, from the seed alone."""
        found: list[list[int]] = []
        epoch = 0
        while len(found) < steps:
            rng = np.random.default_rng(derive(seed, "epoch", epoch))
            made: list[list[int]] = []
            for numbers in self.chains.values():
                order = [numbers[n] for n in rng.permutation(len(numbers))]
                cut = [order[i : i + size] for i in range(0, len(order), size)]
                made += [batch for batch in cut if len(batch) == size] or cut[:1]
            found += [made[n] for n in rng.permutation(len(made))]
            epoch += 1
        return found[:steps]


def contrasts(rows: Sequence[int], size: int) -> list[list[int]]:
    """Rows of one chain in groups of `size`, or all in one if they are fewer; a rest is left out.

    Raises:
        SparringError: there is one row alone.
    """
    if len(rows) < 2:
        raise SparringError(
            "an energy is learnt from contrasts of two structures or more of one chain, and one "
            "chain has a single structure; leave it out"
        )
    size = min(size, len(rows))
    return [list(rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]


def _share(weights: Tensor) -> float:
    return float(kish(weights.log())) / len(weights)


def _temperature(data: Dataset) -> float:
    known = {row.temperature for row in data.rows}
    source = known.pop() if len(known) == 1 else None
    if source is None:
        raise SparringError(
            "guidance needs data of one temperature, which conf md writes and conf structures "
            "takes as --temperature; these have none, or several"
        )
    return source


def _all_have(rows: Sequence[Conformation], field: str, named: str) -> None:
    lacking = [row for row in rows if getattr(row, field) is None]
    if lacking:
        how = "conf label" + (" --relaxed True" if field == "relaxed_energy" else "")
        raise SparringError(
            f"{len(lacking)} of {len(rows)} structures have no {named}, the first is number "
            f"{lacking[0].number} of {lacking[0].chain}; {how} computes them"
        )


def _finite_forces(rows: Sequence[Conformation]) -> None:
    for row in rows:
        if not np.isfinite(forces_array(row)).all():
            raise SparringError(
                f"structure {row.number} of {row.chain} has forces that are not finite; leave it "
                "out, or train without --anchor"
            )
