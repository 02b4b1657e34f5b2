"""Stage `train-images`: one iteration on encoded pairs (arXiv 2402.10210, Algorithm 1).

Shapes: B pairs, C, H, W latents. The network sees winners and losers of a batch in one pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparring.diffusion.spin import pipelines
from sparring.diffusion.spin.layouts import Conditions
from sparring.diffusion.spin.losses import (
    decoupled_loss,
    denoising_error,
    guard,
    inside,
    margin,
    scale_gradient,
)
from sparring.diffusion.spin.process import Process, seeded
from sparring.diffusion.spin.rows import Encoded
from sparring.diffusion.spin.stages import TrainImagesStage
from sparring.launch.config import resolved
from sparring.launch.errors import SparringError
from sparring.launch.lora import adapters_off, add_lora, merge_lora
from sparring.launch.optimisation import accumulate, descend, micro_batches
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context, Figures, load
from sparring.launch.training import batches, learning_rate
from sparring.optimizers import build_optimizer

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Pairs:
    """Encoded pairs, with the conditions of their captions."""

    def __init__(self, folder: Path, *, need_losers: bool) -> None:
        self.rows = read_rows(folder / "encoded.parquet", Encoded)
        if not self.rows:
            raise SparringError(f"{folder} holds no pair to train on")
        if need_losers and not self.rows[0].loser:
            raise SparringError(
                f"{folder} was encoded without generated images, which the loss 'spin' needs; give "
                "encode-images --generated, or train with --loss sft"
            )
        self.shape: tuple[int, ...] = tuple(json.loads((folder / "shape.json").read_text()))
        listed = json.loads((folder / "captions.json").read_text())["captions"]
        self._place = {caption: n for n, caption in enumerate(listed)}
        self._conditions = load_file(folder / "captions.safetensors")

    def latents(self, rows: Sequence[int], which: str) -> Tensor:
        """(B, C, H, W) float32 of "winner" or "loser"."""
        data = [np.frombuffer(getattr(self.rows[n], which), dtype="<f4") for n in rows]
        return torch.from_numpy(np.stack(data)).view(-1, *self.shape)

    def conditions(self, captions: Sequence[int], rows: Sequence[int]) -> Conditions:
        """Of captions by number, with sizes and crops of the rows."""
        found = {name: value[list(captions)] for name, value in self._conditions.items()}
        found["size"] = torch.tensor([self.rows[n].size for n in rows], dtype=torch.float32)
        return found

    def caption(self, row: int) -> int:
        """Number of a row's caption; 0 is none."""
        return self._place[self.rows[row].caption]


class ImageTrainer:
    """Network, opponent, optimizer and data of one rank."""

    def __init__(
        self,
        config: TrainImagesStage,
        model: Path,
        opponent: Path | None,
        pairs: Pairs,
        context: Context,
    ) -> None:
        self.config, self.pairs, self.context = config, pairs, context
        passes = micro_batches(config.batch, config.micro_batch, context.world)
        self.sharding = Sharding(config, context.world, micro_batches=passes)
        self.process = Process.of(_scheduler(model)).to(self.sharding.device)
        self.weight: Any = None if config.weight == "none" else load(config.weight)
        denoiser = pipelines.Denoiser.load(model)
        _check_channels(denoiser.model, pairs, model)
        denoiser.requires_grad_(True).train()
        if config.gradient_checkpointing:
            denoiser.model.enable_gradient_checkpointing()
        if config.lora_rank:
            denoiser.model = add_lora(
                denoiser.model, config.lora_rank, config.lora_alpha, _ATTENTION
            )
        optimizer = build_optimizer(
            config.optimizer, denoiser.named_parameters(), lr=learning_rate(config, 0, 1)
        )
        self.network = self.sharding.prepare(denoiser, optimizer)
        # The opponent is exactly what made the losers: with adapters, the network without them.
        self.opponent: Any = None
        if config.loss == "spin" and (opponent is not None or not config.lora_rank):
            frozen = pipelines.Denoiser.load(opponent or model).requires_grad_(False)
            self.opponent = frozen.eval().to(self.sharding.device)

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, means over its pairs, from their sums."""
        count = sums.pop("pairs")
        found = {name: value / count for name, value in sums.items()}
        if "opponent_winner" in found:
            square = found.pop("margin_square") - found["margin"] ** 2
            found["margin_std"] = math.sqrt(max(square, 0.0))
            found["displacement"] = found["winner"] - found["opponent_winner"]
        return found

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate the gradient of a global batch; returns this rank's sums of figures."""
        return accumulate(
            self.sharding,
            rows,
            lambda some: self._forward(number, some),
            micro_batch=self.config.micro_batch,
        )

    def _captions(self, number: int, rows: Sequence[int]) -> list[int]:
        """Captions of rows, some of them dropped or another row's."""
        chosen = []
        for row in rows:
            draw = np.random.default_rng(derive(self.context.seed, "caption", number, row))
            dropped, wrong = draw.random(2)
            other = int(draw.integers(len(self.pairs.rows)))
            caption = self.pairs.caption(other if wrong < self.config.wrong_captions else row)
            chosen.append(0 if dropped < self.config.caption_dropout else caption)
        return chosen

    def _forward(self, number: int, rows: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        device, config = self.sharding.device, self.config
        # Each row has noise of its own, whatever rank or forward pass it falls into; winner and
        # loser share time and noise, so that what they have in common cancels.
        seeds = [derive(self.context.seed, "noise", number, row) for row in rows]
        uniform, noise = seeded(self.pairs.shape, seeds)
        t = self.process.times(uniform).to(device)
        noise = noise.to(device)
        conditions = {
            name: value.to(device)
            for name, value in self.pairs.conditions(self._captions(number, rows), rows).items()
        }
        sides = ["winner"] if config.loss == "sft" else ["winner", "loser"]
        clean = torch.cat([self.pairs.latents(rows, side).to(device) for side in sides])
        twice = len(sides)
        x, target = self.process.corrupt(clean, noise.repeat(twice, 1, 1, 1), t.repeat(twice))
        given = (x, t.repeat(twice), {k: v.repeat(twice, *[1] * (v.dim() - 1))
                                      for k, v in conditions.items()})  # fmt: skip
        prediction = self.network(*given)
        errors = denoising_error(prediction, target)
        if config.loss == "sft":
            found = {"loss": errors, "winner": errors}
            return errors.sum(), _sums(found, len(rows))
        theirs = denoising_error(self._opponents(*given), target)
        winner, loser = errors.chunk(2)
        their_winner, their_loser = theirs.chunk(2)
        trained = loser
        if config.winner_guard:
            residuals = (prediction - target).detach().chunk(2)
            trained = scale_gradient(loser, guard(*residuals))
        z = margin(winner, trained, their_winner, their_loser)
        assert isinstance(config.beta, (int, float)), "schedules are resolved before training"
        weight = None if self.weight is None else self.weight(t, self.process)
        loss = decoupled_loss(z, beta=config.beta, weight_B=weight, link=config.link)
        if config.sft_weight:
            loss = loss + config.sft_weight * winner
        scaled = inside(z, beta=config.beta, weight_B=weight)
        found = {
            "loss": loss,
            "accuracy": (z > 0).float(),
            "margin": scaled,
            "margin_square": scaled.square(),
            "winner": winner,
            "loser": loser,
            "opponent_winner": their_winner,
            "opponent_loser": their_loser,
        }
        return loss.sum(), _sums(found, len(rows))

    @torch.no_grad()
    def _opponents(self, *given: Any) -> Tensor:
        if self.opponent is None:
            with adapters_off(self.network):
                return self.network(*given)  # type: ignore[no-any-return]
        with self.sharding.autocast():
            return self.opponent(*given)  # type: ignore[no-any-return]


def _check_channels(network: Any, pairs: Pairs, model: Path) -> None:
    taken, given = int(network.config.in_channels), pairs.shape[0]
    if taken != given:
        raise SparringError(
            f"the network of {model} takes {taken} channels, and the encoded latents have {given}; "
            "encode with the pipeline that is trained"
        )


def _sums(found: Mapping[str, Tensor], pairs: int) -> dict[str, float]:
    return {name: float(value.detach().sum()) for name, value in found.items()} | {
        "pairs": float(pairs)
    }


def _scheduler(model: Path) -> Any:
    import diffusers

    index = json.loads((model / "model_index.json").read_text())
    kind = getattr(diffusers, index["scheduler"][1])
    return kind.from_pretrained(str(model), subfolder="scheduler")


def _save(trainer: ImageTrainer, model: Path, output: Path) -> None:
    state = trainer.sharding.full_state(trainer.context.work)
    if trainer.context.world.rank == 0:
        named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        if trainer.config.lora_rank:
            named = merge_lora(named, trainer.config.lora_alpha / trainer.config.lora_rank)
        pipelines.save_with_network(named, model, output)


def run(
    config: TrainImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Train the network of the pipeline `model`; writes a pipeline folder and metrics.jsonl."""
    config = resolved(config, 0)
    pairs = Pairs(inputs["encoded"], need_losers=config.loss == "spin")
    plan = batches(len(pairs.rows), config.batch, config.steps, context.seed)
    torch.manual_seed(derive(context.seed, "torch"))
    trainer = ImageTrainer(config, inputs["model"], inputs.get("opponent"), pairs, context)

    done = descend(
        trainer.sharding,
        plan,
        trainer.gradients,
        trainer.means,
        config=config,
        rate=lambda number: learning_rate(config, number, config.steps),
        context=context,
        output=output,
    )
    _save(trainer, inputs["model"], output)
    trainer.sharding.close()
    return {
        "steps": config.steps,
        "pairs": len(pairs.rows),
        "target": trainer.process.target,
        "zero": trainer.sharding.stage,
        **{k: v for k, v in done.last.items() if k not in ("lr", "grad_norm")},
    }
