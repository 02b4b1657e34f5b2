"""Tracking: what a run writes, sent to TensorBoard, Weights & Biases or Trackio as it appears.

All that is sent is read from ``metrics.jsonl`` and manifests, which stay the truth: a run can be
sent later, or to one more tracker, and a tracker that fails costs no result.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sparring.launch import artifacts
from sparring.launch.artifacts import Artifact
from sparring.launch.metrics import read_metrics
from sparring.launch.trackers import Run, Tracker, start

_SENT_FILE = "sent.json"
_EVERY = 5.0  # seconds between two looks at a file that grows
_PATIENCE = 60.0  # seconds that the end of a run waits for trackers
_LATER = "`sparring track` sends the rest"
_ROUND = re.compile(r"(iter|heldout)(\d+)/(.+)")


class Tracking:
    """Sends what a run writes, in a thread of its own: a tracker that hangs holds up no work."""

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        sent: dict[str, Any],
        file: Path,
        note: Callable[[str], None],
    ) -> None:
        self._trackers = dict(trackers)
        self._sent, self._file, self._note = sent, file, note
        self._lengths: Counter[str] = Counter()  # rows of a group's steps that have ended
        self._current: tuple[str, Path] | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        if trackers:
            self._thread.start()

    def begin(self, step: str, output: Path) -> None:
        """From now on this step's rows are sent as they are written."""
        self._calls.put(partial(self._begin, step, output))

    def end(self, artifact: Artifact | None) -> None:
        """Send the rest of the step's rows, and the figures of what came of it."""
        self._calls.put(partial(self._end, artifact))

    def close(self, patience: float | None) -> None:
        """Send the rest and close the trackers, in so many seconds at most."""
        if not self._thread.ident:
            return
        self._calls.put(None)
        self._thread.join(patience)
        if self._thread.is_alive():
            self._note(
                f"{', '.join(list(self._trackers))} did not take all in {patience:g} s; {_LATER}"
            )

    # What follows runs in the thread.

    def _work(self) -> None:
        try:
            while True:
                try:
                    call = self._calls.get(timeout=_EVERY)
                except queue.Empty:
                    call = self._look
                if call is None:
                    break
                call()
                self._remember()
            self._look()
            self._remember()
        except Exception as error:  # of files; those of trackers are caught one by one
            self._note(f"metrics are no longer sent, {type(error).__name__}: {error}; {_LATER}")
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.close)

    def _begin(self, step: str, output: Path) -> None:
        self._current = step, output

    def _look(self) -> None:
        if self._current:
            self._send_rows(*self._current)

    def _end(self, artifact: Artifact | None) -> None:
        assert self._current, "no step has begun"
        step, output = self._current
        self._current = None
        group, number = placed(step)
        self._lengths[group] += self._send_rows(step, output)
        figures = numbers(artifact.figures) if artifact else {}
        for name in list(self._trackers):
            entry = self._entry(name, step, output)
            if figures and not entry["figures"]:
                entry["figures"] = bool(self._log(name, f"summary/{group}", [(number, figures)]))

    def _remember(self) -> None:
        """Keep what was sent, once the trackers have it on disk."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, tracker.flush)
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
        except Exception as error:
            del self._trackers[name]
            self._note(
                f"{name} gets nothing more of this run, {type(error).__name__}: {error}; {_LATER}"
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
    *,
    patience: float | None = _PATIENCE,
) -> Iterator[Tracking]:
    """The named trackers of a run.

    Args:
        names: of `TRACKERS`, or ``module:class`` that takes a `Run`.
        run: its name.
        recipe: its settings.
        folder: for what was sent and the trackers' own files; only made if something is tracked.
        note: told of trackers that fail, in another thread.
        patience: seconds to wait for them at the end; None: as long as they take.

    Raises:
        SparringError: a tracker is unknown, not installed or does not start, or another process
            sends what is in this folder.
    """
    if not names:
        yield Tracking({}, {"steps": {}}, folder / _SENT_FILE, note)
        return
    with artifacts.locked(folder / ".lock", folder):
        file = folder / _SENT_FILE
        sent: dict[str, Any] = {"id": uuid.uuid4().hex, "steps": {}}
        if file.exists():
            sent = json.loads(file.read_text(encoding="utf-8"))
        else:
            artifacts.write_json(file, sent)
        told = Run(run, sent["id"], folder, recipe)
        with ExitStack() as undo:
            opened: dict[str, Tracker] = {}
            for name in names:
                opened[name] = start(name, told)
                undo.callback(opened[name].close)
            undo.pop_all()
        found = Tracking(opened, sent, file, note)
        try:
            yield found
        finally:
            found.close(patience)


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
