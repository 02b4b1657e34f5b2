"""What all trainers share: settings, learning rates, order of data. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from sparring.launch.config import Schedule, config, positive, resource, schedule_values, within
from sparring.launch.seeds import derive
from sparring.optimizers.config import OptimizerConfig


@config
class TrainingConfig:
    """How a model is trained, whatever it is."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Section [train.optimizer]."""
    lr: Schedule = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.1
    """Share of the schedule over which the learning rate rises from 0."""
    batch: int = 64
    """Examples an optimizer step, over all ranks."""
    micro_batch: int = resource(default=4)
    """Examples a rank's forward pass."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    gradient_checkpointing: bool = resource(default=False)
    """Recompute activations going backward: less memory, about a third more work."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the forward pass; weights and optimizer stay float32."""
    zero: int = resource(default=-1)
    """DeepSpeed ZeRO stage 0 to 3; -1: plain torch on one rank, stage 2 on several."""
    offload: bool = resource(default=False)
    """Keep the optimizer in host memory (ZeRO 2 and 3)."""
    save_every: int = resource(default=50)
    """Optimizer steps between checkpoints; 0: none."""
    ema: float = 0.0
    """Decay of a moving average of the weights, which then is the result; 0: none."""

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch"):
            positive(f"train.{name}", getattr(self, name))
        for value in schedule_values("train.lr", self.lr):
            positive("train.lr", value)
        for name in ("clip", "save_every"):
            within(f"train.{name}", getattr(self, name), 0, math.inf)
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema is a decay from 0 to below 1, not {self.ema}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup is a share from 0 to below 1, not {self.warmup}")
        if self.zero not in (-1, 0, 1, 2, 3):
            raise ValueError(f"train.zero is a ZeRO stage 0 to 3, or -1, not {self.zero}")
        if self.offload and self.zero not in (2, 3):
            raise ValueError("train.offload needs train.zero 2 or 3")


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Learning rate of an optimizer step (0-based) in a schedule of `total` steps."""
    assert isinstance(config.lr, (int, float)), "schedules are resolved before training"
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, total - warmup)
    if config.schedule == "linear":
        return config.lr * max(0.0, 1 - share)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def batches(count: int, size: int, steps: int, seed: int) -> list[list[int]]:
    """Row numbers of every optimizer step, from the seed alone, so that resuming needs no state.

    Every epoch has an order of its own; the last batch of an epoch may be smaller.
    """
    per_epoch = math.ceil(count / size)
    found: list[list[int]] = []
    for epoch in range(math.ceil(steps / per_epoch)):
        order = np.random.default_rng(derive(seed, "epoch", epoch)).permutation(count).tolist()
        found += [order[i : i + size] for i in range(0, count, size)]
    return found[:steps]
