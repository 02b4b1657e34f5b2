"""Stage `evaluate-images`: what an iterate's images are worth, for held-out captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparring.diffusion.spin.config import ImageEvaluateConfig
from sparring.diffusion.spin.distances import (
    Features,
    coverage,
    frechet_distance,
    kernel_distance,
)
from sparring.diffusion.spin.pictures import Opened, from_png, thumbnails
from sparring.diffusion.spin.rows import Picture, Sample
from sparring.diffusion.spin.scorers import Classifier, Scorer, build_scorer
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures
from sparring.launch.statistics import bootstrap_mean

_FITTED = 1000  # training images from which the axes of distances are found


def run(
    config: ImageEvaluateConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Means are [mean, low, high]; win rates compare images of the same caption and seed.

    Raises:
        SparringError: samples for other captions than the others', and what scorers raise.
    """
    real = read_rows(inputs["images"] / "train.parquet", Picture)
    pairs = Opened(real, lambda row: (_image(row), row.caption))
    heldout = read_rows(inputs["images"] / "heldout.parquet", Picture)
    names = [name for name in ("current", "base", "previous") if name in inputs]
    samples = {name: _samples(inputs[name]) for name in names}
    keys = [(row.image_id, row.k) for row in samples["current"]]
    for name in names[1:]:
        if [(row.image_id, row.k) for row in samples[name]] != keys:
            raise SparringError(
                f"{inputs[name]} and {inputs['current']} have images for other captions; make both "
                "for the same part of the same images"
            )
    opened = {name: Opened(rows, _image) for name, rows in samples.items()}
    captions = [row.caption for row in samples["current"]]
    groups = [row.image_id for row in samples["current"]]
    measure = _Measure(groups, derive(context.seed, "bootstrap"), config.level)
    figures: Figures = {"images": len(captions), "captions": len(set(captions))}
    for scorer in (build_scorer(name, pairs) for name in config.scorers):
        figures |= _scores(scorer, opened, captions, heldout, measure)
    step = -(-len(real) // _FITTED)
    return figures | _distances(opened["current"], real[::step], heldout)


def _image(row: Picture | Sample) -> Image.Image:
    return from_png(row.png, row.image_id)


def _samples(folder: Path) -> list[Sample]:
    return read_rows(folder / "samples.parquet", Sample)


class _Measure:
    """[value, low, high] with bootstrap intervals over captions' images."""

    def __init__(self, groups: Sequence[str], seed: int, level: float) -> None:
        self._groups, self._seed, self._level = np.array(groups), seed, level

    def __call__(self, values: Sequence[float]) -> list[float]:
        """Of a mean."""
        found = bootstrap_mean(values, groups=self._groups, seed=self._seed, level=self._level)
        return [float(value) for value in found]


def _scores(
    scorer: Scorer,
    opened: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str],
    heldout: Sequence[Picture],
    measure: _Measure,
) -> Figures:
    found = {name: np.array(scorer.score(images, captions)) for name, images in opened.items()}
    for name, values in found.items():
        if values.shape != (len(captions),) or not np.isfinite(values).all():
            raise SparringError(
                f"scorer {scorer.name!r} gave {values.shape} values for {len(captions)} images of "
                f"{name}, {int((~np.isfinite(values)).sum())} of them not finite"
            )
    ours = found["current"]
    figures: Figures = {
        scorer.name: measure(ours.tolist()),
        f"{scorer.name}_median": float(np.median(ours)),
    }
    for name in ("base", "previous"):
        if name in found:
            wins = (ours > found[name]) + 0.5 * (ours == found[name])
            figures[f"{scorer.name}_win_rate_{name}"] = measure(wins.tolist())
    if isinstance(scorer, Classifier):  # others may take hours for the real images
        figures["accuracy"] = measure(scorer.right(opened["current"], captions))
        shown = [row.caption for row in heldout]
        figures["accuracy_real"] = float(np.mean(scorer.right(Opened(heldout, _image), shown)))
    return figures


def _distances(
    images: Sequence[Image.Image], train: Sequence[Picture], heldout: Sequence[Picture]
) -> Figures:
    """Against the held-out real images, on axes found from the training images.

    Without intervals: a bootstrap draws images twice, and all figures see that as less variety.
    What ends in _real is the figure of as many real training images: sets so small are that far
    apart for that reason alone.
    """
    features = Features(thumbnails(map(_image, train)))
    real = features(thumbnails(map(_image, heldout)))
    sets = {"": features(thumbnails(images))}
    if len(images) <= len(train):
        sets["_real"] = features(thumbnails(map(_image, train[: len(images)])))
    figures: Figures = {}
    for name, made in sets.items():
        if min(len(real), len(made)) > 2:
            figures[f"frechet{name}"] = frechet_distance(real, made)
            figures[f"kernel_distance{name}"] = kernel_distance(real, made)
        if len(real) > 5:
            figures[f"coverage{name}"] = coverage(real, made)
    return figures
