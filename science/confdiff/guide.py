"""Stage `conf-guide`: a network of the intermediate energy, or of its gradient.

The data's Boltzmann law at its own temperature becomes that of another one by k E with
k = 1/(R T_target) - 1/(R T_data), E the potential energy of each structure (weights.py).

Shape legend: B structures, G contrasts, K structures of a contrast, N residues.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.launch import artifacts
from sparring.launch.config import resolved
from sparring.launch.errors import SparringError
from sparring.launch.optimisation import accumulate, descend, micro_batches
from sparring.launch.seeds import derive
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context, Figures, many
from sparring.launch.training import learning_rate
from sparring.optimizers import build_optimizer
from sparring.optimizers.groups import embeddings
from sparring.science.confdiff.config import GuideConfig
from sparring.science.confdiff.dataset import Dataset, Representations, read_conformations
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import no_step, slope
from sparring.science.confdiff.guidance_losses import (
    anchor_target,
    consistency_loss,
    contrastive_energy_loss,
    force_anchor_loss,
    force_loss,
    mean_weight_loss,
)
from sparring.science.confdiff.heads import EnergyNetwork, ForceNetwork
from sparring.science.confdiff.network import WEIGHTS, ConformationNetwork, load
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.structures import forces_array
from sparring.science.confdiff.tangent import Score, Tangent, moved_along
from sparring.science.confdiff.train import chains, drawn, provenance, save
from sparring.science.confdiff.weights import Labels, contrasts

KINDS = {"energy": EnergyNetwork, "force": ForceNetwork}


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
        # What a batch is made of: contrasts, so that ranks and micro-batches split none.
        energy = settings.kind == "energy"
        self.unit = min(settings.contrast, settings.batch) if energy else 1
        self.micro_batch = max(1, settings.micro_batch // self.unit)
        passes = micro_batches(settings.batch // self.unit, self.micro_batch, context.world)
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
        tables = embeddings(guide)
        optimizer = build_optimizer(settings.optimizer, trained, lr=lr, tables=tables)
        self.network = self.sharding.prepare(guide.train(), optimizer)
        self.base = base.requires_grad_(False).eval().to(self.sharding.device)

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of a global batch; returns this rank's sums of figures."""
        if self.settings.kind == "force":
            return accumulate(
                self.sharding,
                rows,
                lambda some: self._force(number, some),
                micro_batch=self.micro_batch,
            )
        groups = contrasts(rows, self.unit)
        return accumulate(
            self.sharding,
            range(len(groups)),
            lambda some: self._energy(number, [groups[n] for n in some]),
            micro_batch=self.micro_batch,
        )

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, means over its structures or contrasts, from their sums."""
        count = sums.pop("count")
        return {name: value / count for name, value in sums.items()}

    def _noised(
        self, number: int, rows: Sequence[int], group: int = 1
    ) -> tuple[Any, Frames, Tensor, Tensor]:
        """Structures noised, with their times and weights; each `group` of them has one time."""
        device = self.sharding.device
        batch, lengths = self.data.batch(rows), [self.data.lengths[row] for row in rows]
        t, noise = drawn(
            self.context.seed, number, rows, lengths, self.process, self.settings.times
        )
        t = t[::group].repeat_interleave(group)
        batch, t, noise = batch.to(device), t.to(device), noise.to(device)
        x_t = self.process.noised(batch.frames, t, batch.mask, noise)
        return batch, x_t, t, self.labels.weights[list(rows)].to(device)

    def _energy(
        self, number: int, groups: Sequence[Sequence[int]]
    ) -> tuple[Tensor, dict[str, float]]:
        rows, size = [row for group in groups for row in group], len(groups[0])
        batch, x_t, t, weights = self._noised(number, rows, size)
        told = chains(self.config, batch).inputs(self.config)
        energies = self.network(x_t.rotations, x_t.translations, t.float(), **told)
        weights_GK = weights.reshape(-1, size)
        loss = contrastive_energy_loss(energies.reshape(-1, size), weights_GK)
        # What knowing nothing costs: weights have the mean 1 over the data, not over a group.
        blank = weights_GK.mean(-1) * math.log(size)
        found = {"loss": loss, "blank": blank}
        return loss.sum(), _sums(found)

    def _force(self, number: int, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        batch, x_t, t, weights = self._noised(number, rows)
        told = chains(self.config, batch).inputs(self.config)
        target = self.process.score_given(x_t, batch.frames, t, batch.mask)
        base = self._base_score(x_t, t, batch)
        made = self.network(x_t.rotations, x_t.translations, t.float(), **told)
        force = Tangent(made.translation, made.rotation).projected(batch.mask)
        expected = (-made.energy.detach()).exp()
        loss = force_loss(force, base, target, weights, expected, t, batch.mask, self.process)
        loss = loss + mean_weight_loss(made.energy, weights)
        found = {"loss": loss, "blank": torch.ones_like(loss)}
        if self.settings.consistency:
            of_energy = self._slope(x_t, t, batch)
            apart = consistency_loss(force, of_energy, t, batch.mask, self.process)
            found["inconsistency"] = apart
            found["loss"] = found["loss"] + self.settings.consistency * apart
        if self.settings.anchor:
            found["anchor"] = self._anchor(batch, rows, weights)
            found["loss"] = found["loss"] + self.settings.anchor * found["anchor"]
        return found["loss"].sum(), _sums(found)

    def _slope(self, x: Frames, t: Tensor, batch: Any) -> Tangent:
        """grad f of the energy that a force network learns too.

        By a forward pass of its own, past DeepSpeed, which takes any backward pass from an output
        of its engine for the one of the loss.
        """
        network, told = self.sharding.bare(), chains(self.config, batch).inputs(self.config)
        step = no_step(x)
        at = moved_along(x, step)
        with self.sharding.autocast():
            made = network(at.rotations, at.translations, t.float(), **told)
        return slope(made.energy, step, batch.mask)

    @torch.no_grad()
    def _base_score(self, x: Frames, t: Tensor, batch: Any) -> Score:
        told = chains(self.base.config, batch).inputs(self.base.config)
        made = self.base(x.rotations, x.translations, t, **told)
        process: Process = self.process
        return process.score_given(x, Frames(made.rotations, made.translations), t, batch.mask)

    def _anchor(self, batch: Any, rows: Sequence[int], weights: Tensor) -> Tensor:
        """(B,) matching of simulated forces at the earliest time, in units of the score.

        s_q of t_min is read at clean frames, for s_q of t = 0, which no network was trained for:
        the anchor is as biased as these two differ.
        """
        t = torch.full((len(rows),), self.process.t_min, dtype=torch.float64)
        t = t.to(batch.mask.device)
        score = self._base_score(batch.frames, t, batch)
        force = torch.zeros(*batch.mask.shape, 6)
        for place, row in enumerate(rows):
            known = torch.from_numpy(forces_array(self.data.rows[row]))
            force[place, : len(known)] = known
        target = anchor_target(
            score, force.to(batch.mask.device), batch.frames, self.labels.temperature, batch.mask
        )
        told = chains(self.config, batch).inputs(self.config)
        made = self.network(batch.frames.rotations, batch.frames.translations, t.float(), **told)
        first = Tangent(made.translation, made.rotation).projected(batch.mask)
        found = force_anchor_loss(first, target, batch.mask, weights)
        scale: Tensor = self.process.score_scale(t)[0].to(found)
        return found / scale**2


def _sums(found: Mapping[str, Tensor]) -> dict[str, float]:
    sums = {name: float(value.detach().sum()) for name, value in found.items()}
    return {**sums, "count": float(len(found["loss"]))}


def _check_same_law(base: float | None, source: float, context: Context) -> None:
    """The guide tilts the law that the base samples, so its data must be of that law."""
    if base is None:
        context.emit(
            note=f"the base was trained on data of no temperature, or of several: samples follow "
            f"the new temperature only as far as it samples the law of {source:g} K"
        )
    elif base != source:
        raise SparringError(
            f"the base was trained on data of {base:g} K, and these are of {source:g} K: weights "
            "would lead from another law than the base samples; give data of the base's temperature"
        )


def run(config: GuideConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Train; writes config.json, model.safetensors and metrics.jsonl.

    Raises:
        SparringError: as :class:`Labels`; a chain of one structure, of which no energy is learnt;
            data of another temperature than the base's.
    """
    settings = resolved(config, 0)
    path = inputs.get("representations")
    data = Dataset(
        read_conformations(many("data", inputs)), Representations(path) if path else None
    )
    labels = Labels(data, settings.temperature, settings.energy, forces=settings.anchor > 0)
    if settings.kind == "energy":
        for numbers in labels.chains.values():
            contrasts(numbers, settings.contrast)  # refuses what it cannot learn from at once
    base = load(inputs["model"])
    _check_same_law(base.config.data.get("temperature"), labels.source, context)
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
    trainer.config.data = provenance(data)
    trainer.config.target = settings.temperature
    trainer.config.base = artifacts.hash_file(inputs["model"] / WEIGHTS)
    save(trainer.sharding, KINDS[settings.kind](trainer.config), output, context)
    trainer.sharding.close()
    return {
        "kind": settings.kind,
        "steps": settings.steps,
        "conformations": len(data),
        "from_kelvin": labels.source,
        "to_kelvin": settings.temperature,
        **labels.figures(),
        "zero": trainer.sharding.stage,
        **{k: v for k, v in done.last.items() if k not in ("lr", "grad_norm")},
    }
