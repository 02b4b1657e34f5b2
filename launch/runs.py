"""Runs: a recipe's chain of steps in one folder. Running again is resuming."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from sparring.launch import artifacts, stages
from sparring.launch.artifacts import Artifact
from sparring.launch.config import build, differences, plain, read_toml, without_launch
from sparring.launch.errors import SparringError, Stopped, UsageError
from sparring.launch.progress import Reporter
from sparring.launch.stages import LaunchConfig, Stage, Step
from sparring.launch.tracking import Tracking, tracking

RUN_FILE = "run.json"
TRACKING = "tracking"


class Pipeline(Protocol):
    """What a package registers under the entry-point group ``sparring.pipelines``."""

    recipe: type
    stages: Mapping[str, Stage]

    def algorithms(self) -> Mapping[str, str]: ...

    def steps(self, recipe: Any) -> Sequence[Step]: ...

    def locate(self, name: str) -> Path: ...

    def report(self, recipe: Any, run: Path) -> Path: ...

    def summary(self, recipe: Any, run: Path) -> Mapping[str, Any]: ...


def pipelines() -> dict[str, Pipeline]:
    """All registered pipelines by name.

    Raises:
        SparringError: one of them cannot be imported.
    """
    return {name: _loaded(entry) for name, entry in _entries().items()}


def _entries() -> dict[str, importlib.metadata.EntryPoint]:
    return {e.name: e for e in importlib.metadata.entry_points(group="sparring.pipelines")}


def _loaded(entry: importlib.metadata.EntryPoint) -> Pipeline:
    try:
        return typing.cast(Pipeline, entry.load())
    except (ImportError, AttributeError) as error:
        owner = f" of the package {entry.dist.name}" if entry.dist else ""
        raise SparringError(
            f"pipeline {entry.name!r}{owner} cannot be loaded from {entry.value}: {error}; "
            "repair or uninstall it"
        ) from error


def load_recipe(path: Path) -> tuple[Pipeline, Any]:
    """Read and validate a recipe file. Other pipelines are not loaded, so may be broken.

    Raises:
        UsageError: unreadable, unknown pipeline, unknown key, wrong type or value.
        SparringError: its pipeline cannot be imported.
    """
    data = read_toml(path)
    name = data.get("pipeline", "alignment")
    known = _entries()
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"{path}: pipeline {name!r} is unknown; known are {', '.join(known)}")
    pipeline = _loaded(known[name])
    return pipeline, build(pipeline.recipe, data, str(path))


@dataclass(frozen=True)
class Planned:
    """A step with what is known of it before it runs."""

    step: Step
    state: str
    """"done", "to do", or "waits" for inputs that are not there yet."""


def _resolve(step: Step, made: Mapping[str, Path]) -> dict[str, Path] | None:
    inputs = {}
    for name, source in step.inputs.items():
        if source.startswith("path:"):
            inputs[name] = Path(source.removeprefix("path:"))
        elif source in made:
            inputs[name] = made[source]
        else:
            return None
    return inputs


def plan(pipeline: Pipeline, recipe: Any, folder: Path) -> list[Planned]:
    """The steps of a recipe and which of them a folder already holds. Writes nothing."""
    made: dict[str, Path] = {}
    planned = []
    for step in pipeline.steps(recipe):
        inputs = _resolve(step, made)
        output = folder / step.name
        state = "waits"
        if inputs is not None:
            artifact = artifacts.read(output)
            done = artifact is not None and artifact.key == stages.content_key(
                step, stages.digests(inputs), recipe.launch
            )
            state = "done" if done else "to do"
            if done:
                made[step.name] = output
        planned.append(Planned(step, state))
    return planned


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM, as clusters send it before they take a node away, ends a run like Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped; run the same command again to go on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def claim(folder: Path, recipe: Any, *, changed: bool = False) -> None:
    """Record the recipe in the folder, or refuse a folder of another one."""
    path = folder / RUN_FILE
    if path.exists():
        old = _deciding(type(recipe), json.loads(path.read_text())["recipe"])
        different = differences(old, without_launch(recipe, resources=False))
        if different and not changed:
            raise SparringError(
                f"{folder} belongs to another recipe:\n  "
                + "\n  ".join(different)
                + "\nChoose another --out, or add --changed to go on with this recipe there "
                "(what is still valid is kept)."
            )
    elif folder.exists() and any(p.name not in (".lock",) for p in folder.iterdir()):
        raise SparringError(
            f"{folder} is not empty and is no run of sparring; choose another --out"
        )
    artifacts.write_json(path, {"recipe": without_launch(recipe)})


def _deciding(recipe: type, data: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe without memory and speed, which may change too."""
    try:
        return without_launch(build(recipe, data, RUN_FILE), resources=False)
    except UsageError:  # of another pipeline, or recorded by another version
        return data


def execute(
    pipeline: Pipeline, recipe: Any, folder: Path, reporter: Reporter, *, changed: bool = False
) -> dict[str, Any]:
    """Make every step of a recipe that is not there yet, then the report.

    Returns:
        Paths, counts of computed and kept steps, and the pipeline's summary.

    Raises:
        SparringError: a step failed, the folder is of another recipe or in use.
        Stopped: asked to stop; what is done stays.
    """
    launch: LaunchConfig = recipe.launch
    stages.all_hosts(launch)  # a wrong one before any work
    with artifacts.locked(folder / ".lock", folder), sigterm_stops():
        claim(folder, recipe, changed=changed)
        with tracking(
            launch.track, folder.name, plain(recipe), folder / TRACKING, reporter.note
        ) as trackers:
            computed, kept = _make_steps(pipeline.steps(recipe), folder, launch, reporter, trackers)
        report = pipeline.report(recipe, folder)
    return {
        "run": str(folder),
        "report": str(report),
        "computed": computed,
        "kept": kept,
        **pipeline.summary(recipe, folder),
    }


def _make_steps(
    steps: Sequence[Step],
    folder: Path,
    launch: LaunchConfig,
    reporter: Reporter,
    trackers: Tracking,
) -> tuple[int, int]:
    """Returns how many steps were computed, and how many kept."""
    computed = 0
    made: dict[str, Path] = {}
    for number, step in enumerate(steps, 1):
        inputs = _resolve(step, made)
        assert inputs is not None, f"{step.name} comes before its inputs"
        output = folder / step.name
        reporter.start(f"[{number}/{len(steps)}] {step.name}")
        trackers.begin(step.name, output)
        try:
            artifact, fresh = stages.execute(
                step, inputs, output, launch, logs=folder / "logs", on_event=reporter.event
            )
        except BaseException as error:
            asked = isinstance(error, (Stopped, KeyboardInterrupt))
            reporter.stop("stopped" if asked else "failed")
            raise
        reporter.stop(describe(artifact) if fresh else f"kept    {describe(artifact)}")
        trackers.end(artifact)
        computed += fresh
        made[step.name] = artifact.path
    return computed, len(steps) - computed


def track(
    pipeline: Pipeline, recipe: Any, folder: Path, names: Sequence[str], reporter: Reporter
) -> None:
    """Send what a run's folder holds, and a tracker has not, to trackers.

    Raises:
        SparringError: a tracker is unknown, not installed or does not start, or the run is being
            tracked just now.
    """
    with tracking(
        names, folder.name, plain(recipe), folder / TRACKING, reporter.note, patience=None
    ) as trackers:
        for step in pipeline.steps(recipe):
            output = folder / step.name
            if output.exists():
                trackers.begin(step.name, output)
                trackers.end(artifacts.read(output))


def describe(artifact: Artifact) -> str:
    """One line about an artifact: how long it took and its main figures."""
    shown: list[str] = []
    for name, value in artifact.figures.items():
        if isinstance(value, (int, float, str)) and len(shown) < 4:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            shown.append(f"{name} {text if len(text) <= 32 else text[:29] + '...'}")
    return f"{artifact.manifest['seconds']:6.1f} s   {', '.join(shown)}"
