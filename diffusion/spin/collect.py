"""Stage `images`: collect images with captions, and split them into training and held-out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparring.diffusion.spin.config import ImagesConfig
from sparring.diffusion.spin.pictures import picture
from sparring.diffusion.spin.rows import Picture
from sparring.diffusion.spin.sources import Found, source
from sparring.launch.errors import SparringError
from sparring.launch.rows import schema
from sparring.launch.seeds import derive
from sparring.launch.shards import chunks
from sparring.launch.stages import Context, Figures

_GROUP = 64  # images in memory, and in a row group


def run(
    config: ImagesConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write train.parquet and heldout.parquet; only images that are in one of them are opened.

    Raises:
        SparringError: fewer images than asked for, an id twice, and what the source raises.
    """
    listed = list(source(config))
    parts = [listed]
    if config.heldout_split:
        other = replace(config, split=config.heldout_split, heldout_split="")
        parts.append(list(source(other)))
    pools = [[found for found in part if found.caption.strip()] for part in parts]
    twice = [name for name, n in Counter(f.image_id for p in pools for f in p).items() if n > 1]
    if twice:
        raise SparringError(f"image id {twice[0]!r} comes twice in {config.source}; rename one")
    train, heldout = _split(config, pools, context.seed)
    if len(heldout) < config.heldout or len(train) < max(1, config.train):
        raise SparringError(
            f"{config.source} has {len(listed)} images, of which {len(heldout)} can be held out "
            f"and {len(train)} trained on; images.heldout = {config.heldout} and images.train = "
            f"{config.train} ask for more"
        )
    done = 0
    for name, part in (("train", train), ("heldout", heldout)):
        with pq.ParquetWriter(
            output / f"{name}.parquet", schema(Picture), compression="zstd"
        ) as to:
            for some in chunks(part, _GROUP):
                to.write_table(_table(config, some))
                done += len(some)
                context.emit(done=done, total=len(train) + len(heldout), unit="images")
    known = {found.caption for found in train}
    return {
        "train": len(train),
        "heldout": len(heldout),
        "captions": len(known),
        "captions_in_both": len(known & {found.caption for found in heldout}),
        "without_caption": sum(map(len, parts)) - sum(map(len, pools)),
    }


def _split(
    config: ImagesConfig, pools: Sequence[Sequence[Found]], seed: int
) -> tuple[list[Found], list[Found]]:
    """Training and held-out rows, drawn by the seed and in the source's order.

    Args:
        pools: all rows; where they are of another split, those to hold out second.
    """

    def drawn(pool: Sequence[Found]) -> list[int]:
        order = np.random.default_rng(derive(seed, "split")).permutation(len(pool))
        return [int(n) for n in order]

    held = drawn(pools[-1])
    if config.heldout_by == "caption":
        first: dict[str, int] = {}
        for n in held:
            first.setdefault(pools[-1][n].caption, n)
        held = list(first.values())
    held = held[: config.heldout]
    heldout = [pools[-1][n] for n in sorted(held)]
    kept = set(held) if len(pools) == 1 else set()
    captions = {f.caption for f in heldout} if config.heldout_by == "caption" else set()
    rest = [n for n in drawn(pools[0]) if n not in kept and pools[0][n].caption not in captions]
    train = [pools[0][n] for n in sorted(rest[: config.train or None])]
    return train, heldout


def _table(config: ImagesConfig, some: Iterable[Found]) -> pa.Table:
    rows = [
        picture(
            found.image_id,
            found.caption,
            found.open(),
            size=config.size,
            channels=config.channels,
            crop=config.crop,
        )
        for found in some
    ]
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=schema(Picture))
