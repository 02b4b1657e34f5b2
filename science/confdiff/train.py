"""Stage `conf-train`: the network that predicts clean frames and torsions.

Times and noise are drawn from (step, row), so they depend neither on ranks nor on micro-batches.

Shape legend: B structures, N residues.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

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
from sparring.optimizers.groups import embeddings
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff import losses
from sparring.science.confdiff.config import ConformationTrainConfig, LossConfig
from sparring.science.confdiff.dataset import (
    Batch,
    Dataset,
    Representations,
    bucketed,
    read_conformations,
)
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import Chains
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork, load
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.rows import TORSIONS
from sparring.science.confdiff.sizes import SIZES
from sparring.science.confdiff.solvers import Grid
from sparring.science.confdiff.tangent import Tangent

_FROM_ATOMS = ("N", "CA", "C", "O")
# The backbone's group, and one a torsion from psi on: omega and phi move no atom of their residue.
_GROUPS = [0, *(1 + TORSIONS.index(name) for name in TORSIONS if name not in ("omega", "phi"))]


def drawn(
    seed: int,
    number: int,
    rows: Sequence[int],
    lengths: Sequence[int],
    process: Process,
    grid: Grid = "uniform",
) -> tuple[Tensor, Tangent]:
    """Times (B,) and normal numbers (B, N, 3) of a step's rows, each from its own seed.

    Rows have `lengths` residues; what lies beyond is zero.

    t is t_min + (1 - t_min) u, or u^2 in place of u (quadratic), with u uniform on [0, 1]. Losses
    have their minimum at each t alone, so that the density of t moves no minimum. Padding does not
    change what a row draws.
    """
    generator = torch.Generator()
    times = torch.empty(len(rows), dtype=torch.float64)
    noise = torch.zeros(len(rows), max(lengths), 6)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        generator.manual_seed(derive(seed, "noise", number, row))
        times[place] = torch.rand((), generator=generator, dtype=torch.float64)
        # Of the row's own length: a shorter draw is no beginning of a longer one.
        noise[place, :length] = torch.randn(length, 6, generator=generator)
    t = process.t_min + (1 - process.t_min) * (times if grid == "uniform" else times**2)
    return t, Tangent(noise[..., :3], noise[..., 3:])


def chains(config: ConformationConfig, batch: Batch) -> Chains:
    """What a network is told beside x_t and t.

    Raises:
        SparringError: it was trained with pretrained arrays, and none are given.
    """
    for name, width in (("node", config.node_dim), ("edge", config.edge_dim)):
        if width and getattr(batch, name) is None:
            raise SparringError(
                f"the network was trained with pretrained {name} arrays; give --representations"
            )
    return Chains(
        mask=batch.mask, index=batch.index, aatype=batch.types, node=batch.node, edge=batch.edge
    )


def loss_terms(
    predicted: Frames,
    torsions: Tensor,
    batch: Batch,
    x_t: Frames,
    t: Tensor,
    process: Process,
    weights: LossConfig,
) -> dict[str, Tensor]:
    """(B,) each part of the loss, unweighted.

    Args:
        predicted: (B, N) denoised frames.
        torsions: (B, N, 7, 2).
        batch: clean structures.
        x_t: (B, N) noised frames.
        t: (B,).
        process: of the noise.
        weights: whose `plain` decides which parts there are.
    """
    mask = batch.mask
    found = process.score_given(x_t, predicted, t, mask)
    true = process.score_given(x_t, batch.frames, t, mask)
    scored = (found.translation, true.translation, t, mask, process)
    turned = (found.rotation, true.rotation, t, mask, process)
    angles = atom14.angles(batch.torsions)
    terms = {
        "translation": losses.translation_loss(*scored),
        "rotation": (losses.rotation_loss if weights.plain else losses.axis_angle_loss)(*turned),
        "torsion": losses.torsion_loss(torsions, angles, batch.torsion_mask),
    }
    if weights.plain:
        return terms
    atoms, _ = atom14.to_atoms(predicted, torsions, batch.types)
    four = len(_FROM_ATOMS)
    near = (atoms[..., :four, :], batch.atoms[..., :four, :], batch.atom_mask[..., :four], t)
    terms["backbone"] = losses.backbone_loss(*near)
    terms["distance"] = losses.distance_loss(*near)
    places = (predicted.translations, batch.frames.translations)
    backbone = losses.fape(predicted, batch.frames, *places, mask, mask)
    terms["fape"] = backbone + _side_chain_fape(predicted, torsions, atoms, batch)
    return terms


def _side_chain_fape(predicted: Frames, torsions: Tensor, atoms: Tensor, batch: Batch) -> Tensor:
    """(B,) of all heavy atoms (B, N, 14, 3) seen from all rigid groups that carry some."""
    other = atom14.renamed(batch.atoms, batch.types)
    ambiguous = batch.atom_mask & ((other - batch.atoms).abs().sum(-1) > 0)
    swap = losses.swapped(atoms, batch.atoms, other, batch.atom_mask, ambiguous)[..., None, None]
    target = torch.where(swap, other, batch.atoms)
    turned = torch.where(swap, atom14.turned_over(batch.torsions, batch.types), batch.torsions)
    there = torch.cat([batch.mask[..., None], batch.torsion_mask], -1)[..., _GROUPS]
    return losses.fape(
        _groups(predicted, torsions, batch.types),
        _groups(batch.frames, turned, batch.types),
        atoms.flatten(1, 2),
        target.flatten(1, 2),
        there.flatten(1),
        batch.atom_mask.flatten(1),
    )


def _groups(frames: Frames, torsions: Tensor, types: Tensor) -> Frames:
    """(B, F) rigid groups of all residues."""
    groups = atom14.group_frames(frames, torsions, types)[:, :, _GROUPS]
    return Frames(groups.rotations.flatten(1, 2), groups.translations.flatten(1, 2))


def _weighted(terms: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    if weights.plain:
        weights = dataclasses.replace(weights, translation=1.0, rotation=1.0)
    return losses.total(terms, weights)


class ConformationTrainer:
    """Network, optimizer and data of one rank."""

    def __init__(
        self,
        settings: ConformationTrainConfig,
        data: Dataset,
        network: ConformationNetwork,
        context: Context,
    ) -> None:
        self.settings, self.data, self.context = settings, data, context
        passes = micro_batches(settings.batch, settings.micro_batch, context.world)
        self.sharding = Sharding(settings, context.world, micro_batches=passes)
        self.config: ConformationConfig = network.config
        self.process = self.config.diffusion
        if settings.gradient_checkpointing:
            network.gradient_checkpointing_enable()
        lr = learning_rate(settings, 0, settings.steps)
        named, tables = network.named_parameters(), embeddings(network)
        optimizer = build_optimizer(settings.optimizer, named, lr=lr, tables=tables)
        self.network = self.sharding.prepare(network.train(), optimizer)

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of a global batch; returns this rank's sums of figures."""
        return accumulate(
            self.sharding,
            rows,
            lambda some: self._forward(number, some),
            micro_batch=self.settings.micro_batch,
            order=lambda row: self.data.lengths[row],
        )

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, means over its structures, from their sums."""
        count = sums.pop("rows")
        return {name: value / count for name, value in sums.items()}

    def _forward(self, number: int, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        device = self.sharding.device
        batch, lengths = self.data.batch(rows), [self.data.lengths[row] for row in rows]
        t, noise = drawn(
            self.context.seed, number, rows, lengths, self.process, self.settings.times
        )
        batch, t, noise = batch.to(device), t.to(device), noise.to(device)
        x_t = self.process.noised(batch.frames, t, batch.mask, noise)
        told = chains(self.config, batch).inputs(self.config)
        made = self.network(x_t.rotations, x_t.translations, t.float(), **told)
        predicted = Frames(made.rotations, made.translations)
        terms = loss_terms(
            predicted, made.torsions, batch, x_t, t, self.process, self.settings.loss
        )
        loss = _weighted(terms, self.settings.loss)
        found = {"loss": loss, **terms}
        sums = {name: float(value.detach().sum()) for name, value in found.items()}
        return loss.sum(), {**sums, "rows": float(len(rows))}


def new_network(
    settings: ConformationTrainConfig, representations: Representations | None, seed: int
) -> ConformationNetwork:
    """A network with random weights."""
    torch.manual_seed(seed)
    config = ConformationConfig(
        size=dataclasses.asdict(SIZES[settings.size]),
        sequence=settings.sequence,
        node_dim=representations.node_dim if representations else 0,
        edge_dim=representations.edge_dim if representations else 0,
        process=dataclasses.asdict(Process(t_min=settings.t_min, sigma_min=settings.sigma_min)),
    )
    return ConformationNetwork(config)


def _check_settings(
    settings: ConformationTrainConfig, config: ConformationConfig, start: Path | None
) -> None:
    """Refuse settings that a network to start from does not follow; only its size is its own."""
    for name, asked, has in (
        ("sequence", settings.sequence, config.sequence),
        ("t_min", settings.t_min, config.diffusion.t_min),
        ("sigma_min", settings.sigma_min, config.diffusion.sigma_min),
    ):
        if asked != has:
            raise SparringError(
                f"{start} was made with {name} = {has}, which training goes on with, not {asked}; "
                f"give --{name.replace('_', '-')} {has}"
            )


def provenance(data: Dataset) -> dict[str, object]:
    """What a network remembers of its data: the temperature, if it has one, and a lone chain."""
    temperatures = {row.temperature for row in data.rows}
    chains = {(row.sequence, row.capped) for row in data.rows}
    one = chains.pop() if len(chains) == 1 else ("", None)
    known = temperatures.pop() if len(temperatures) == 1 else None
    return {"temperature": known, "chain": one[0], "capped": one[1]}


def run(
    config: ConformationTrainConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Train; writes config.json, model.safetensors and metrics.jsonl.

    Raises:
        SparringError: no conformations, or arrays that do not fit them.
    """
    settings = resolved(config, 0)
    path = inputs.get("representations")
    representations = Representations(path) if path else None
    data = Dataset(read_conformations(many("data", inputs)), representations)
    start = inputs.get("model")
    network = (
        load(start)
        if start
        else new_network(settings, representations, derive(context.seed, "start") % 2**63)
    )
    _check_settings(settings, network.config, start)
    network.config.data = provenance(data)
    plan = bucketed(data.lengths, settings.batch, settings.steps, context.seed)
    trainer = ConformationTrainer(settings, data, network, context)
    parameters = sum(p.numel() for p in network.parameters())
    done = descend(
        trainer.sharding,
        plan,
        trainer.gradients,
        trainer.means,
        config=settings,
        rate=lambda number: learning_rate(settings, number, settings.steps),
        context=context,
        output=output,
    )
    save(trainer.sharding, ConformationNetwork(trainer.config), output, context)
    trainer.sharding.close()
    return {
        "steps": settings.steps,
        "conformations": len(data),
        "parameters": parameters,
        "zero": trainer.sharding.stage,
        **{k: v for k, v in done.last.items() if k not in ("lr", "grad_norm")},
    }


def save(sharding: Sharding, network: torch.nn.Module, output: Path, context: Context) -> None:
    """Write a network with the trained weights (their average, if there is one)."""
    state = sharding.full_state(context.work)
    if context.world.rank == 0:
        network.load_state_dict(state)
        network.save_pretrained(str(output))  # type: ignore[operator]
