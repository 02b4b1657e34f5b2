"""The first step in bfloat16 under ZeRO, each forked from a process that has imported all once.

    python half_worker.py MODEL ENCODED WORK SETTING...

The last line is JSON: metrics of the first step by setting.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import deepspeed  # noqa: F401
import diffusers.models  # noqa: F401
import peft  # noqa: F401

from sparring.diffusion.spin import train
from sparring.diffusion.spin.stages import TrainImagesStage
from sparring.launch.processes import World
from sparring.launch.stages import Context

SETTINGS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "zero 2": {"zero": 2},
    "zero 3, checkpointing": {"zero": 3, "gradient_checkpointing": True},
    "zero 2, checkpointing": {"zero": 2, "gradient_checkpointing": True},
    "zero 3": {"zero": 3},
    "zero 2, adapters": {"zero": 2, "lora_rank": 2},
}


def first_step(job: tuple[str, str, str, str]) -> dict[str, float]:
    """Metrics of one step."""
    name, model, encoded, work = job
    output = Path(work) / name
    (output / "work").mkdir(parents=True)
    config = TrainImagesStage(
        steps=1, batch=4, micro_batch=4, lr=1e-3, warmup=0.0, beta=20.0, save_every=0,
        precision="bfloat16", **SETTINGS[name],
    )  # fmt: skip
    context = Context(World(), output / "work", 3, lambda: False, lambda **_: None)
    train.run(config, {"model": Path(model), "encoded": Path(encoded)}, output, context)
    return dict(json.loads((output / "metrics.jsonl").read_text()))


if __name__ == "__main__":
    model, encoded, work, *names = sys.argv[1:]
    jobs = [(name, model, encoded, work) for name in names]
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(dict(zip(names, pool.map(first_step, jobs, 1), strict=True))))
