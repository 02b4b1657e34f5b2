"""A pipeline of two stages that add numbers: enough to test what `launch` does around stages."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sparring.launch.config import config, resource
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.stages import Context, Figures, LaunchConfig, Stage, Step


@config
class Add:
    value: int = 1
    mode: str = "ok"
    memory: int = resource(default=1)


@config
class ToyRecipe:
    name: str = "toy"
    pipeline: Literal["toy"] = "toy"
    algorithm: str = "none"
    first: int = 1
    second: int = 2
    mode: str = "ok"
    memory: int = resource(default=1)
    launch: LaunchConfig = LaunchConfig()


def add(config: Add, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    if config.mode == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if config.mode == "user":
        raise SparringError("the toy is broken; buy another")
    if config.mode == "bug":
        raise ValueError("an unexpected toy")
    if config.mode == "greedy":
        torch.empty(10**15)
    if config.mode == "gpu":  # as torch says it where there is one
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if config.mode == "python":
        bytearray(2**62)
    if config.mode == "deaf":  # asked to stop, and goes on to its end
        os.kill(os.getpid(), signal.SIGTERM)
    if config.mode == "wait":
        (context.work / f"pid{context.world.rank}").write_text(str(os.getpid()))
        while not context.stopped():
            time.sleep(0.01)
        time.sleep(context.world.rank)  # a rank takes longer than another
        (context.work / f"saved{context.world.rank}").write_text("yes")
        raise Stopped("stopped; run the same command again to go on")
    if config.mode == "world":
        world, folder = context.world, output / "worlds"
        folder.mkdir(exist_ok=True)
        text = f"{world.rank} {world.size} {world.local_rank} {world.local_size}"
        (folder / str(world.rank)).write_text(text)
        devices = output / "devices"
        devices.mkdir(exist_ok=True)
        (devices / str(world.rank)).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    total = config.value + sum(int((path / "n.txt").read_text()) for path in inputs.values())
    (output / "n.txt").write_text(str(total))
    context.emit(done=1, total=1, unit="numbers")
    return {"total": total}


ADD = Stage("add", "add numbers", "toy_pipeline:add", Add, "1", {"other?": "another sum"})


class Toy:
    recipe = ToyRecipe
    stages: Mapping[str, Stage] = {"add": ADD}

    def algorithms(self) -> dict[str, str]:
        return {"none": "nothing"}

    def steps(self, recipe: ToyRecipe) -> list[Step]:
        return [
            Step("one", ADD, Add(value=recipe.first, memory=recipe.memory), {}),
            Step(
                "two",
                ADD,
                Add(value=recipe.second, mode=recipe.mode, memory=recipe.memory),
                {"other": "one"},
            ),
        ]

    def locate(self, name: str) -> Path:
        return Path(name)

    def report(self, recipe: ToyRecipe, run: Path) -> Path:
        path = run / "report.html"
        path.write_text("toy")
        return path

    def summary(self, recipe: ToyRecipe, run: Path) -> dict[str, Any]:
        return {"total": int((run / "two" / "n.txt").read_text())}
