"""Stage `conf-guide`: a network of the intermediate energy, or of its gradient.

The data's Boltzmann law at its own temperature becomes that of another one by k E with
k = 1/(R T_target) - 1/(R T_data), E the potential energy of each structure.

Shape legend: B structures, D structures of the data, N residues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.launch.config import resolved
from sparring.launch.errors import SparringError
from sparring.launch.optimisation import accumulate, descend, micro_batches
from sparring.launch.seeds import derive
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context, Figures, many
from sparring.launch.training import learning_rate
from sparring.optimizers import build_optimizer
from sparring.science.confdiff.config import (
    GAS_CONSTANT,
    GuideConfig,
    inverse_temperature_change,
)
from sparring.science.confdiff.dataset import Dataset, Representations, read_conformations
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance_losses import (
    boltzmann_weights,
    contrastive_energy_loss,
    force_anchor_loss,
    force_loss,
)
from sparring.science.confdiff.heads import EnergyNetwork, ForceNetwork
from sparring.science.confdiff.network import ConformationNetwork, load
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.smc import kish
from sparring.science.confdiff.structures import forces_array
from sparring.science.confdiff.tangent import Score, Tangent
from sparring.science.confdiff.train import chains, drawn, save

KINDS = {"energy": EnergyNetwork, "force": ForceNetwork}


class Labels:
    """Weights e^(-k E) of labelled structures, by chain.

    Args:
        data: structures, all of one temperature.
        temperature: K that is aimed at.

    Raises:
        SparringError: a structure has no energy, or the data no one temperature.
    """

    def __init__(self, data: Dataset, temperature: float) -> None:
        known = {row.temperature for row in data.rows}
        source = known.pop() if len(known) == 1 else None
        if source is None:
            raise SparringError(
                "guidance needs data of one temperature, which conf md writes and conf structures "
                "takes as --temperature; these have none, or several"
            )
        self.source = source
        lacking = [row for row in data.rows if row.energy is None]
        if lacking:
            raise SparringError(
                f"{len(lacking)} of {len(data)} structures have no energy, the first is number "
                f"{lacking[0].number} of {lacking[0].chain}; conf label computes them"
            )
        self.temperature = temperature
        k = inverse_temperature_change(temperature, self.source)
        self.chains: dict[tuple[str, bool], list[int]] = {}
        for number, row in enumerate(data.rows):
            self.chains.setdefault((row.sequence, row.capped), []).append(number)
        self.weights = torch.empty(len(data), dtype=torch.float64)
        for (sequence, _), numbers in self.chains.items():
            energies = torch.tensor([data.rows[n].energy for n in numbers], dtype=torch.float64)
            try:
                self.weights[numbers] = boltzmann_weights(k * energies)
            except ValueError as error:
                raise SparringError(f"{sequence[:40]}: {error}") from None

    def effective(self) -> float:
        """Kish's share of effective structures, the least of all chains."""
        shares = [
            float(kish(self.weights[numbers].log())) / len(numbers)
            for numbers in self.chains.values()
        ]
        return min(shares)

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


class GuideTrainer:
    """Guide, base model, optimizer and data of one rank."""

    def __init__(
        self,
        settings: GuideConfig,
        base: ConformationNetwork,
        data: Dataset,
        labels: Labels,
        context: Context,
    ) -> None:
        self.settings, self.data, self.labels, self.context = settings, data, labels, context
        passes = micro_batches(settings.batch, settings.micro_batch, context.world)
        self.sharding = Sharding(settings, context.world, micro_batches=passes)
        torch.manual_seed(derive(context.seed, "start") % 2**63)
        guide: Any = KINDS[settings.kind].from_base(base, train_trunk=settings.train_trunk)
        guide.freeze()
        if settings.gradient_checkpointing:
            guide.gradient_checkpointing_enable()
        self.config = guide.config
        self.process = self.config.diffusion
        trained = [(name, p) for name, p in guide.named_parameters() if p.requires_grad]
        lr = learning_rate(settings, 0, settings.steps)
        optimizer = build_optimizer(settings.optimizer, trained, lr=lr)
        self.network = self.sharding.prepare(guide.train(), optimizer)
        self.base = base.requires_grad_(False).eval().to(self.sharding.device)

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of a global batch; returns this rank's sums of figures."""
        forward = self._energy if self.settings.kind == "energy" else self._force
        return accumulate(
            self.sharding,
            rows,
            lambda some: forward(number, some),
            micro_batch=self.settings.micro_batch,
        )

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, means over its structures, from their sums."""
        count = sums.pop("rows")
        return {name: value / count for name, value in sums.items()}

    def _noised(
        self, number: int, rows: Sequence[int]
    ) -> tuple[Any, Frames, Tensor, Tangent, Tensor]:
        device = self.sharding.device
        batch = self.data.batch(rows)
        t, noise = drawn(self.context.seed, number, rows, batch.mask.shape[1], self.process)
        if self.settings.kind == "energy":
            # A contrast is between structures at one time; its first row decides it.
            t = t[:1].expand(len(t))
        batch, t, noise = batch.to(device), t.to(device), noise.to(device)
        x_t = self.process.noised(batch.frames, t, batch.mask, noise)
        return batch, x_t, t, noise, self.labels.weights[list(rows)].to(device)

    def _energy(self, number: int, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        batch, x_t, t, _, weights = self._noised(number, rows)
        if len(rows) < 2:
            raise SparringError(
                f"an energy is learnt from contrasts of two structures or more, not {len(rows)}; "
                "take a larger guide.micro_batch, or fewer ranks"
            )
        told = chains(self.config, batch).inputs(self.config)
        energies = self.network(x_t.rotations, x_t.translations, t.float(), **told)
        loss = contrastive_energy_loss(energies[None], weights[None])[0]
        # What knowing nothing costs: weights have the mean 1 over the data, not over a batch.
        blank = float(weights.mean()) * math.log(len(rows))
        count = float(len(rows))
        sums = {"loss": float(loss.detach()) * count, "blank": blank * count, "rows": count}
        return loss * count, sums

    def _force(self, number: int, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        batch, x_t, t, _, weights = self._noised(number, rows)
        told = chains(self.config, batch).inputs(self.config)
        target = self.process.score_given(x_t, batch.frames, t, batch.mask)
        base = self._base_score(x_t, t, batch)
        made = self.network(x_t.rotations, x_t.translations, t.float(), **told)
        force = Tangent(made.translation, made.rotation).projected(batch.mask)
        loss = force_loss(force, base, target, weights, t, batch.mask, self.process)
        blank = force_loss(force.times(0.0), base, target, weights, t, batch.mask, self.process)
        found = {"loss": loss, "blank": blank.detach()}
        if self.settings.anchor:
            found["anchor"] = self._anchor(batch, rows, weights)
            found["loss"] = loss + self.settings.anchor * found["anchor"]
        sums = {name: float(value.detach().sum()) for name, value in found.items()}
        return found["loss"].sum(), {**sums, "rows": float(len(rows))}

    @torch.no_grad()
    def _base_score(self, x: Frames, t: Tensor, batch: Any) -> Score:
        told = chains(self.base.config, batch).inputs(self.base.config)
        made = self.base(x.rotations, x.translations, t, **told)
        process: Process = self.process
        return process.score_given(x, Frames(made.rotations, made.translations), t, batch.mask)

    def _anchor(self, batch: Any, rows: Sequence[int], weights: Tensor) -> Tensor:
        """(B,) matching of simulated forces at the earliest time.

        There s_q = b_data E[f | x], and F_0 = s_q - b_target E[w f | x] / E[w | x], b = 1/RT: what
        regression with weights w on s_q(x) - b_target f finds.
        """
        t = torch.full((len(rows),), self.process.t_min, dtype=torch.float64)
        t = t.to(batch.mask.device)
        score = self._base_score(batch.frames, t, batch)
        force = torch.zeros(*batch.mask.shape, 6)
        for place, row in enumerate(rows):
            known = torch.from_numpy(forces_array(self.data.rows[row]))
            force[place, : len(known)] = known / (GAS_CONSTANT * self.labels.temperature)
        force = force.to(batch.mask.device)
        # Torques are given in the laboratory's axes.
        torque = (force[..., None, 3:] @ batch.frames.rotations)[..., 0, :]
        simulated = Tangent(force[..., :3], torque).projected(batch.mask)
        told = chains(self.config, batch).inputs(self.config)
        made = self.network(batch.frames.rotations, batch.frames.translations, t.float(), **told)
        first = Tangent(made.translation_0, made.rotation_0).projected(batch.mask)
        found = force_anchor_loss(first, score.plus(simulated, -1.0), batch.mask, weights)
        scale: Tensor = self.process.score_scale(t)[0].to(found)
        return found / scale**2


def run(config: GuideConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Train; writes config.json, model.safetensors and metrics.jsonl.

    Raises:
        SparringError: structures without energies or a temperature.
    """
    settings = resolved(config, 0)
    path = inputs.get("representations")
    data = Dataset(
        read_conformations(many("data", inputs)), Representations(path) if path else None
    )
    labels = Labels(data, settings.temperature)
    base = load(inputs["model"])
    trainer = GuideTrainer(settings, base, data, labels, context)
    done = descend(
        trainer.sharding,
        labels.plan(settings.batch, settings.steps, context.seed),
        trainer.gradients,
        trainer.means,
        config=settings,
        rate=lambda number: learning_rate(settings, number, settings.steps),
        context=context,
        output=output,
    )
    trainer.config.data = dict(base.config.data)
    trainer.config.target = settings.temperature
    save(trainer.sharding, KINDS[settings.kind](trainer.config), output, context)
    trainer.sharding.close()
    return {
        "kind": settings.kind,
        "steps": settings.steps,
        "conformations": len(data),
        "from_kelvin": labels.source,
        "to_kelvin": settings.temperature,
        "effective": round(labels.effective(), 4),
        "zero": trainer.sharding.stage,
        **{k: v for k, v in done.last.items() if k not in ("lr", "grad_norm")},
    }
