"""Tracking: what a run writes, sent to TensorBoard, Weights & Biases or Trackio as it appears.

All that is sent is read from ``metrics.jsonl`` and manifests, which stay the truth: a run can be
sent later, or to one more tracker, and a tracker that fails costs no result.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sparring.launch import artifacts
from sparring.launch.artifacts import Artifact
from sparring.launch.errors import Stopped
from sparring.launch.metrics import read_metrics
from sparring.launch.trackers import Run, Tracker, start

Event = dict[str, Any]
_SENT_FILE = "sent.json"
_EVERY = 5.0  # seconds between two looks at a file that grows
_ROUND = re.compile(r"(iter|heldout)(\d+)/(.+)")


class Tracking:
    """The trackers of a run, and what they have already."""

    def __init__(
        self,
        sent: dict[str, Any],
        file: Path,
        note: Callable[[str], None],
    ) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._sent, self._file, self._note = sent, file, note
        self._lengths: Counter[str] = Counter()  # rows of a group's steps that have ended
        self._current: tuple[str, Path] | None = None
        self._looked = 0.0

    def add(self, name: str, tracker: Tracker) -> None:
        self._trackers[name] = tracker

    def begin(self, step: str, output: Path) -> None:
        """From now on `update` looks at this step."""
        self._current, self._looked = (step, output), time.monotonic()

    def update(self) -> None:
        """Send new rows, if it is time to look for some."""
        now = time.monotonic()
        if self._trackers and self._current and now - self._looked > _EVERY:
            self._looked = now
            self._send_rows(*self._current)
            artifacts.write_json(self._file, self._sent)

    def after(self, handler: Callable[[Event], None]) -> Callable[[Event], None]:
        """A handler of a stage's events that looks for new rows after another one."""

        def both(event: Event) -> None:
            handler(event)
            self.update()

        return both

    def end(self, artifact: Artifact | None) -> None:
        """Send what is new of the step, and the figures of what came of it."""
        if not self._trackers:
            return
        assert self._current, "no step has begun"
        step, output = self._current
        group, number = placed(step)
        self._lengths[group] += self._send_rows(step, output)
        figures = numbers(artifact.figures) if artifact else {}
        for name in list(self._trackers):
            entry = self._entry(name, step, output)
            if figures and not entry["figures"]:
                entry["figures"] = bool(self._log(name, f"summary/{group}", [(number, figures)]))
        artifacts.write_json(self._file, self._sent)

    def close(self) -> None:
        """Close the trackers and keep what was sent."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)
        if self._sent["steps"]:  # else nothing was to be sent
            artifacts.write_json(self._file, self._sent)

    def _send_rows(self, step: str, output: Path) -> int:
        """Send the rows that a tracker has not; returns how many there are."""
        places = (output / "metrics.jsonl", output / artifacts.WORK / "metrics.jsonl")
        path = next((path for path in places if path.is_file()), None)
        rows = [numbers(row) for row in read_metrics(path)] if path else []
        group, _ = placed(step)
        first = self._lengths[group]
        for name in list(self._trackers):
            entry = self._entry(name, step, output)
            fresh = [(first + n, rows[n]) for n in range(entry["rows"], len(rows))]
            entry["rows"] += self._log(name, group, fresh)
        return len(rows)

    def _entry(self, tracker: str, step: str, output: Path) -> dict[str, Any]:
        """What a tracker has of a step: nothing, if the step is made anew with other settings."""
        steps = self._sent["steps"].setdefault(tracker, {})
        key = artifacts.current_key(output)
        if step not in steps or steps[step]["key"] != key:
            steps[step] = {"key": key, "rows": 0, "figures": False}
        entry: dict[str, Any] = steps[step]
        return entry

    def _log(self, name: str, group: str, rows: Sequence[tuple[int, Mapping[str, float]]]) -> int:
        """Returns how many rows the tracker took."""
        for taken, (step, values) in enumerate(rows):
            if not self._guarded(name, partial(self._trackers[name].log, group, step, values)):
                return taken
        return len(rows)

    def _guarded(self, name: str, call: Callable[[], None]) -> bool:
        """Whether a tracker took it. One that fails is left out: it must not end hours of work."""
        try:
            call()
        except Stopped:  # SIGTERM came meanwhile
            raise
        except Exception as error:
            del self._trackers[name]
            self._note(
                f"{name} gets nothing more of this run, {type(error).__name__}: {error}; "
                f"`sparring track` sends the rest"
            )
            return False
        return True


@contextmanager
def tracking(
    names: Sequence[str],
    run: str,
    recipe: Mapping[str, Any],
    folder: Path,
    note: Callable[[str], None],
) -> Iterator[Tracking]:
    """The named trackers of a run.

    Args:
        names: of `TRACKERS`, or ``module:class`` that takes a `Run`.
        run: its name.
        recipe: its settings.
        folder: for what was sent and the trackers' own files; only made if something is tracked.
        note: told of trackers that fail.

    Raises:
        SparringError: a tracker is unknown, not installed or does not start, or another process
            sends what is in this folder.
    """
    if not names:
        yield Tracking({"steps": {}}, folder / _SENT_FILE, note)
        return
    with artifacts.locked(folder / ".lock", folder):
        file = folder / _SENT_FILE
        sent: dict[str, Any] = {"id": uuid.uuid4().hex, "steps": {}}
        if file.exists():
            sent = json.loads(file.read_text(encoding="utf-8"))
        else:
            artifacts.write_json(file, sent)
        told = Run(run, sent["id"], folder, recipe)
        found = Tracking(sent, file, note)
        try:
            for name in names:
                found.add(name, start(name, told))
            yield found
        finally:
            found.close()


def placed(step: str) -> tuple[str, int]:
    """Group and number of a step: what iterations repeat is one curve.

    "iter2/train" is number 2 of "train", "heldout2/evaluate" number 2 of "heldout/evaluate"; other
    folders, such as those of seeds and arms, are groups of their own.
    """
    found = _ROUND.fullmatch(step)
    if not found:
        return step, 0
    kind, number, rest = found.groups()
    return (rest if kind == "iter" else f"{kind}/{rest}"), int(number)


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among figures: of a section as section/name, of [value, low, high] the value.

    A "step" is not among them: it says where the others stand.
    """
    found: dict[str, float] = {}
    for name, value in figures.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": number for key, number in numbers(value).items()}
        elif isinstance(value, list):
            if len(value) == 3 and all(map(_is_number, value)):
                found[name] = value[0]
        elif _is_number(value):
            found[name] = value
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
