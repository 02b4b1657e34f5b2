"""Stage `images`: collect images with captions, and split them into training and held-out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparring.diffusion.spin.config import ImagesConfig
from sparring.diffusion.spin.pictures import picture
from sparring.diffusion.spin.rows import Picture
from sparring.diffusion.spin.sources import source
from sparring.launch.errors import SparringError
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures


def run(
    config: ImagesConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write train.parquet and heldout.parquet.

    Raises:
        SparringError: fewer images than asked for, an id twice, and what the source raises.
    """
    found: list[Picture] = []
    empty = 0
    for image_id, caption, image in source(config):
        if not caption.strip():
            empty += 1
            continue
        found.append(
            picture(
                image_id,
                caption,
                image,
                size=config.size,
                channels=config.channels,
                crop=config.crop,
            )
        )
        context.emit(done=len(found), total=None, unit="images")
    ids = [row.image_id for row in found]
    twice = next((i for i in ids if ids.count(i) > 1), None) if len(set(ids)) < len(ids) else None
    if twice is not None:
        raise SparringError(f"image id {twice!r} comes twice in {config.source}; rename one file")
    wanted = config.train + config.heldout
    if len(found) < wanted or len(found) <= config.heldout:
        raise SparringError(
            f"{config.source} has {len(found)} images with a caption, fewer than images.train + "
            f"images.heldout = {wanted}; lower one of them"
        )
    order = np.random.default_rng(derive(context.seed, "split")).permutation(len(found)).tolist()
    heldout = [found[n] for n in sorted(order[: config.heldout])]
    last = wanted if config.train else len(found)
    train = [found[n] for n in sorted(order[config.heldout : last])]
    write_rows(output / "train.parquet", Picture, train)
    write_rows(output / "heldout.parquet", Picture, heldout)
    return {
        "train": len(train),
        "heldout": len(heldout),
        "captions": len({row.caption for row in train}),
        "without_caption": empty,
    }
