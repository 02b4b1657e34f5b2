"""One stage run in this process, as a run or a stage command would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparring.alignment.stages import STAGES
from sparring.launch.artifacts import Artifact
from sparring.launch.stages import LaunchConfig, Step, execute


def run_stage(
    kind: str, output: Path, inputs: dict[str, Path], *, seed: int = 2, **settings: Any
) -> Artifact:
    stage = STAGES[kind]
    step = Step(kind, stage, stage.config(**settings), {}, seed)
    launch = LaunchConfig(inline=tuple(STAGES))
    made, _ = execute(step, inputs, output, launch, logs=output.parent, on_event=lambda _: None)
    return made
