"""Trackers: where numbers of a run can be looked at while it goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sparring.launch.errors import SparringError
from sparring.launch.stages import load

_PROJECT = "sparring"


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a run."""

    name: str
    id: str
    """Stays when the run is resumed."""
    folder: Path
    """For the tracker's own files."""
    recipe: Mapping[str, Any]


class Tracker(Protocol):
    """Takes numbers by group and step."""

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None:
        """What was logged is to survive the end of this process."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder, for ``tensorboard --logdir``."""

    def __init__(self, run: Run) -> None:
        from tensorboard.summary import Writer

        self._writer = Writer(str(run.folder / "tensorboard"))

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases; project, mode and so on come from its own variables (WANDB_...)."""

    def __init__(self, run: Run) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=dict(run.recipe),
            settings=wandb.Settings(console="off", silent=True),  # outputs have their own logs
        )
        self._groups: set[str] = set()

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if group not in self._groups:
            # Its own counter must not go back, which the steps of several groups do.
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
            self._groups.add(group)
        self._run.log(_flat(group, step, values))

    def flush(self) -> None:
        """Its own process has it."""

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, Hugging Face's local tracker; its variables (TRACKIO_...) say where."""

    def __init__(self, run: Run) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
                name=f"{run.name}-{run.id[:6]}",  # it has no other identity
                resume="allow",
                config=dict(run.recipe),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log(_flat(group, step, values))

    def flush(self) -> None:
        """It writes every half second."""

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


TRACKERS: Mapping[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def _flat(group: str, step: int, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in {**values, "step": step}.items()}


def start(name: str, run: Run) -> Tracker:
    """The tracker of this name, or of a ``module:class`` that takes a `Run`.

    Raises:
        SparringError: it is unknown, not installed or does not start.
    """
    if name not in TRACKERS and ":" not in name:
        raise SparringError(
            f"unknown tracker {name!r}; known are {', '.join(TRACKERS)}, or your own module:class"
        )
    make: Callable[[Run], Tracker] = TRACKERS[name] if name in TRACKERS else load(name)
    try:
        return make(run)
    except ImportError as error:
        raise SparringError(f'{name}: {error}; pip install "sparring[track]"') from error
    except Exception as error:
        raise SparringError(f"{name} does not start: {type(error).__name__}: {error}") from error
