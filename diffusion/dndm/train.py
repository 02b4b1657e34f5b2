"""Stage `train-text-diffusion`: cross-entropy of noised tokens (D3PM, RDM; losses.py).

Times and noise are drawn from (step, row), so they depend neither on ranks nor on micro-batches;
dropout is not, so only without it are weights the same to rounding.

Shape legend: B rows, N target positions, S source positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import set_seed

from sparring.diffusion.dndm.forward import corrupt
from sparring.diffusion.dndm.losses import cross_entropy, draw_times, weight
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig, load, padded
from sparring.diffusion.dndm.rows import Text
from sparring.diffusion.dndm.stages import TrainTextStage
from sparring.diffusion.dndm.vocabulary import PAD, Vocabularies
from sparring.launch.config import plain, resolved
from sparring.launch.errors import SparringError
from sparring.launch.optimisation import accumulate, descend, micro_batches
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context, Figures
from sparring.launch.training import batches, learning_rate
from sparring.optimizers import build_optimizer
from sparring.optimizers.groups import embeddings


class Data:
    """Training rows as numbers."""

    def __init__(self, folder: Path) -> None:
        self.vocabularies = Vocabularies.load(folder)
        rows = read_rows(folder / "train.parquet", Text)
        if not rows:
            raise SparringError(f"{folder} holds no text to train on")
        source = self.vocabularies.source
        self.targets = [self.vocabularies.target.encode(row.target) for row in rows]
        self.sources = [source.encode(row.source) for row in rows] if source else []
        for side in (self.targets, self.sources):
            if not all(side):
                row = rows[[bool(ids) for ids in side].index(False)]
                raise SparringError(f"{folder}: text {row.text_id!r} has length 0; leave it out")

    def __len__(self) -> int:
        return len(self.targets)

    def config(self, settings: TrainTextStage) -> TextDenoiserConfig:
        """Of a new network for these rows."""
        counts = Counter(i for ids in self.targets for i in ids)
        size = len(self.vocabularies.target)
        source = self.vocabularies.source
        unigram = settings.process.noise == "unigram"
        return TextDenoiserConfig(
            vocab_size=size,
            source_vocab_size=len(source) if source else 0,
            max_target=max(len(ids) for ids in self.targets),
            max_source=max((len(ids) for ids in self.sources), default=0),
            network=plain(settings.model),
            process=plain(settings.process),
            symbol_counts=[counts[i] for i in range(size)] if unigram else (),
            vocabulary_digest=self.vocabularies.digest,
        )

    def check(self, config: TextDenoiserConfig, where: Path) -> None:
        """Refuse a network that is too short for these rows."""
        for side, most in (("target", config.max_target), ("source", config.max_source)):
            longest = max((len(ids) for ids in getattr(self, f"{side}s")), default=0)
            if longest > most:
                raise SparringError(
                    f"the data has a {side} of {longest} symbols, the network in {where} takes at "
                    f"most {most}; lower data.max_{side}"
                )


@dataclass(frozen=True)
class Noised:
    """Rows at one or two times, one after the other."""

    x_BN: Tensor
    x0_BN: Tensor
    noisy_BN: Tensor
    t_B: Tensor


def noised(
    rows: Sequence[Sequence[int]],
    seeds: Sequence[int],
    config: TextDenoiserConfig,
    *,
    times: int,
) -> Noised:
    """Each row noised by its own seed, whatever stands beside it in a batch.

    Args:
        rows: clean tokens.
        seeds: of each row's times and noise.
        config: for T, schedule and noise.
        times: 1, or 2 for coupled sampling.

    Returns:
        (times * B) rows, all at their later time first.
    """
    schedule, noise = config.schedule, config.noise
    clean = padded(list(rows) * times)
    x, noisy = clean.clone(), torch.zeros_like(clean, dtype=torch.bool)
    t = torch.zeros(len(x), dtype=torch.float64)
    generator = torch.Generator()
    for row, (ids, seed) in enumerate(zip(rows, seeds, strict=True)):
        generator.manual_seed(seed)
        drawn = draw_times(1, config.steps, generator, times=times)
        x0 = torch.tensor([list(ids)])
        made = corrupt(x0, *drawn, schedule=schedule, noise=noise, generator=generator)
        for place, each in enumerate(made):
            at = place * len(rows) + row
            x[at, : len(ids)], noisy[at, : len(ids)] = each.x_BN[0], each.noisy_BN[0]
            t[at] = each.t_B[0]
    return Noised(x, clean, noisy, t)


class TextTrainer:
    """Network, optimizer and data of one rank."""

    def __init__(
        self, settings: TrainTextStage, data: Data, start: Path | None, context: Context
    ) -> None:
        self.settings, self.data, self.context = settings, data, context
        passes = micro_batches(settings.batch, settings.micro_batch, context.world)
        self.sharding = Sharding(settings, context.world, micro_batches=passes)
        if start is None:
            set_seed(derive(context.seed, "start") % 2**32)
            network = TextDenoiser(data.config(settings))
        else:
            network = load(start, data.vocabularies)
            data.check(network.config, start)
        if settings.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.config: TextDenoiserConfig = network.config
        self.noise = self.config.noise
        set_seed(derive(context.seed, "dropout", context.world.rank) % 2**32)
        optimizer = build_optimizer(
            settings.optimizer,
            network.named_parameters(),
            lr=rate(settings, 0),
            tables=embeddings(network),
        )
        self.network = self.sharding.prepare(network.train(), optimizer)

    def means(self, found: dict[str, float]) -> dict[str, float]:
        """Figures of a step from their sums over its global batch."""
        figures = {
            "loss": found["loss"] / found["rows"],
            "cross_entropy": found["nats"] / max(found["noisy"], 1),
        }
        if "length_right" in found:
            figures["length_accuracy"] = found["length_right"] / found["rows"]
        return figures

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of a global batch; returns this rank's sums of figures."""
        # Nats a token of the whole batch: a row counts by its tokens, whoever it is computed with.
        per_row = sum(len(self.data.targets[row]) for row in rows) / len(rows)
        return accumulate(
            self.sharding,
            rows,
            lambda some: self._forward(number, some, per_row),
            micro_batch=self.settings.micro_batch,
        )

    def _forward(
        self, number: int, rows: Sequence[int], per_row: float
    ) -> tuple[Tensor, dict[str, float]]:
        device, settings = self.sharding.device, self.settings
        times = 2 if settings.coupled else 1
        seeds = [derive(self.context.seed, "noise", number, row) for row in rows]
        drawn = noised([self.data.targets[row] for row in rows], seeds, self.config, times=times)
        cond: dict[str, Tensor] = {}
        if self.data.sources:
            cond["source"] = padded([self.data.sources[row] for row in rows]).to(device)
        if self.config.shape.schedule_conditioning:
            cond["noisy"] = drawn.noisy_BN.to(device)
        x, x0 = drawn.x_BN.to(device), drawn.x0_BN.to(device)
        made = self.network(x, drawn.t_B.float().to(device), **cond)
        if settings.tokens == "all":
            counted = x0 != PAD
        elif self.noise.mask_id is not None or "noisy" in cond:
            counted = drawn.noisy_BN.to(device)
        else:
            counted = x != x0
        ce = cross_entropy(
            made.logits, x0, counted, noise=self.noise, label_smoothing=settings.label_smoothing
        )
        # What is shown can be compared between runs: without the smoothing.
        nats = cross_entropy(made.logits.detach(), x0, counted, noise=self.noise)
        lam = weight(
            drawn.t_B,
            steps=self.config.steps,
            schedule=self.config.schedule,
            kind=settings.weighting,
        ).to(ce)
        loss = (lam * ce).sum() / times / per_row
        sums = {
            "nats": float(nats.sum()),
            "noisy": float(counted.sum()),
            "rows": float(len(rows)),
        }
        if made.length_logits is not None:
            lengths = self._lengths(rows).to(device)
            logits = made.length_logits.float()
            length_nats = nn.functional.cross_entropy(logits, lengths, reduction="sum")
            loss = loss + settings.length_weight * length_nats
            sums["length_right"] = float((logits.argmax(1) == lengths).sum())
        return loss, {"loss": float(loss.detach()), **sums}

    def _lengths(self, rows: Sequence[int]) -> Tensor:
        """(B,) classes of the length head."""
        most = self.config.shape.offsets
        more = [len(self.data.targets[row]) - len(self.data.sources[row]) for row in rows]
        return torch.tensor(more).clamp(-most, most) + most

    def save(self, output: Path) -> None:
        """Write the network (its average, if there is one) in Hugging Face's format."""
        state = self.sharding.full_state(self.context.work)
        if self.context.world.rank == 0:
            network = TextDenoiser(self.config)
            network.load_state_dict(state)
            network.save_pretrained(str(output))
            self.data.vocabularies.save(output)


def rate(settings: TrainTextStage, step: int) -> float:
    """Learning rate of an optimizer step (0-based)."""
    warmup = math.ceil(settings.warmup * settings.steps)
    if settings.inverse_sqrt and step >= warmup:
        assert isinstance(settings.lr, (int, float)), "schedules are resolved before training"
        return settings.lr * math.sqrt(warmup / (step + 1))
    return learning_rate(settings, step, settings.steps)


def run(
    config: TrainTextStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Train; writes config.json, model.safetensors, vocabulary.json and metrics.jsonl.

    Raises:
        SparringError: no texts, or a network of another vocabulary.
    """
    settings = resolved(config, 0)
    data = Data(inputs["data"])
    plan = batches(len(data), settings.batch, settings.steps, context.seed)
    trainer = TextTrainer(settings, data, inputs.get("model"), context)

    done = descend(
        trainer.sharding,
        plan,
        trainer.gradients,
        trainer.means,
        config=settings,
        rate=lambda number: rate(settings, number),
        context=context,
        output=output,
    )
    trainer.save(output)
    trainer.sharding.close()
    return {
        "steps": settings.steps,
        "texts": len(data),
        "parameters": _parameters(trainer.config),
        "zero": trainer.sharding.stage,
        **{k: v for k, v in done.last.items() if k not in ("lr", "grad_norm")},
    }


def _parameters(config: TextDenoiserConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in TextDenoiser(config).parameters())
