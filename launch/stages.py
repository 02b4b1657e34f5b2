"""Stages: functions from input artifacts to one output artifact.

A stage's `run` is called once a rank as ``run(config, inputs, output, context)`` and may leave
shards in ``output/work``; `finish`, where there is one, is called once after all ranks are through,
merges them and returns the figures. What `run` of rank 0 returns are figures too.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import typing
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sparring.launch import artifacts, hosts, processes
from sparring.launch.artifacts import Artifact
from sparring.launch.config import build, config, memory_advice, plain
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.hosts import Hosts
from sparring.launch.lease import Lease
from sparring.launch.processes import World

LEASE = "lease.json"
Figures = dict[str, Any]
Source = TypeVar("Source")


@config
class LaunchConfig:
    """How stages are started. Changes nothing of what they compute but rounding in training."""

    processes: int = 1
    """Ranks a stage on this host, or on each host of a SLURM allocation; more than one are started
    by DeepSpeed's launcher."""
    hostfile: str = ""
    """File of the hosts to run on, reached by pdsh over ssh, as DeepSpeed's: "NAME slots=RANKS" a
    line, which replaces `processes`. See docs/clusters.md."""
    slurm: bool = False
    """Run on all hosts of the SLURM allocation that this is in, reached by srun."""
    inline: tuple[str, ...] = ()
    """Stages to run inside the driver's process on one rank, which saves small models' start-up.
    Other heavy stages have processes of their own, which free all their memory."""
    grace: float = 60.0
    """Seconds that ranks have to finish a shard or write a checkpoint when they are asked to stop;
    then they are killed. A large model's checkpoint on a slow file system needs more."""
    python: dict[str, str] = field(default_factory=dict)
    """Interpreter for a stage by its name, when it needs packages that this one has not."""
    track: tuple[str, ...] = ()
    """Where metrics go besides their files: "tensorboard", "wandb", "trackio", or module:class."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"launch.processes must be at least 1, not {self.processes}")
        if not self.grace > 0:
            raise ValueError(f"launch.grace must be positive seconds, not {self.grace}")
        if self.hostfile and self.slurm:
            raise ValueError("launch.hostfile and launch.slurm exclude each other; give one")


@dataclass(frozen=True)
class Context:
    """What a stage is told besides its configuration."""

    world: World
    work: Path
    """Folder for shards and checkpoints that survive an interruption."""
    seed: int
    stopped: Callable[[], bool] = lambda: False
    """True once the stage was asked to stop: save and raise Stopped."""
    emit: Callable[..., None] = processes.emit
    """Reports progress: ``emit(done=3, total=10, unit="rows")``, or a note: ``emit(note="…")``."""


@dataclass(frozen=True)
class Stage:
    """A kind of work. Functions are named, not imported, so that planning loads no model code."""

    name: str
    summary: str
    function: str
    """``module:function`` called on every rank."""
    config: type
    version: str
    """Part of the content key: to be raised when the same input would give another output."""
    inputs: Mapping[str, str]
    """Input names with what they are. ``name?`` may be left out; ``name*`` takes any number, which
    a step's inputs call ``name.0``, ``name.1``, and so on."""
    finish: str | None = None
    text: str | None = None
    """``module:function`` from an artifact's folder to what a terminal shows of it."""
    light: bool = False
    """Needs no model: always runs inside the driver, on one rank."""
    single: bool = False
    """Always one rank, in its own process."""
    packages: tuple[str, ...] = ()
    """Distributions whose versions decide the result; part of the content key."""
    reads: tuple[str, ...] = ()
    """Settings that may name a local file, a folder or ``module:function``, whose bytes decide the
    result; dotted below sections and lists of sections. Part of the content key."""
    plugins: tuple[str, ...] = ()
    """Settings that may name ``module:function``, but never a file: "sppo" is no folder."""


@dataclass(frozen=True)
class Step:
    """One use of a stage in a run."""

    name: str
    """Folder of the output below the run, e.g. ``iter1/generate``."""
    stage: Stage
    config: Any
    inputs: Mapping[str, str]
    """Input name to the name of an earlier step, or to a path outside the run (``path:…``)."""
    seed: int = 0


def numbered(name: str, sources: Sequence[Source]) -> dict[str, Source]:
    """The inputs of a ``name*``: name.0, name.1, …"""
    return {f"{name}.{n}": source for n, source in enumerate(sources)}


def many(name: str, inputs: Mapping[str, Source]) -> list[Source]:
    """What `numbered` made, in its order."""
    found = [key for key in inputs if key.startswith(f"{name}.")]
    return [inputs[key] for key in sorted(found, key=lambda key: int(key.rpartition(".")[2]))]


def load(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names.

    Raises:
        SparringError: there is no such module or function, or importing it fails.
    """
    module, _, function = name.partition(":")
    try:
        return typing.cast("Callable[..., Any]", getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise SparringError(
            f"{name!r} cannot be imported ({error}); it must be module:function, on PYTHONPATH"
        ) from error


def package_versions(stage: Stage, python: str = sys.executable) -> dict[str, str]:
    """Versions, in the interpreter that runs it, of the packages that decide a stage's result."""
    if python != sys.executable:
        return _versions_elsewhere(python, stage.packages)
    return _versions(stage.packages)


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


@cache
def _versions_elsewhere(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    code = (
        "import json, sys; from sparring.launch.stages import _versions;"
        "print(json.dumps(_versions(sys.argv[1:])))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    if done.returncode:
        raise SparringError(f"{python} cannot import sparring; install it there: {done.stderr}")
    return typing.cast("dict[str, str]", json.loads(done.stdout))


def digests(inputs: Mapping[str, Path]) -> dict[str, str]:
    """What a step's inputs hold, by name; a folder of another program is read whole for it."""
    return {name: artifacts.content_digest(path) for name, path in inputs.items()}


def content_key(step: Step, inputs: Mapping[str, str], launch: LaunchConfig) -> str:
    """Hash of all that decides a step's output; of the inputs their `digests`."""
    python = processes.python_of(launch.python, step.stage.name)
    named = _named_files(step)
    return artifacts.hash_json(
        {
            "stage": step.stage.name,
            "version": step.stage.version,
            "packages": package_versions(step.stage, python),
            "config": plain(step.config, resources=False),
            "seed": step.seed,
            "inputs": dict(inputs),
            **({"files": named} if named else {}),
        }
    )


def _named_files(step: Step) -> dict[str, str]:
    """Digests of what a step's settings name on this machine."""
    stage, config = step.stage, step.config
    values = [v for key in stage.reads for v in _settings(config, key.split("."))]
    values += [v for key in stage.plugins for v in _settings(config, key.split(".")) if ":" in v]
    paths = {value: _local(value) for value in values if value}
    return {value: artifacts.content_digest(path) for value, path in paths.items() if path}


def _settings(section: Any, keys: Sequence[str]) -> list[str]:
    for key in keys:
        if isinstance(section, tuple):
            return [value for one in section for value in _settings(one, keys)]
        section, keys = getattr(section, key), keys[1:]
    return [str(one) for one in section] if isinstance(section, tuple) else [str(section)]


def _local(value: str) -> Path | None:
    """The file of a plug-in's module, or the file or folder of this name; None for other names."""
    module, colon, _ = value.partition(":")
    if colon:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None
    path = Path(value).expanduser()
    return path if path.exists() else None


def write_job(step: Step, inputs: Mapping[str, Path], output: Path) -> Path:
    """Write the file that a worker process reads."""
    path = output / artifacts.WORK / "job.json"
    job = {
        "function": step.stage.function,
        "config": plain(step.config),
        "inputs": {name: str(Path(path).absolute()) for name, path in inputs.items()},
        "output": str(output.absolute()),
        "seed": step.seed,
        "driver": {"pid": os.getpid(), "host": socket.gethostname(), "name": uuid.uuid4().hex},
    }
    artifacts.write_json(path, job)
    return path


def run_job(job: Mapping[str, Any], context: Context) -> Figures:
    """Call a stage's function as a job file describes it."""
    function = load(job["function"])
    config_type = typing.get_type_hints(function)["config"]
    inputs = {name: Path(path) for name, path in job["inputs"].items()}
    figures = function(
        build(config_type, job["config"], job["function"]), inputs, Path(job["output"]), context
    )
    return typing.cast(Figures, figures or {})


def execute(
    step: Step,
    inputs: Mapping[str, Path],
    output: Path,
    launch: LaunchConfig,
    *,
    logs: Path,
    on_event: Callable[[dict[str, Any]], None],
) -> tuple[Artifact, bool]:
    """Make a step's artifact unless it is there already.

    Returns:
        The artifact, and whether it was computed now.

    Raises:
        SparringError: the stage failed, or another process is making the same artifact.
        Stopped: asked to stop; what is done stays.
    """
    given = digests(inputs)
    key = content_key(step, given, launch)
    artifact = artifacts.prepare(output, key)
    if artifact:
        return artifact, False
    started = time.time()
    place = _hosts(step, launch)
    inline = _is_inline(step, launch, place)
    with processes.stop_flag() if inline else nullcontext(lambda: False) as stopped:
        figures = (
            _run_inline(step, inputs, output, on_event=on_event, stopped=stopped)
            if inline
            else _run_ranks(step, inputs, output, launch, place, logs=logs, on_event=on_event)
        )
        if step.stage.finish:
            finish = load(step.stage.finish)
            figures |= finish(step.config, inputs, output, _local_context(step, output, on_event))
        facts = {
            "stage": step.stage.name,
            "version": step.stage.version,
            "packages": package_versions(
                step.stage, processes.python_of(launch.python, step.stage.name)
            ),
            "config": plain(step.config),
            "seed": step.seed,
            "inputs": given,
            "processes": place.total,
            "seconds": round(time.time() - started, 2),
            "figures": figures,
        }
        artifact = artifacts.complete(output, key, facts)
    if stopped():  # asked too late for the stage to notice, but not for the run
        raise Stopped("stopped; run the same command again to go on")
    return artifact, True


def _local_context(step: Step, output: Path, on_event: Callable[[dict[str, Any]], None]) -> Context:
    return Context(
        world=World(),
        work=output / artifacts.WORK,
        seed=step.seed,
        emit=lambda **event: on_event(event),
    )


def all_hosts(launch: LaunchConfig) -> Hosts:
    """Where stages of more than one rank run.

    Raises:
        SparringError: the hostfile or the allocation is missing or wrong.
    """
    return hosts.find(launch.processes, launch.hostfile, launch.slurm)


def _hosts(step: Step, launch: LaunchConfig) -> Hosts:
    alone = step.stage.light or step.stage.single
    return Hosts({"localhost": 1}) if alone else all_hosts(launch)


def _is_inline(step: Step, launch: LaunchConfig, place: Hosts) -> bool:
    chosen = step.stage.name in launch.inline and step.stage.name not in launch.python
    return step.stage.light or (chosen and place.reach == "here" and place.total == 1)


def _run_inline(
    step: Step,
    inputs: Mapping[str, Path],
    output: Path,
    *,
    on_event: Callable[[dict[str, Any]], None],
    stopped: Callable[[], bool],
) -> Figures:
    job = json.loads(write_job(step, inputs, output).read_text())
    return run_job(job, replace(_local_context(step, output, on_event), stopped=stopped))


def _devices(place: Hosts) -> dict[str, str]:
    """What keeps this host's choice of accelerators from the launcher, which makes its own."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {} if visible is None or place.reach != "here" else {processes.DEVICES: visible}


def _run_ranks(
    step: Step,
    inputs: Mapping[str, Path],
    output: Path,
    launch: LaunchConfig,
    place: Hosts,
    *,
    logs: Path,
    on_event: Callable[[dict[str, Any]], None],
) -> Figures:
    path = write_job(step, inputs, output)
    errors = output / artifacts.WORK / "errors"
    for old in errors.glob("rank*.txt"):
        old.unlink()
    driver = json.loads(path.read_text())["driver"]["name"]
    processes.run(
        hosts.command(processes.python_of(launch.python, step.stage.name), path.absolute(), place),
        log=logs / f"{step.name.replace('/', '-')}.log",
        errors=errors,
        environment={"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", **_devices(place)},
        on_event=on_event,
        advice=memory_advice(step.config),
        grace=launch.grace,
        lease=None
        if place.reach == "here"
        else Lease(path.with_name(LEASE), driver, place.names()),
    )
    result = output / artifacts.WORK / "result.json"
    if not result.is_file():
        raise SparringError(f"stage {step.name} ended without a result; its log is in {logs}")
    return typing.cast(Figures, json.loads(result.read_text()))
