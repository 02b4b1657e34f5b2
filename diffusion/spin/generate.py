"""Stage `generate-images`: images of an iterate for the captions of real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.diffusion.spin.rows import Picture, Sample
from sparring.diffusion.spin.stages import GenerateImagesStage
from sparring.launch import shards
from sparring.launch.collective import device
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures


def _wanted(config: GenerateImagesStage, inputs: Mapping[str, Path]) -> list[tuple[Picture, int]]:
    rows = read_rows(inputs["images"] / f"{config.part}.parquet", Picture)
    return [(row, k) for row in rows for k in range(config.k)]


def run(
    config: GenerateImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Make this rank's shards; an image depends on its caption and seed, not on its batch mates
    (up to rounding, which is why shards have a fixed composition)."""
    import torch

    from sparring.diffusion.spin import pipelines
    from sparring.diffusion.spin.pictures import from_png, to_png

    wanted = _wanted(config, inputs)
    example = from_png(wanted[0][0].png, wanted[0][0].image_id)
    pipeline = pipelines.load(inputs["model"], dtype=config.dtype, scheduler=config.scheduler)
    pipeline.to(device())

    def sample(chunk: Sequence[tuple[Picture, int]]) -> list[Sample]:
        made: list[Any] = []
        for start in range(0, len(chunk), config.batch):
            part = chunk[start : start + config.batch]
            seeds = [derive(context.seed, "image", row.image_id, k) for row, k in part]
            # Noise is drawn on the CPU, so that it is the same on every device.
            made += pipeline(
                prompt=[row.caption for row, _ in part],
                num_inference_steps=config.steps,
                guidance_scale=config.guidance,
                height=example.height,
                width=example.width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pil",
            ).images
        return [
            Sample(row.image_id, row.caption, k, to_png(image))
            for (row, k), image in zip(chunk, made, strict=True)
        ]

    shards.make(wanted, config.chunk, Sample, sample, context, unit="images")
    return {}


def finish(
    config: GenerateImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``samples.parquet``."""
    count = len(shards.chunks(_wanted(config, inputs), config.chunk))
    rows = shards.merge(count, Sample, context.work)
    flat = len({row.png for row in rows})
    if len(rows) > 1 and flat == 1:
        raise SparringError(
            "all generated images are equal: the network's output is constant or not finite; "
            "check the model and generate.dtype"
        )
    write_rows(output / "samples.parquet", Sample, rows)
    return {"images": len(rows), "distinct": flat}
