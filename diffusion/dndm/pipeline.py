"""The pipeline `dndm`: one network, and samplers that are compared on it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.diffusion.dndm.config import TextRecipe
from sparring.diffusion.dndm.stages import (
    EVALUATE_TEXT,
    SAMPLE_TEXT,
    STAGES,
    TEXT_DATA,
    TRAIN_TEXT,
    SampleTextStage,
    TrainTextStage,
)
from sparring.launch.errors import UsageError
from sparring.launch.seeds import derive
from sparring.launch.stages import Stage, Step


def build_steps(recipe: TextRecipe) -> list[Step]:
    """Data, training, and every sampler with every seed."""
    data, trained = TEXT_DATA.name, TRAIN_TEXT.name
    settings = TrainTextStage(**vars(recipe.train), model=recipe.model, process=recipe.process)
    steps = [
        Step(data, TEXT_DATA, recipe.data, {}, derive(recipe.seed, data)),
        Step(trained, TRAIN_TEXT, settings, {"data": data}, derive(recipe.seed, trained)),
    ]
    for sampler in recipe.samplers:
        count = sampler.count or recipe.count
        sampling = SampleTextStage(**{**vars(sampler), "count": count}, batch=recipe.batch)
        for number in range(recipe.seeds):
            # All samplers draw from the same seeds.
            seed = derive(recipe.seed, "sample", number)
            folder = f"{sampler.name}/seed{number}"
            made = Step(
                f"{folder}/{SAMPLE_TEXT.name}",
                SAMPLE_TEXT,
                sampling,
                {"model": trained, "data": data},
                seed,
            )
            read = {"samples": made.name, "data": data}
            if "bits" in recipe.evaluate.measures:
                read["model"] = trained
            measured = Step(
                f"{folder}/{EVALUATE_TEXT.name}", EVALUATE_TEXT, recipe.evaluate, read, seed
            )
            steps += [made, measured]
    return steps


class TextPipeline:
    """What `sparring run` needs to know of this package."""

    recipe = TextRecipe
    stages: Mapping[str, Stage] = STAGES

    def algorithms(self) -> dict[str, str]:
        """What `sparring recipes` lists."""
        return {"dndm": "discrete diffusion, calls where a token changes (arXiv 2312.09193)"}

    def steps(self, recipe: TextRecipe) -> list[Step]:
        """The chain of a recipe, in the order in which it runs."""
        return build_steps(recipe)

    def locate(self, name: str) -> Path:
        """Networks have no names but their folders."""
        raise UsageError(f"{name!r} is no folder; a network is made by train-text-diffusion")

    def summary(self, recipe: TextRecipe, run: Path) -> dict[str, Any]:
        """Figures by sampler, and the table as text."""
        from sparring.diffusion.dndm.results import summary

        return summary(recipe, run)

    def report(self, recipe: TextRecipe, run: Path) -> Path:
        """Write ``report.html`` into the run."""
        from sparring.diffusion.dndm.results import write_report

        return write_report(recipe, run)


PIPELINE = TextPipeline()
