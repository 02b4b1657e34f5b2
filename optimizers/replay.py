"""Running a batch of transformers' Trainer a second time, with the same random numbers.

A gradient at other weights is of the same function only if dropout repeats its masks; and what a
trainer counts by the way, losses and tokens, must not be counted twice.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch

from sparring.optimizers.randomness import draws, restore


@dataclass
class _MicroBatch:
    """A call of `training_step`, and the state of the random generators before it."""

    model: Any
    inputs: Any
    rest: tuple[Any, ...]
    options: dict[str, Any]
    boundary: bool
    """Whether it is the last of its batch, and gradients are reduced over ranks."""
    randomness: dict[str, Any]


class Replay:
    """The micro-batches of a trainer's present batch, kept from its `training_step`.

    Args:
        trainer: `transformers.Trainer` or a descendant, whose `training_step` is wrapped.
    """

    # What TRL's trainers count inside training_step.
    _COUNTED = ("_metrics", "_total_train_tokens", "_stored_metrics")

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._training_step = trainer.training_step
        self._batch: list[_MicroBatch] = []
        self._complete = False
        trainer.training_step = self._record

    @property
    def model(self) -> Any:
        """What the batch was run on, in the trainer's wrappers."""
        return self._batch[-1].model

    def complete(self) -> None:
        """The batch is whole: the next micro-batch begins another."""
        self._complete = True

    def clear(self) -> None:
        """Keep nothing."""
        self._batch = []

    def _record(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        if self._complete:
            self._batch, self._complete = [], False
        accelerator = self._trainer.accelerator
        self._batch.append(
            _MicroBatch(
                model=model,
                inputs=copy.copy(inputs),
                rest=rest,
                options=options,
                boundary=accelerator.sync_gradients,
                randomness=draws(self._devices(model)),
            )
        )
        return self._training_step(model, inputs, *rest, **options)

    def _devices(self, model: Any) -> set[torch.device]:
        """Where layers draw: more than one device where a model's are dealt out."""
        return {self._trainer.accelerator.device, *(p.device for p in model.parameters())}

    def run(self) -> None:
        """Forward and backward of the micro-batches as before, leaving no other trace."""
        trainer = self._trainer
        accelerator = trainer.accelerator
        after = draws(self._devices(self.model))
        counted = {name: vars(trainer)[name] for name in self._COUNTED if name in vars(trainer)}
        vars(trainer).update(copy.deepcopy(counted))
        plugin = accelerator.gradient_state.plugin_kwargs
        every = trainer.is_deepspeed_enabled or plugin.get("sync_each_batch", False)
        try:
            for micro in self._batch:
                accelerator.gradient_state._set_sync_gradients(micro.boundary)
                restore(micro.randomness)
                quiet = not (micro.boundary or every)
                with accelerator.no_sync(micro.model) if quiet else contextlib.nullcontext():
                    self._training_step(
                        micro.model, copy.copy(micro.inputs), *micro.rest, **micro.options
                    )
        finally:
            vars(trainer).update(counted)
            restore(after)
