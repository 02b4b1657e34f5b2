"""The pipeline `images`: a recipe becomes a chain of stages. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.diffusion.spin.config import ImageRecipe
from sparring.diffusion.spin.stages import (
    ENCODE_IMAGES,
    EVALUATE_IMAGES,
    GENERATE_IMAGES,
    IMAGE_MODEL,
    IMAGES,
    STAGES,
    TRAIN_IMAGES,
)
from sparring.launch.config import plain, resolved
from sparring.launch.seeds import derive
from sparring.launch.stages import Stage, Step

ALGORITHMS = {
    "spin-diffusion": "self-play against the iterate before (arXiv 2402.10210)",
    "one-iteration": "the first iteration of it kept going, with its losers and its opponent",
    "frozen-reference": "new losers each iteration, the opponent's network stays the start (DPO)",
    "sft-diffusion": "the real images alone, SPIN-Diffusion's baseline",
}


class _Chain:
    """Builds the steps of one recipe."""

    def __init__(self, recipe: ImageRecipe) -> None:
        self.recipe = recipe
        self.steps: list[Step] = []

    def add(
        self,
        folder: str,
        stage: Stage,
        settings: Mapping[str, Any],
        *,
        stream: str | None = None,
        **inputs: str | None,
    ) -> str:
        """Append a step; returns its name."""
        name = f"{folder}/{stage.name}" if folder else stage.name
        given = {key: source for key, source in inputs.items() if source}
        seed = derive(self.recipe.seed, stage.name, folder if stream is None else stream)
        self.steps.append(Step(name, stage, stage.config(**settings), given, seed))
        return name

    def encode(self, folder: str, model: str, generated: str | None) -> str:
        generate = self.recipe.generate
        settings = {"dtype": generate.dtype, "batch": generate.batch}
        return self.add(
            folder, ENCODE_IMAGES, settings, model=model, images="images", generated=generated
        )

    def generate(self, folder: str, model: str, part: str, k: int, stream: str) -> str:
        settings = plain(self.recipe.generate) | {"part": part, "k": k}
        return self.add(
            folder, GENERATE_IMAGES, settings, stream=stream, model=model, images="images"
        )

    def heldout(self, t: int, model: str, samples: dict[int, str]) -> None:
        """Images for held-out captions, with the same noise at all t, and their figures."""
        folder, recipe = f"heldout{t}", self.recipe
        samples[t] = self.generate(folder, model, "heldout", recipe.evaluate.k, "heldout")
        self.add(
            folder,
            EVALUATE_IMAGES,
            vars(recipe.evaluate),
            images="images",
            current=samples[t],
            base=samples[0] if t else None,
            previous=samples[t - 1] if t > 1 else None,
        )


def build_steps(recipe: ImageRecipe) -> list[Step]:
    """The chain of a recipe, in the order in which it runs."""
    chain = _Chain(recipe)
    chain.add("", IMAGES, vars(recipe.images))
    model = chain.add("", IMAGE_MODEL, vars(recipe.model), images="images")
    real: str | None = None
    if recipe.model.path == "small":
        real = chain.encode("start", model, None)
        settings = vars(resolved(recipe.pretrain, 0)) | {"loss": "sft"}
        model = chain.add("start", TRAIN_IMAGES, settings, model=model, encoded=real)
    start = model
    samples: dict[int, str] = {}
    chain.heldout(0, model, samples)
    sft = recipe.algorithm == "sft-diffusion"
    keeps_losers = recipe.algorithm in ("sft-diffusion", "one-iteration")
    keeps_opponent = recipe.algorithm in ("frozen-reference", "one-iteration")
    encoded = (real or chain.encode("start", model, None)) if sft else None
    for t in range(recipe.iterations):
        folder = f"iter{t}"
        if encoded is None or not keeps_losers:
            generated = chain.generate(folder, model, "train", 1, folder)
            encoded = chain.encode(folder, model, generated)
        settings = vars(resolved(recipe.train, t)) | {"loss": "sft" if sft else "spin"}
        opponent = start if keeps_opponent and t else None
        model = chain.add(
            folder, TRAIN_IMAGES, settings, model=model, encoded=encoded, opponent=opponent
        )
        chain.heldout(t + 1, model, samples)
    return chain.steps


class ImagePipeline:
    """What `sparring run` needs to know of this package."""

    recipe = ImageRecipe
    stages: Mapping[str, Stage] = STAGES

    def algorithms(self) -> dict[str, str]:
        return dict(ALGORITHMS)

    def steps(self, recipe: ImageRecipe) -> Sequence[Step]:
        return build_steps(recipe)

    def locate(self, name: str) -> Path:
        """A pipeline by its hub id."""
        from sparring.diffusion.spin.pipelines import locate

        return locate(name)

    def summary(self, recipe: ImageRecipe, run: Path) -> dict[str, Any]:
        from sparring.diffusion.spin.results import summary

        return summary(recipe, run)

    def report(self, recipe: ImageRecipe, run: Path) -> Path:
        from sparring.diffusion.spin.results import write_report

        return write_report(recipe, run)


PIPELINE = ImagePipeline()
