"""Stage `image-model`: bring the starting pipeline into the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparring.diffusion.spin.config import ImageModelConfig
from sparring.diffusion.spin.rows import Picture
from sparring.launch.errors import UsageError
from sparring.launch.rows import read_rows
from sparring.launch.stages import Context, Figures


def run(
    config: ImageModelConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write a diffusers folder with float32 weights; "small" needs the input `images`.

    Raises:
        UsageError: "small" without images.
        SparringError: `path` is nothing that diffusers can load, or nothing that can be trained.
    """
    from sparring.diffusion.spin import pipelines
    from sparring.diffusion.spin.layouts import layout_of
    from sparring.diffusion.spin.pictures import from_png
    from sparring.diffusion.spin.process import Process, retargeted
    from sparring.diffusion.spin.small import small_pipeline

    if config.path == "small":
        if "images" not in inputs:
            raise UsageError('model.path = "small" is made for images: give --images')
        rows = read_rows(inputs["images"] / "train.parquet", Picture)
        first = from_png(rows[0].png, rows[0].image_id)
        pipeline = small_pipeline(
            sorted({row.caption for row in rows}),
            size=first.height,
            channels=1 if first.mode == "L" else 3,
            widths=config.widths,
            seed=context.seed,
        )
    else:
        pipeline = pipelines.load(config.path, revision=config.revision)
    if config.target != "auto":
        pipeline.scheduler = retargeted(pipeline.scheduler, config.target)
    pipelines.check(pipeline)
    pipeline.save_pretrained(output)
    network = getattr(pipeline, layout_of(pipeline).denoiser)
    return {
        "pipeline": type(pipeline).__name__,
        "target": Process.of(pipeline.scheduler).target,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
