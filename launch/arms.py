"""Pipelines that run several arms with several seeds each, and compare them. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.launch import artifacts, comparison
from sparring.launch.comparison import COMPARE, CompareConfig
from sparring.launch.errors import UsageError
from sparring.launch.report import Section, Series, line_chart, recipe_section, write_page
from sparring.launch.seeds import derive
from sparring.launch.stages import Stage, Step, numbered

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,-]*")
_TAKEN = ("compare", "logs")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: a stage with its settings, run once a seed."""

    name: str
    """Folder of its runs, and what tables call it."""
    stage: Stage
    config: Any
    seeds: int


def check_names(names: Sequence[str], key: str) -> None:
    """Refuse names of arms that cannot be folders of their own.

    Raises:
        ValueError: a name is empty, has other characters than a folder's, or comes twice.
    """
    for name in names:
        if not _FOLDER.fullmatch(name) or name in _TAKEN:
            raise ValueError(
                f"{key}: {name!r} cannot be a folder's name: use letters, digits and . _ = , - "
                f"(and neither of {', '.join(_TAKEN)})"
            )
        if names.count(name) > 1:
            raise ValueError(f"{key}: two are called {name!r}; give one of them a label")


class ArmsPipeline(ABC):
    """A pipeline (see `runs.Pipeline`) of arms. Its recipe has name, seed and launch.

    All arms draw from the same seeds, so that what they share (a start, noise) is the same.
    """

    recipe: type
    stages: Mapping[str, Stage]

    @abstractmethod
    def algorithms(self) -> Mapping[str, str]:
        """What `sparring recipes` lists."""

    @abstractmethod
    def arms(self, recipe: Any) -> Sequence[Arm]:
        """What is compared."""

    @abstractmethod
    def compared(self, recipe: Any) -> CompareConfig:
        """On which axis; `arms` is filled in."""

    @abstractmethod
    def lead(self, recipe: Any) -> str:
        """One sentence on top of the report."""

    def steps(self, recipe: Any) -> list[Step]:
        """Every arm with every seed, then the comparison."""
        steps, names = [], []
        for arm in self.arms(recipe):
            for number in range(arm.seeds):
                seed = derive(recipe.seed, "seed", number)
                steps.append(Step(f"{arm.name}/seed{number}", arm.stage, arm.config, {}, seed))
                names.append(arm.name)
        settings = dataclasses.replace(self.compared(recipe), arms=tuple(names))
        runs = numbered("runs", [step.name for step in steps])
        return [*steps, Step(COMPARE.name, COMPARE, settings, runs)]

    def locate(self, name: str) -> Path:
        """Only stages that take a policy by name ask for this."""
        raise UsageError(f"{name!r} is no file or folder")

    def summary(self, recipe: Any, run: Path) -> dict[str, Any]:
        """The comparison, as data and as a table."""
        folder = run / COMPARE.name
        if artifacts.read(folder) is None:
            return {"comparison": None, "table": "nothing was compared yet"}
        found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        return {"comparison": found["arms"], "table": comparison.text(folder) + "\n" + _note(found)}

    def report(self, recipe: Any, run: Path) -> Path:
        """Write ``report.html`` into the run."""
        folder = run / COMPARE.name
        sections = []
        if artifacts.read(folder) is not None:
            found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
            sections.append(_comparison(found))
        sections += [self._steps(recipe, run), recipe_section(recipe)]
        return write_page(
            run / "report.html", title=recipe.name, lead=self.lead(recipe), sections=sections
        )

    def _steps(self, recipe: Any, run: Path) -> Section:
        rows = []
        for step in self.steps(recipe):
            artifact = artifacts.read(run / step.name)
            if artifact:
                seconds = f"{artifact.manifest['seconds']:.1f}"
                rows.append([step.name, seconds, artifact.digest[:12]])
        return Section("Steps", columns=["step", "seconds", "digest"], rows=rows)


def _note(found: Mapping[str, Any]) -> str:
    kind = "geometric mean" if found["scale"] == "log" else "mean"
    note = f"{kind} and 95 % t-interval over all seeds"
    if any(arm["diverged"] for arm in found["arms"].values()):
        note += "; a run that diverged counts from there on with the value it started from"
    return note


def _comparison(found: Mapping[str, Any]) -> Section:
    value = found["value"].replace("_", " ")
    series = [
        Series(name, *(arm["curve"][key] for key in ("cost", "mean", "low", "high")))
        for name, arm in found["arms"].items()
    ]
    chart = line_chart(
        series,
        x_label=found["cost"],
        y_label=value,
        caption=f"{value} against {found['cost']}; bands are 95 % intervals over seeds",
        bands=True,
        log=found["scale"] == "log",
    )
    heading, *lines = comparison.cells(found)
    note = _note(found)
    note = f"{note[0].upper()}{note[1:]}."
    return Section("Comparison", note=note, columns=heading, rows=lines, charts=[chart])
