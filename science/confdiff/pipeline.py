"""The pipeline `conformations`: simulate, train, guide, sample, compare. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sparring.launch.config import resolved
from sparring.launch.errors import UsageError
from sparring.launch.seeds import derive
from sparring.launch.stages import Stage, Step, numbered
from sparring.science.confdiff.config import (
    ConformationRecipe,
    ConformationSampleConfig,
    LabelConfig,
)
from sparring.science.confdiff.stages import (
    EVALUATE,
    GUIDE,
    LABEL,
    MD,
    SAMPLE,
    STAGES,
    TRAIN,
    SampleStage,
)

SOURCE, REFERENCE, LABELS = "md-source", "md-target", "labels"


class _Chain:
    """Builds the steps of one recipe."""

    def __init__(self, recipe: ConformationRecipe) -> None:
        self.recipe = recipe
        self.steps: list[Step] = []
        md = recipe.md
        self.force_field: dict[str, Any] = {"solvent": md.solvent, "platform": md.platform}
        """Energies are compared with the simulation's."""

    def add(
        self, name: str, stage: Stage, settings: Any, inputs: Mapping[str, str], *stream: str | int
    ) -> str:
        """Append a step; returns its name."""
        seed = derive(self.recipe.seed, *stream)
        self.steps.append(Step(name, stage, settings, dict(inputs), seed))
        return name

    def evaluate(self, folder: str, samples: str, *, reweight: float = 0.0) -> None:
        settings = dataclasses.replace(self.recipe.evaluate, reweight=reweight, **self.force_field)
        inputs = {"samples": samples, "reference": REFERENCE}
        self.add(f"{folder}/{EVALUATE.name}", EVALUATE, settings, inputs, "evaluate")

    def kinds(self) -> list[Literal["energy", "force"]]:
        """Of guides that the arms need, each once."""
        return list(dict.fromkeys(a.guidance for a in self.recipe.arms if a.guidance != "none"))

    def networks(self, number: int) -> dict[str, str]:
        """Train what the arms of one seed ask for; returns their steps by what they are."""
        recipe, folder = self.recipe, f"seed{number}"
        data = numbered("data", [SOURCE])
        train = resolved(recipe.train, 0)
        made = {"model": self.add(f"{folder}/base", TRAIN, train, data, "base", number)}
        if any(arm.gamma < 1 for arm in recipe.arms):
            blind = dataclasses.replace(train, sequence=False)
            name = f"{folder}/unconditional"
            made["unconditional"] = self.add(name, TRAIN, blind, data, "unconditional", number)
        guide = resolved(recipe.guide, 0)
        for kind in self.kinds():
            settings = dataclasses.replace(guide, kind=kind, temperature=recipe.target)
            labelled = numbered("data", [LABELS if guide.energy == "relaxed" else SOURCE])
            inputs = {"model": made["model"], **labelled}
            made[kind] = self.add(f"{folder}/{kind}", GUIDE, settings, inputs, kind, number)
        return made

    def arm(self, arm: ConformationSampleConfig, number: int, made: Mapping[str, str]) -> None:
        """Sample one arm with one seed, and measure it."""
        inputs = {"model": made["model"]}
        if arm.gamma < 1:
            inputs["unconditional"] = made["unconditional"]
        if arm.guidance != "none":
            inputs["guide"] = made[arm.guidance]
        folder = f"{arm.name}/seed{number}"
        # All arms draw from the same seeds.
        settings = SampleStage(**vars(arm), **self.force_field)
        samples = self.add(f"{folder}/{SAMPLE.name}", SAMPLE, settings, inputs, "sample", number)
        self.evaluate(folder, samples)


def build_steps(recipe: ConformationRecipe) -> list[Step]:
    """The chain of a recipe, in the order in which it runs."""
    chain = _Chain(recipe)
    chain.add(SOURCE, MD, recipe.md, {}, SOURCE)
    target = dataclasses.replace(recipe.md, temperature=recipe.target)
    chain.add(REFERENCE, MD, target, {}, REFERENCE)
    if recipe.guide.energy == "relaxed" and chain.kinds():
        label = LabelConfig(relaxed=True, **chain.force_field)
        chain.add(LABELS, LABEL, label, {"data": SOURCE}, LABELS)
    chain.evaluate("source", SOURCE)
    chain.evaluate("reweighted", SOURCE, reweight=recipe.target)
    for number in range(recipe.seeds):
        made = chain.networks(number)
        for arm in recipe.arms:
            chain.arm(arm, number, made)
    return chain.steps


class ConformationPipeline:
    """What `sparring run` needs to know of this package."""

    recipe = ConformationRecipe
    stages: Mapping[str, Stage] = STAGES

    def algorithms(self) -> dict[str, str]:
        """What `sparring recipes` lists."""
        return {"confdiff": "force-guided diffusion of protein conformations (arXiv 2403.14088)"}

    def steps(self, recipe: ConformationRecipe) -> list[Step]:
        """The chain of a recipe, in the order in which it runs."""
        return build_steps(recipe)

    def locate(self, name: str) -> Path:
        """Networks have no names but their folders."""
        raise UsageError(f"{name!r} is no folder; a network is made by sparring conf train")

    def summary(self, recipe: ConformationRecipe, run: Path) -> dict[str, Any]:
        """Figures by arm, and the table as text."""
        from sparring.science.confdiff.results import summary

        return summary(recipe, run)

    def report(self, recipe: ConformationRecipe, run: Path) -> Path:
        """Write ``report.html`` into the run."""
        from sparring.science.confdiff.results import write_report

        return write_report(recipe, run)


PIPELINE = ConformationPipeline()
