"""Running a batch of transformers' Trainer a second time, with the same random numbers.

A gradient at other weights is of the same function only if dropout repeats its masks; and what a
trainer counts by the way, losses and tokens, must not be counted twice.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


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
                randomness=_randomness(accelerator.device),
            )
        )
        return self._training_step(model, inputs, *rest, **options)

    def run(self) -> None:
        """Forward and backward of the micro-batches as before, leaving no other trace."""
        trainer = self._trainer
        accelerator = trainer.accelerator
        after = _randomness(accelerator.device)
        counted = {name: vars(trainer)[name] for name in self._COUNTED if name in vars(trainer)}
        vars(trainer).update(copy.deepcopy(counted))
        plugin = accelerator.gradient_state.plugin_kwargs
        every = trainer.is_deepspeed_enabled or plugin.get("sync_each_batch", False)
        try:
            for micro in self._batch:
                accelerator.gradient_state._set_sync_gradients(micro.boundary)
                _restore(micro.randomness)
                quiet = not (micro.boundary or every)
                with accelerator.no_sync(micro.model) if quiet else contextlib.nullcontext():
                    self._training_step(
                        micro.model, copy.copy(micro.inputs), *micro.rest, **micro.options
                    )
        finally:
            vars(trainer).update(counted)
            _restore(after)


def _randomness(device: torch.device) -> dict[str, Any]:
    """The state of every generator that a forward pass may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = (device, torch.get_device_module(device).get_rng_state(device))
    return state


def _restore(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    if "device" in state:
        device, generator = state["device"]
        torch.get_device_module(device).set_rng_state(generator, device)
