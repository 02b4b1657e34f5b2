"""Progress for people: a live bar on a terminal, plain lines elsewhere, nothing with --json."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Shows the steps of a run. Several ranks report the same total; their counts are added."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._done: dict[int, int] = {}
        self._last = 0.0
        self._started = 0.0
        self._kept = 0
        self._kept_at = 0.0

    def start(self, label: str) -> None:
        self._label, self._done, self._last, self._started = label, {}, time.time(), time.time()
        if self.console.is_terminal and not self.console.quiet:
            self._live = Progress(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._live.start()
            self._task = self._live.add_task(label, total=None, unit="")

    def event(self, event: dict[str, Any]) -> None:
        if "note" in event:
            self.note(event["note"])
        if "done" not in event:
            return
        rank = event.get("rank", 0)
        first = rank not in self._done
        self._done[rank] = event["done"]
        done, total, unit = sum(self._done.values()), event["total"], event.get("unit", "")
        now = time.time()
        if first:  # most of it may have been kept from an earlier run, so it tells no speed
            self._kept, self._kept_at = done, now
        if self._live is not None and self._task is not None:
            if first:
                self._live.reset(self._task, completed=done)
            self._live.update(self._task, completed=done, total=total, unit=unit)
        elif now - self._last > 20:
            self._last = now
            line = f"    {self._label}: {done}/{total} {unit}, {now - self._started:.0f} s"
            if done > self._kept:
                left = (now - self._kept_at) / (done - self._kept) * (total - done)
                line += f", {left:.0f} s left"
            self.console.print(line)

    def note(self, text: str) -> None:
        self.console.print(f"    {self._label}: {text}", style="yellow", markup=False)

    def stop(self, result: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.console.print(f"  {self._label:<22} {result}", markup=False)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
