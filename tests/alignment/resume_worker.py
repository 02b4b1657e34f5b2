"""Training under ZeRO that is stopped after two steps and goes on with smaller forward passes.

python resume_worker.py MODEL PAIRS OUT STAGE
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from sparring.alignment import train
from sparring.alignment.stages import TrainStage
from sparring.launch.errors import Stopped
from sparring.launch.processes import World
from sparring.launch.stages import Context


def main(model: Path, pairs: Path, output: Path, stage: int) -> None:
    """Stop, then resume."""
    (output / "work").mkdir(parents=True)
    config = TrainStage(
        beta=0.01, lr=0.003, schedule="constant", warmup=0.0, batch=8, epochs=2.0,
        micro_batch=4, zero=stage,
    )  # fmt: skip
    asked = iter([False, True])
    inputs = {"model": model, "pairs": pairs}
    try:
        context = Context(World(), output / "work", 0, lambda: next(asked))
        train.run(config, inputs, output, context)
    except Stopped:
        assert (output / "work" / "checkpoint-0000002" / "done").is_file()
        smaller = dataclasses.replace(config, micro_batch=1, gradient_checkpointing=True)
        train.run(smaller, inputs, output, Context(World(), output / "work", 0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
