"""Scorers: how well images fit their captions, or how good they look, as one number an image.

A scorer is any object with ``name`` and ``score(images, prompts) -> list of floats``, higher is
better. One of your own is ``module:function``, called as ``function(real)`` with the real training
images as a sequence of (image, caption), each opened as it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from sparring.diffusion.spin.config import SCORERS
from sparring.diffusion.spin.pictures import thumbnails
from sparring.launch.errors import SparringError
from sparring.launch.stages import load

Real = Sequence[tuple[Image, str]]


class Scorer(Protocol):
    """Scores images."""

    name: str

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One number an image."""


class Classifier:
    """log p(caption | image) by logistic regression on the real images' thumbnails.

    For sets with few captions, of which each has several images. It never sees a generated image.
    """

    name = "classifier"

    def __init__(self, real: Real) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        captions = [caption for _, caption in real]
        if len(set(captions)) * 2 > len(captions) or len(set(captions)) < 2:
            raise SparringError(
                f"the classifier needs at least two captions with several images each, not "
                f"{len(set(captions))} captions for {len(captions)} images; name another scorer in "
                "evaluate.scorers"
            )
        self._model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        self._model.fit(thumbnails(image for image, _ in real), captions)
        self._place = {name: n for n, name in enumerate(self._model.classes_)}

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """Natural logarithms of probabilities, at least -20.

        Raises:
            SparringError: a prompt that no training image has.
        """
        unknown = next((prompt for prompt in prompts if prompt not in self._place), None)
        if unknown is not None:
            raise SparringError(
                f"the classifier knows the {len(self._place)} captions of the training images, and "
                f"{unknown!r} is none of them; name another scorer in evaluate.scorers, or hold "
                'out images of the same captions (images.heldout_by = "image", a larger train)'
            )
        chances = self._model.predict_proba(thumbnails(images))
        own = [chances[n, self._place[prompt]] for n, prompt in enumerate(prompts)]
        return np.log(np.maximum(own, np.exp(-20))).tolist()  # type: ignore[no-any-return]

    def right(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """1 where the caption is the likeliest."""
        right = self._model.predict(thumbnails(images)) == np.array(prompts)
        return right.astype(float).tolist()  # type: ignore[no-any-return]


class Clip:
    """Scaled cosine of CLIP's features of image and prompt; PickScore is one with other weights."""

    def __init__(self, name: str, path: str, batch: int = 32) -> None:
        from transformers import AutoModel, AutoProcessor

        self.name, self.batch = name, batch
        try:
            self._processor: Any = AutoProcessor.from_pretrained(path)
            self._model: Any = AutoModel.from_pretrained(path).eval()
        except (OSError, ValueError) as error:
            raise _not_loaded(name, path, error) from None

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """exp(scale) times the cosine."""
        import torch

        from sparring.launch.collective import device

        model = self._model.to(device())
        found: list[float] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            given = self._processor(
                text=list(prompts[part]),
                images=[image.convert("RGB") for image in images[part]],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).to(model.device)
            with torch.no_grad():
                out = model(**given)
            cosine = (out.image_embeds * out.text_embeds).sum(1)
            found += (model.logit_scale.exp() * cosine).tolist()
        return found


class Aesthetic:
    """LAION's aesthetic score: a linear predictor of 1 to 10 on CLIP ViT-L/14's image features.

    Args:
        path: folder or hub id of the CLIP, then "|", then a safetensors file with `weight` (1, D)
            and `bias` (1,), such as the linear layers of the published predictor multiplied out.
    """

    name = "aesthetic"

    def __init__(self, path: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        clip, _, head = path.partition("|")
        self._clip = Clip("aesthetic", clip)
        try:
            tensors = load_file(head)
            self._weight, self._bias = tensors["weight"][0], tensors["bias"][0]
        except (OSError, KeyError, SafetensorError) as error:
            reason = f"a safetensors file with weight and bias is needed: {error}"
            raise _not_loaded(self.name, head or path, reason) from None

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """About 1 to 10; prompts play no part."""
        import torch

        from sparring.launch.collective import device

        model = self._clip._model.to(device())
        found: list[float] = []
        for start in range(0, len(images), self._clip.batch):
            part = [image.convert("RGB") for image in images[start : start + self._clip.batch]]
            given = self._clip._processor(images=part, return_tensors="pt").to(model.device)
            with torch.no_grad():
                features = model.get_image_features(**given)
            pooled = getattr(features, "pooler_output", features)
            unit = pooled / pooled.norm(dim=-1, keepdim=True)
            found += (unit.cpu() @ self._weight + self._bias).tolist()
        return found


def _not_loaded(name: str, path: str, error: object) -> SparringError:
    return SparringError(
        f"scorer {name!r} cannot be loaded from {path!r} ({str(error).splitlines()[0]}); give a "
        f'folder or hub id after a colon, as in "{name}:/path", or leave it out'
    )


_DEFAULTS = {
    "clip": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "aesthetic": "",
    "hpsv2": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "imagereward": "google-bert/bert-base-uncased",
}
"""What is loaded where nothing else is named; of the last two, beside their checkpoint."""


def _preference_model(kind: str, path: str) -> Scorer:
    from sparring.diffusion.spin import preference_models

    checkpoint, _, beside = path.partition("|")
    make = {
        "hpsv2": preference_models.hpsv2,
        "imagereward": preference_models.image_reward,
    }[kind]
    try:
        return make(Path(checkpoint), beside or _DEFAULTS[kind])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _not_loaded(kind, path, error) from None


def build_scorer(name: str, real: Real) -> Scorer:
    """The scorer that a recipe names.

    Args:
        name: see `ImageEvaluateConfig.scorers`.
        real: training images with captions.

    Raises:
        SparringError: it cannot be loaded; the message names it and the place.
    """
    kind, _, path = name.partition(":")
    if kind == "classifier":
        return Classifier(real)
    if kind in ("clip", "pickscore"):
        return Clip(kind, path or _DEFAULTS[kind])
    if kind == "aesthetic":
        return Aesthetic(path)
    if kind in ("hpsv2", "imagereward"):
        return _preference_model(kind, path)
    if not path:
        raise SparringError(
            f"scorer {name!r} is none of {', '.join(SCORERS)}, and no module:function"
        )
    make: Callable[[Real], Scorer] = load(name)
    return make(real)
