"""Trackers as a package of somebody's own would bring them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import ClassVar

from sparring.launch.trackers import Run


class Recorder:
    """Keeps what it gets, until it breaks."""

    logged: ClassVar[list[tuple[str, int, dict[str, float]]]] = []
    runs: ClassVar[list[Run]] = []
    breaks_at: ClassVar[int] = -1

    def __init__(self, run: Run) -> None:
        Recorder.runs.append(run)

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if len(Recorder.logged) == Recorder.breaks_at:
            raise ConnectionError("the service is gone")
        Recorder.logged.append((group, step, dict(values)))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class Hanging(Recorder):
    """Takes the first row, and never answers again."""

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        super().log(group, step, values)
        threading.Event().wait()


class Unwilling:
    """Does not start."""

    def __init__(self, run: Run) -> None:
        raise RuntimeError("no login")


class Missing:
    """Needs what is not installed."""

    def __init__(self, run: Run) -> None:
        import no_such_package  # noqa: F401
