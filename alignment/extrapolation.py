"""Stage `extrapolate`: APO's momentum on weights, π_{t+1} from π̂_{t+1} and π̂_t."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparring.alignment.momentum import extrapolate_folder
from sparring.alignment.stages import ExtrapolateStage
from sparring.launch.stages import Context, Figures


def run(
    config: ExtrapolateStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write new + alpha * (new - old), in float32, as a model folder."""
    extrapolate_folder(inputs["new"], inputs["old"], output, config.alpha)
    return {"alpha": config.alpha}
