"""The loop of a trainer: steps, metrics, checkpoints, stops and resuming."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sparring.launch.errors import SparringError, Stopped
from sparring.launch.metrics import MetricsFile
from sparring.launch.processes import World
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context
from sparring.launch.training import TrainingConfig
from sparring.optimizers.randomness import draws, restore


@dataclass
class Optimised:
    """What came of the steps that were made in this call."""

    last: dict[str, float] = field(default_factory=dict)
    """Figures of the last step; empty if a checkpoint had them all."""
    seconds: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the figures that were asked for."""


def optimise(
    sharding: Sharding,
    steps: int,
    step: Callable[[int], dict[str, float]],
    context: Context,
    output: Path,
    *,
    save_every: int,
    totals: tuple[str, ...] = (),
) -> Optimised:
    """Make the steps that no checkpoint has; writes ``metrics.jsonl``.

    Args:
        steps: optimizer steps in all.
        step: makes step number n (0-based) on this rank and returns figures that are the same on
            all ranks.
        save_every: steps between checkpoints, 0 for none. A stop makes one too.
        totals: names of figures to add up.

    Raises:
        Stopped: asked to stop; a checkpoint was made.
    """
    done = sharding.restore(context.work)
    kept = context.work / "metrics.jsonl"
    metrics = MetricsFile(kept, start=done) if context.world.rank == 0 else None
    started = time.time()
    found = Optimised(totals=dict.fromkeys(totals, 0.0))
    for number in range(done, steps):
        found.last = step(number)
        for name in totals:
            found.totals[name] += found.last[name]
        if metrics:
            metrics.write(step=number, **found.last)
            context.emit(done=number + 1, total=steps, unit="steps")
        _checkpoint(sharding, context, number + 1, steps, save_every)
    found.seconds = time.time() - started
    if metrics:
        (output / "metrics.jsonl").write_text(kept.read_text())
    return found


def descend(
    sharding: Sharding,
    plan: Sequence[Sequence[int]],
    gradients: Callable[[int, Sequence[int]], dict[str, float]],
    means: Callable[[dict[str, float]], dict[str, float]],
    *,
    config: TrainingConfig,
    rate: Callable[[int], float],
    context: Context,
    output: Path,
    totals: tuple[str, ...] = (),
) -> Optimised:
    """Make an optimizer step for each batch of a plan.

    Args:
        plan: row numbers of every step's global batch.
        gradients: accumulates the gradient of step number n's rows (see `accumulate`); returns this
            rank's sums of figures.
        means: what sums over all ranks become in ``metrics.jsonl``; "loss" must be among it.
        config: for its checkpoints and its optimizer, whose exact mode needs two gradients a step.
        rate: learning rate of a step.
        totals: as for `optimise`.

    Raises:
        SparringError: the loss is no longer finite.
        Stopped: asked to stop; a checkpoint was made.
    """
    exact = config.optimizer.exact

    def owed(number: int, rows: Sequence[int]) -> None:
        # MARS's exact mode corrects by these rows' gradient at the weights before the update: of
        # one function, so with one dropout.
        before = draws([sharding.device])
        gradients(number, rows)
        sharding.step()
        restore(before)

    def step(number: int) -> dict[str, float]:
        lr, rows = rate(number), plan[number]
        sharding.set_lr(lr)
        if exact and number:
            owed(number, rows)
        sums = gradients(number, rows)
        norm = sharding.take_moments() if exact else sharding.step()
        figures = means(dict(zip(sums, sharding.sum(list(sums.values())), strict=True)))
        if not math.isfinite(figures["loss"]):
            raise SparringError(f"the loss became {figures['loss']}; lower train.lr or train.clip")
        return {**figures, "lr": lr, "grad_norm": norm}

    steps = len(plan)
    done = optimise(
        sharding, steps, step, context, output, save_every=config.save_every, totals=totals
    )
    if exact:
        owed(steps - 1, plan[-1])
    return done


def accumulate(
    sharding: Sharding,
    rows: Sequence[int],
    forward: Callable[[Sequence[int]], tuple[Tensor, dict[str, float]]],
    *,
    micro_batch: int,
    order: Callable[[int], float] | None = None,
) -> dict[str, float]:
    """Accumulate the gradient of the mean loss over a global batch.

    Losses are summed and divided by the number of rows of the global batch, so that accumulation
    and the number of ranks change nothing but rounding.

    Args:
        rows: the global batch.
        forward: of some of its rows: the sum of their losses, and sums of figures.
        micro_batch: rows a forward pass.
        order: rows with similar values share a forward pass (lengths, to save padding).

    Returns:
        This rank's sums of the figures.
    """
    world, accelerator = sharding.world, sharding.accelerator
    mine = list(rows[world.rank :: world.size])
    if order is not None:
        mine.sort(key=order)
    totals: dict[str, float] = {}
    for number in range(sharding.micro_batches):
        micro = mine[number * micro_batch : (number + 1) * micro_batch]
        # Every rank runs the same number of forward passes, as ZeRO-3 gathers need; a rank that
        # has run out repeats a row with weight zero.
        weight = world.size * sharding.micro_batches / len(rows) if micro else 0.0
        with accelerator.accumulate(sharding.model):
            loss, sums = forward(micro or [rows[0]])
            sharding.backward(loss * weight)
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + (value if micro else 0.0)
    return totals


def micro_batches(batch: int, micro_batch: int, world: World) -> int:
    """Forward passes of every rank in a step."""
    return math.ceil(math.ceil(batch / world.size) / micro_batch)


def _checkpoint(
    sharding: Sharding, context: Context, step: int, total: int, save_every: int
) -> None:
    """Save where the schedule says, and when any rank was asked to stop."""
    asked = sum(sharding.sum([float(context.stopped())])) > 0
    if step < total and (asked or (save_every and step % save_every == 0)):
        sharding.save(context.work, step)
    if asked and step < total:
        raise Stopped("stopped; run the same command again to go on")
