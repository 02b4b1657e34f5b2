"""The recipe of a self-play run of a text-to-image model. Imports no torch."""

from __future__ import annotations

from typing import Literal

from sparring.launch.config import Schedule, config, positive, resource, schedule_values, within
from sparring.launch.stages import LaunchConfig
from sparring.launch.training import TrainingConfig


@config
class ImagesConfig:
    """Where images with captions come from."""

    source: str = "digits"
    """"digits" (scikit-learn), "icons" (fugue-icons), a folder of images with captions, a folder
    saved by datasets, or the id of a data set on the hub."""
    split: str = "train"
    """Of a data set on the hub, or of a saved one with several."""
    heldout_split: str = ""
    """Split to hold images out of, where a data set has one for it; empty: part of `split`."""
    heldout_by: Literal["image", "caption"] = "image"
    """"caption": one image a held-out caption, and none of these captions is trained on; "image":
    any images, for sets of few captions."""
    image_column: str = "image"
    """Of a data set."""
    caption_column: str = "text"
    """Of a data set, or of metadata.jsonl."""
    adapter: Literal["", "pick-a-pic"] = ""
    """"pick-a-pic": the preferred image of each row of Pick-a-Pic v2, ties left out."""
    size: int = 512
    """Pixels of a side."""
    channels: Literal[1, 3] = 3
    """1 for grey images."""
    crop: Literal["center", "pad"] = "center"
    """"center": scale the shorter side and cut the longer; "pad": put smaller images on a
    background."""
    train: int = 1000
    """Images to train on; 0: all that are not held out. Others are not even read."""
    heldout: int = 200
    """Images held out."""

    def __post_init__(self) -> None:
        positive("images.size", self.size)
        positive("images.heldout", self.heldout)
        within("images.train", self.train, 0, float("inf"))
        if self.heldout_split == self.split:
            raise ValueError(f"images.heldout_split is images.split too: {self.split!r}")


@config
class ImageModelConfig:
    """The text-to-image model to start from."""

    path: str = "small"
    """A folder of a diffusers pipeline, a hub id, or "small": a small one in the layout of Stable
    Diffusion, with random weights, made for the images' size and the words of their captions."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    widths: tuple[int, ...] = (32, 64)
    """Channels of the small network's levels."""
    target: Literal["auto", "epsilon", "v", "flow"] = "auto"
    """What the network predicts; "auto": what the pipeline's scheduler says. Another one is written
    into the run's scheduler, so that sampling and training agree."""


@config
class SamplingConfig:
    """How images are made."""

    scheduler: str = "ddim"
    """"ddim", "ddpm", "dpm" (DPM-Solver++), "euler", or "own": the pipeline's, as flows need."""
    steps: int = 50
    """Network calls an image, twice as many with guidance."""
    guidance: float = 7.5
    """Classifier-free guidance; 1: none."""
    batch: int = resource(default=8)
    """Images a forward pass."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the pipeline."""
    chunk: int = 64
    """Images a shard."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk"):
            positive(f"generate.{name}", getattr(self, name))
        within("generate.guidance", self.guidance, 1, 100)
        if self.scheduler not in ("ddim", "ddpm", "dpm", "euler", "own"):
            raise ValueError(
                f"generate.scheduler is ddim, ddpm, dpm, euler or own, not {self.scheduler!r}"
            )


@config
class ImageTrainConfig(TrainingConfig):
    """One iteration's training."""

    steps: int = 500
    """Optimizer steps."""
    beta: Schedule = (2000.0, 2000.0, 5000.0)
    """Strength of the pull to the opponent, in units of a mean over latent dimensions."""
    link: Literal["logistic", "hinge"] = "logistic"
    """The decreasing convex function of the margin."""
    weight: str = "none"
    """Weight of a pair's margin by its time step: module:function, called with times (B,) and the
    forward process (`process.Process`), gives (B,); "none": 1 everywhere."""
    winner_guard: bool = False
    """Weaken the loser's gradient so that the winner's error does not grow to first order."""
    sft_weight: float = 0.0
    """Weight of the winner's own error beside the loss."""
    caption_dropout: float = 0.0
    """Share of rows that are trained with the empty caption, as guidance needs."""
    wrong_captions: float = 0.0
    """Share of rows that get another row's caption: for a start that leaves room."""
    lora_rank: int = 0
    """Rank of LoRA adapters on the attention's matrices; 0 trains all weights. The result is
    merged, and the opponent is the network without adapters."""
    lora_alpha: float = 16.0
    """Scale of the adapters' product is lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("train.steps", self.steps)
        if self.weight != "none" and ":" not in self.weight:
            raise ValueError(f"train.weight is none or module:function, not {self.weight!r}")
        for value in schedule_values("train.beta", self.beta):
            positive("train.beta", value)
        for name in ("caption_dropout", "wrong_captions"):
            within(f"train.{name}", getattr(self, name), 0, 1)
        within("train.sft_weight", self.sft_weight, 0, float("inf"))
        within("train.lora_rank", self.lora_rank, 0, float("inf"))


SCORERS = ("classifier", "clip", "pickscore", "aesthetic", "hpsv2", "imagereward")


@config
class ImageEvaluateConfig:
    """What is measured on held-out captions."""

    k: int = 1
    """Images a caption."""
    scorers: tuple[str, ...] = ("classifier",)
    """"classifier" (trained on the real images; for small sets of captions), "clip", "pickscore",
    "aesthetic", "hpsv2", "imagereward", with a path or hub id behind a colon where one is needed,
    or module:function."""
    level: float = 0.95
    """Of the bootstrap intervals, which resample captions' images."""

    @property
    def scorer_files(self) -> tuple[str, ...]:
        """What the scorers name: paths (or hub ids), and module:function as it stands."""
        found: list[str] = []
        for name in self.scorers:
            kind, _, rest = name.partition(":")
            found += rest.split("|") if kind in SCORERS else [name]
        return tuple(found)

    def __post_init__(self) -> None:
        positive("evaluate.k", self.k)
        if not 0 < self.level < 1:
            raise ValueError(f"evaluate.level is a probability, not {self.level}")


@config
class ImageRecipe:
    """A self-play run of a text-to-image model."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["images"] = "images"
    """Kind of run."""
    algorithm: Literal["spin-diffusion", "one-iteration", "frozen-reference", "sft-diffusion"] = (
        "spin-diffusion"
    )
    """"spin-diffusion": the opponent is the iterate before; "one-iteration": the start and its
    images stay opponent and losers; "frozen-reference": losers are new, but the opponent's network
    stays the start, as in DPO; "sft-diffusion": the real images alone."""
    iterations: int = 3
    """Rounds of generating and training."""
    seed: int = 0
    """Of everything random."""
    images: ImagesConfig = ImagesConfig()
    model: ImageModelConfig = ImageModelConfig()
    pretrain: ImageTrainConfig = ImageTrainConfig(beta=1.0)
    """Of the small model on the real images, before the first iteration."""
    generate: SamplingConfig = SamplingConfig()
    train: ImageTrainConfig = ImageTrainConfig()
    evaluate: ImageEvaluateConfig = ImageEvaluateConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        positive("iterations", self.iterations)
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name becomes a folder: no slash, no leading dot, not {self.name!r}")
