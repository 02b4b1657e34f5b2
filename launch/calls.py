"""One stage on files, for the command line and as a Python function.

from sparring.launch.calls import run_stage

data = run_stage("conf-md", "work/md", sequence="AAAAA", temperature=400.0)
base = run_stage("conf-train", "work/base", {"data": [data]}, steps=2000)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.launch import artifacts, runs, stages
from sparring.launch.artifacts import Artifact
from sparring.launch.config import build, plain
from sparring.launch.errors import UsageError
from sparring.launch.progress import Reporter
from sparring.launch.stages import LaunchConfig, Stage, Step
from sparring.launch.tracking import tracking

Input = str | Path | Artifact


def find_stage(name: str) -> Stage:
    """A stage of any pipeline.

    Raises:
        UsageError: there is none of this name.
    """
    known = {key: stage for p in runs.pipelines().values() for key, stage in p.stages.items()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
        raise UsageError(f"unknown stage {name!r}{hint}")
    return known[name]


def make(
    stage: Stage,
    settings: Any,
    inputs: Mapping[str, Path],
    out: Path,
    *,
    seed: int,
    launch: LaunchConfig,
    reporter: Reporter,
) -> tuple[Artifact, bool]:
    """Make one stage's artifact in a folder, unless it is there already.

    Returns:
        The artifact, and whether it was computed now.
    """
    out = out.absolute()  # "." has no name
    step = Step(out.name, stage, settings, {}, seed)
    lock = out.with_name(f".{out.name}.lock")
    tracks = out.parent / runs.TRACKING / out.name
    with (
        artifacts.locked(lock, out),
        runs.sigterm_stops(),
        tracking(launch.track, out.name, plain(settings), tracks, reporter.note) as trackers,
    ):
        reporter.start(stage.name)
        trackers.begin(stage.name, out)
        artifact, fresh = stages.execute(
            step, inputs, out, launch, logs=out.parent / "logs", on_event=reporter.event
        )
        reporter.stop(runs.describe(artifact) if fresh else "kept, it was there already")
        trackers.end(artifact)
    return artifact, fresh


def run_stage(
    name: str,
    out: str | Path,
    inputs: Mapping[str, Input | Sequence[Input]] | None = None,
    /,
    *,
    seed: int = 0,
    launch: LaunchConfig | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Artifact:
    """Run a stage on files, as its command does; running again resumes or keeps the result.

    Args:
        name: of the stage, such as "generate" or "conf-sample".
        out: folder for the result.
        inputs: by the names of the command's options: paths, artifacts, or lists of them where
            several are taken.
        seed: of everything random in this stage.
        launch: processes and interpreters. By default the stage runs in this process.
        quiet: no progress on standard error.
        settings: of the stage, by the names of its options (a judge's `name` too); sections are
            mappings.

    Raises:
        UsageError: an unknown stage, input or setting.
        SparringError: the stage failed.
    """
    stage = find_stage(name)
    given: dict[str, Path] = {}
    takes = {key.rstrip("?*"): key for key in stage.inputs}
    for key, value in (inputs or {}).items():
        if key not in takes:
            raise UsageError(f"{name} takes no input {key!r}; it takes {', '.join(takes)}")
        if takes[key].endswith("*"):
            several = [value] if isinstance(value, (str, Path, Artifact)) else value
            given |= stages.numbered(key, [_path(one) for one in several])
        else:
            given[key] = _path(value)
    for key, full in takes.items():
        if full == key and key not in given:
            raise UsageError(f"{name} needs the input {key!r}: {stage.inputs[key]}")
    config: Any = build(stage.config, settings, name)
    launch = launch or LaunchConfig(inline=(name,))
    reporter = Reporter(quiet=quiet)
    return make(stage, config, given, Path(out), seed=seed, launch=launch, reporter=reporter)[0]


def _path(value: Any) -> Path:
    if isinstance(value, Artifact):
        return value.path
    if isinstance(value, (str, Path)):
        return Path(value)
    raise UsageError(f"an input is a path or an artifact, not {value!r}")
