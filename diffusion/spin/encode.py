"""Stage `encode-images`: latents of pairs and conditions of captions, once an iteration.

Training then needs neither the autoencoder nor the text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.diffusion.spin.rows import Encoded, Picture, Sample, told_size
from sparring.diffusion.spin.stages import EncodeImagesStage
from sparring.launch import artifacts, shards
from sparring.launch.collective import device
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, Figures

Pair = tuple[Picture, Sample | None]


def paired(inputs: Mapping[str, Path]) -> tuple[list[Pair], int]:
    """Real images with the opponent's for the same caption, and how many were equal and left out.

    Raises:
        SparringError: a generated image belongs to no real one, or no pair is left.
    """
    pictures = read_rows(inputs["images"] / "train.parquet", Picture)
    if "generated" not in inputs:
        return [(row, None) for row in pictures], 0
    known = {row.image_id: row for row in pictures}
    pairs: list[Pair] = []
    equal = 0
    for sample in read_rows(inputs["generated"] / "samples.parquet", Sample):
        if sample.image_id not in known:
            raise SparringError(
                f"{inputs['generated']} has an image for {sample.image_id!r}, which is not among "
                f"the training images of {inputs['images']}"
            )
        row = known[sample.image_id]
        if row.png == sample.png:
            equal += 1
        else:
            pairs.append((row, sample))
    if not pairs:
        raise SparringError(
            f"no pair to train on: {inputs['generated']} holds {equal} images, all equal to the "
            "real ones"
        )
    return pairs, equal


def run(
    config: EncodeImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Encode this rank's shards; rank 0 encodes the captions too.

    Raises:
        SparringError: an autoencoder of neither grey nor colour, features of captions that are not
            finite, and what `paired` raises.
    """
    import torch

    from sparring.diffusion.spin import pipelines
    from sparring.diffusion.spin.pictures import from_png, pixels

    pairs, _ = paired(inputs)
    pipeline = pipelines.load(inputs["model"], dtype=config.dtype, network=False)
    pipeline.to(device())
    channels = pipelines.image_channels(pipeline.vae)
    if context.world.rank == 0:
        _captions(pipeline, sorted({row.caption for row, _ in pairs}), config.batch, context)

    def latents(images: Sequence[tuple[str, bytes]]) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(images), config.batch):
            opened = [from_png(png, name) for name, png in images[start : start + config.batch]]
            batch = torch.from_numpy(pixels(opened, channels))
            found += list(pipelines.to_latents(pipeline.vae, batch).cpu().numpy())
        return found

    def encode(chunk: Sequence[Pair]) -> list[Encoded]:
        winners = latents([(row.image_id, row.png) for row, _ in chunk])
        losers: list[Any] = [None] * len(chunk)
        if chunk[0][1] is not None:
            losers = latents([(s.image_id, s.png) for _, s in chunk if s is not None])
        rows = []
        for (row, _), winner, loser in zip(chunk, winners, losers, strict=True):
            side = from_png(row.png, row.image_id)
            size = told_size(row, side.height, side.width)
            data = b"" if loser is None else _bytes(loser)
            rows.append(Encoded(row.image_id, row.caption, _bytes(winner), data, size))
        return rows

    shards.make(pairs, config.chunk, Encoded, encode, context, unit="pairs")
    if context.world.rank:
        return {}
    shape = list(latents([(pairs[0][0].image_id, pairs[0][0].png)])[0].shape)
    artifacts.write_json(context.work / "shape.json", shape)
    return {}


def _bytes(latents: Any) -> bytes:
    return np.ascontiguousarray(latents, dtype="<f4").tobytes()


def _captions(pipeline: Any, captions: Sequence[str], batch: int, context: Context) -> None:
    """Conditions of no caption and of all others, in the order of captions.json."""
    import torch
    from safetensors.torch import save_file

    from sparring.diffusion.spin.layouts import encode_captions

    listed = ["", *captions]
    found = encode_captions(pipeline, captions, batch)
    finite = torch.stack([value.isfinite().flatten(1).all(1) for value in found.values()]).all(0)
    if not finite.all():
        bad = [caption for caption, good in zip(listed, finite.tolist(), strict=True) if not good]
        raise SparringError(
            f"the features of {len(bad)} captions are not finite, the first {bad[0]!r}; encode in "
            'float32 (generate.dtype = "float32")'
        )
    limit = min(int(pipeline.tokenizer.model_max_length), found["caption"].shape[1])
    cut = sum(len(ids) > limit for ids in pipeline.tokenizer(listed)["input_ids"])
    if cut:
        context.emit(note=f"{cut} captions are longer than the {limit} tokens the model reads")
    save_file(found, context.work / "captions.safetensors")
    artifacts.write_json(context.work / "captions.json", {"captions": listed, "cut": cut})


def finish(
    config: EncodeImagesStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``encoded.parquet`` beside captions and the latents' shape."""
    import json

    pairs, equal = paired(inputs)
    rows = shards.merge(len(shards.chunks(pairs, config.chunk)), Encoded, context.work)
    for row in rows:
        for name, data in (("real", row.winner), ("generated", row.loser)):
            if not np.isfinite(np.frombuffer(data, dtype="<f4")).all():
                raise SparringError(
                    f"the latents of the {name} image {row.image_id!r} are not finite; encode in "
                    'float32 (generate.dtype = "float32")'
                )
    write_rows(output / "encoded.parquet", Encoded, rows)
    for name in ("captions.safetensors", "captions.json", "shape.json"):
        (context.work / name).replace(output / name)
    cut = json.loads((output / "captions.json").read_text())["cut"]
    return {"pairs": len(rows), "equal": equal, "captions_cut": cut}
