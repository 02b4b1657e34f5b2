"""The image loop's stages: their settings and what they read. Imports no torch."""

from __future__ import annotations

from typing import Literal

from sparring.diffusion.spin.config import (
    ImageEvaluateConfig,
    ImageModelConfig,
    ImagesConfig,
    ImageTrainConfig,
    SamplingConfig,
)
from sparring.launch.config import config, positive, resource
from sparring.launch.stages import Stage


@config
class GenerateImagesStage(SamplingConfig):
    """Images of one iterate."""

    part: Literal["train", "heldout"] = "train"
    """Whose captions."""
    k: int = 1
    """Images a caption."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("k", self.k)


@config
class EncodeImagesStage:
    """Latents and conditions of one iteration."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of autoencoder and text encoders."""
    batch: int = resource(default=8)
    """Images, or captions, a forward pass."""
    chunk: int = 256
    """Pairs a shard."""


@config
class TrainImagesStage(ImageTrainConfig):
    """Training of one iteration; of a list of values the first counts."""

    loss: Literal["spin", "sft"] = "spin"
    """"sft": the winner's own error."""


_IMAGES = "artifact of images"
_MODEL = "folder of a diffusers pipeline"
_PACKAGES = ("torch", "diffusers", "transformers")

IMAGES = Stage(
    name="images",
    summary="collect images with captions and split them into training and held-out",
    function="sparring.diffusion.spin.collect:run",
    config=ImagesConfig,
    version="2",
    inputs={},
    light=True,
    reads=("source",),
)
IMAGE_MODEL = Stage(
    name="image-model",
    summary="bring the starting text-to-image pipeline into the run",
    function="sparring.diffusion.spin.start:run",
    config=ImageModelConfig,
    version="2",
    inputs={"images?": f"{_IMAGES}, for the small model"},
    single=True,
    packages=_PACKAGES,
    reads=("path",),
)
GENERATE_IMAGES = Stage(
    name="generate-images",
    summary="make images for the captions of real ones",
    function="sparring.diffusion.spin.generate:run",
    finish="sparring.diffusion.spin.generate:finish",
    config=GenerateImagesStage,
    version="2",
    inputs={"model": _MODEL, "images": _IMAGES},
    packages=_PACKAGES,
)
ENCODE_IMAGES = Stage(
    name="encode-images",
    summary="pair real with generated images; latents and captions' conditions, computed once",
    function="sparring.diffusion.spin.encode:run",
    finish="sparring.diffusion.spin.encode:finish",
    config=EncodeImagesStage,
    version="3",
    inputs={
        "model": _MODEL,
        "images": _IMAGES,
        "generated?": "artifact of generate-images; without it only real images are encoded",
    },
    packages=_PACKAGES,
)
TRAIN_IMAGES = Stage(
    name="train-images",
    summary="optimise the network on pairs of a real and a generated image",
    function="sparring.diffusion.spin.train:run",
    config=TrainImagesStage,
    version="2",
    inputs={
        "model": f"{_MODEL}, to start from",
        "encoded": "artifact of encode-images",
        "opponent?": f"{_MODEL}, of the opponent; the start if not given",
    },
    packages=("torch", "diffusers", "deepspeed", "accelerate", "peft"),
    plugins=("weight",),
)
EVALUATE_IMAGES = Stage(
    name="evaluate-images",
    summary="score images of an iterate for held-out captions",
    function="sparring.diffusion.spin.evaluate:run",
    config=ImageEvaluateConfig,
    version="3",
    inputs={
        "images": _IMAGES,
        "current": "artifact of generate-images for the held-out captions",
        "base?": "the same of the starting model",
        "previous?": "the same of the iterate before",
    },
    single=True,
    packages=("torch", "scikit-learn", "transformers"),
    reads=("scorer_files",),
)

STAGES = {
    stage.name: stage
    for stage in (
        IMAGES,
        IMAGE_MODEL,
        GENERATE_IMAGES,
        ENCODE_IMAGES,
        TRAIN_IMAGES,
        EVALUATE_IMAGES,
    )
}
