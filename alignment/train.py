"""Stage `train`: one iteration of optimisation over pairs with stored log-probabilities."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparring.alignment import tokens
from sparring.alignment.algorithms import algorithm
from sparring.alignment.config import TrainConfig
from sparring.alignment.logprobs import ScoredPolicy, collate
from sparring.alignment.models import load_policy, save_policy, tied_names
from sparring.alignment.objectives import PairTerms
from sparring.alignment.rows import ReferencedPair
from sparring.alignment.stages import TrainStage
from sparring.launch.config import resolved
from sparring.launch.errors import SparringError
from sparring.launch.lora import add_lora, merge_lora
from sparring.launch.optimisation import accumulate, descend, micro_batches
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context, Figures, load
from sparring.launch.training import batches, learning_rate
from sparring.optimizers import build_optimizer


def planned_steps(count: int, config: TrainConfig) -> tuple[int, int]:
    """Optimizer steps over `count` pairs, and the steps the learning rate is laid out for."""
    assert isinstance(config.epochs, (int, float)), "schedules are resolved before training"
    per_epoch = math.ceil(count / config.batch)
    steps = max(1, round(config.epochs * per_epoch))
    return steps, max(steps, round(config.schedule_epochs * per_epoch))


def _kept(pairs: Sequence[ReferencedPair], limit: int) -> list[ReferencedPair]:
    kept = [
        pair
        for pair in pairs
        if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= limit
    ]
    if not kept:
        raise SparringError(
            f"none of the {len(pairs)} pairs fits train.max_length = {limit} tokens; raise it"
        )
    return kept


class Trainer:
    """Model, optimizer and data of one rank."""

    def __init__(
        self, config: TrainStage, model: Path, pairs: list[ReferencedPair], context: Context
    ) -> None:
        world = context.world
        self.config, self.pairs, self.context = config, pairs, context
        passes = micro_batches(config.batch, config.micro_batch, world)
        self.sharding = Sharding(config, world, micro_batches=passes)
        self.pad = tokens.eos_ids(tokens.load_tokenizer(model), model)[0]
        policy = _trainable(load_policy(model, "float32"), config)
        self.model, self.tied = policy, tied_names(policy)
        scored = ScoredPolicy(policy, logits_chunk=config.logits_chunk)
        optimizer = build_optimizer(
            config.optimizer, scored.named_parameters(), lr=learning_rate(config, 0, 1)
        )
        self.policy = self.sharding.prepare(scored, optimizer)
        self.algorithm = algorithm(config.algorithm)
        self.loss = load(self.algorithm.loss)

    def gradients(self, number: int, rows: Sequence[int]) -> dict[str, float]:
        """Accumulate a global batch's gradients; returns this rank's sums of figures."""
        return accumulate(
            self.sharding,
            rows,
            self._forward,
            micro_batch=self.config.micro_batch,
            order=self._length,
        )

    def means(self, sums: dict[str, float]) -> dict[str, float]:
        """Figures of a step, means over its pairs, from their sums."""
        count, text = sums.pop("pairs"), sums.pop("tokens")
        return {**{name: value / count for name, value in sums.items()}, "tokens": text}

    def _length(self, row: int) -> int:
        pair = self.pairs[row]
        return max(len(pair.chosen_ids), len(pair.rejected_ids)) + len(pair.prompt_ids)

    def _forward(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, float]]:
        pairs = [self.pairs[row] for row in rows]
        texts = [(p.prompt_ids, p.chosen_ids) for p in pairs]
        if self.algorithm.uses_rejected:
            texts += [(p.prompt_ids, p.rejected_ids) for p in pairs]
        batch = collate(texts, pad=self.pad).to(self.sharding.device)
        logp = self.policy(batch.ids_BT, batch.attention_BT, batch.response_BT)

        def column(name: str) -> torch.Tensor:
            values = [getattr(p, name) for p in pairs]
            return torch.tensor(values, dtype=torch.float32, device=logp.device)

        chosen = logp[: len(pairs)]
        rejected = logp[len(pairs) :] if self.algorithm.uses_rejected else torch.zeros_like(chosen)
        terms = PairTerms(
            chosen_logp=chosen,
            chosen_logratio=chosen - column("chosen_reference_logp"),
            rejected_logratio=rejected - column("rejected_reference_logp"),
            chosen_win=column("chosen_win"),
            rejected_win=column("rejected_win"),
            pair_win=column("pair_win"),
        )
        loss = self.loss(terms, self.config).sum()
        sums = {"loss": loss, "chosen": terms.chosen_logratio}
        if self.algorithm.uses_rejected:
            sums["rejected"] = terms.rejected_logratio
            sums["accuracy"] = (terms.chosen_logratio > terms.rejected_logratio).float()
        sums["tokens"] = batch.attention_BT
        sums["reference_gap"] = terms.chosen_logratio.abs()
        found = {name: float(value.detach().sum()) for name, value in sums.items()}
        return loss, {**found, "pairs": float(len(pairs))}


def _trainable(model: Any, config: TrainConfig) -> Any:
    """Training mode without dropout: the log-ratio of an unchanged policy is zero."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        # Families keep the share for functional dropout under names of their own.
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)
    if config.lora_rank:
        model = add_lora(model, config.lora_rank, config.lora_alpha)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _save(trainer: Trainer, model: Path, output: Path) -> None:
    state = trainer.sharding.full_state(trainer.context.work)
    if trainer.context.world.rank == 0:
        named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        named = {name: tensor for name, tensor in named.items() if name not in trainer.tied}
        if trainer.config.lora_rank:
            named = merge_lora(named, trainer.config.lora_alpha / trainer.config.lora_rank)
        save_policy(named, trainer.model, model, output)


def run(config: TrainStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Train from the model folder `model` on the pairs; writes a model folder and metrics.jsonl."""
    config = resolved(config, 0)
    if config.beta is None:
        config = dataclasses.replace(config, beta=algorithm(config.algorithm).beta)
    everything = read_rows(inputs["pairs"] / "pairs.parquet", ReferencedPair)
    pairs = _kept(everything, config.max_length)
    steps, total = planned_steps(len(pairs), config)
    plan = batches(len(pairs), config.batch, steps, context.seed)
    torch.manual_seed(derive(context.seed, "torch"))
    trainer = Trainer(config, inputs["model"], pairs, context)

    done = descend(
        trainer.sharding, plan, trainer.gradients, trainer.means, config=config,
        rate=lambda number: learning_rate(config, number, total),
        context=context, output=output, totals=("tokens",),
    )  # fmt: skip
    if trainer.algorithm.uses_reference and context.world.rank == 0:
        _note_gap(output, context)
    _save(trainer, inputs["model"], output)
    trainer.sharding.close()
    shown = ("loss", "accuracy", "chosen", "rejected")
    return {
        "steps": steps,
        "pairs": len(pairs),
        "too_long": len(everything) - len(pairs),
        **{name: done.last[name] for name in shown if name in done.last},
        "zero": trainer.sharding.stage,
        "tokens_per_second": round(done.totals["tokens"] / done.seconds, 1),
    }


def _note_gap(output: Path, context: Context) -> None:
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    if first["reference_gap"] > 0.5:
        context.emit(
            note=f"the starting policy was {first['reference_gap']:.2f} nats a response away from "
            "the reference, as it should be only with momentum folded into either"
        )
