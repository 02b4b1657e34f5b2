"""Stage `generate-images`: images of an iterate for the captions of real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from sparring.diffusion.spin.pictures import from_png, to_png
from sparring.diffusion.spin.rows import Caption, Sample, told_size
from sparring.diffusion.spin.stages import GenerateImagesStage
from sparring.launch import shards
from sparring.launch.collective import device
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures

Wanted = tuple[Caption, int]


def _wanted(config: GenerateImagesStage, inputs: Mapping[str, Path]) -> list[Wanted]:
    rows = read_rows(inputs["images"] / f"{config.part}.parquet", Caption)
    return [(row, k) for row in rows for k in range(config.k)]


def _side(path: Path) -> tuple[int, int]:
    """Height and width of the images in a file, which have one size."""
    first = next(pq.ParquetFile(path).iter_batches(1, columns=["png"]))
    image = from_png(first["png"][0].as_py(), str(path))
    return image.height, image.width


def run(
    config: GenerateImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Make this rank's shards; an image depends on its caption and seed, not on its batch mates
    (up to rounding, which is why shards have a fixed composition).

    A loser is made under the size and crop of its winner, with which SDXL is then trained on both:
    nothing but the image tells them apart. Held-out images are made as users make them.

    Raises:
        SparringError: images that are not finite, or a scheduler that cannot sample with the model.
    """
    import torch

    from sparring.diffusion.spin import pipelines
    from sparring.diffusion.spin.layouts import layout_of

    wanted = _wanted(config, inputs)
    height, width = _side(inputs["images"] / f"{config.part}.parquet")
    pipeline = pipelines.load(inputs["model"], dtype=config.dtype, scheduler=config.scheduler)
    pipeline.to(device())

    def draw(part: Sequence[Wanted]) -> Any:
        seeds = [derive(context.seed, "image", row.image_id, k) for row, k in part]
        # Noise is drawn on the CPU, so that it is the same on every device.
        return pipeline(
            prompt=[row.caption for row, _ in part],
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            height=height,
            width=width,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **layout_of(pipeline).sampling,
        ).images

    def sample(chunk: Sequence[Wanted]) -> list[Sample]:
        made: list[Sample] = []
        for start in range(0, len(chunk), config.batch):
            part = chunk[start : start + config.batch]
            sizes = [told_size(row, height, width) for row, _ in part]
            told = (
                pipelines.told_sizes(pipeline, sizes) if config.part == "train" else nullcontext()
            )
            with told:
                images = draw(part)
            made += [
                Sample(row.image_id, row.caption, k, to_png(_picture(image, row.image_id)))
                for (row, k), image in zip(part, images, strict=True)
            ]
        return made

    shards.make(wanted, config.chunk, Sample, sample, context, unit="images")
    return {"scheduler": type(pipeline.scheduler).__name__}


def _picture(image_HWC: Any, image_id: str) -> Image.Image:
    """An image from numbers in [0, 1]; diffusers would make those that are not finite black."""
    if not np.isfinite(image_HWC).all():
        raise SparringError(
            f"the image generated for {image_id!r} is not finite; sample in float32 "
            '(generate.dtype = "float32"), or check the model'
        )
    levels = (image_HWC * 255).round().astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)


def finish(
    config: GenerateImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``samples.parquet``."""
    count = len(shards.chunks(_wanted(config, inputs), config.chunk))
    rows = shards.merge(count, Sample, context.work)
    flat = len({row.png for row in rows})
    if len(rows) > 1 and flat == 1:
        raise SparringError(
            "all generated images are equal: the network's output is constant; check the model"
        )
    write_rows(output / "samples.parquet", Sample, rows)
    return {"images": len(rows), "distinct": flat}
