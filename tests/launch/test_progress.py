"""Progress: what is left of a stage that goes on from an earlier run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from sparring.launch import progress
from sparring.launch.progress import Reporter


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(reporter: Reporter) -> list[str]:
    assert isinstance(reporter.console.file, io.StringIO)
    return reporter.console.file.getvalue().splitlines()


def test_what_was_kept_does_not_count_as_speed(clock: Clock) -> None:
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), width=200)
    reporter.start("train")
    clock.now += 21
    reporter.event({"done": 900, "total": 1000, "unit": "steps"})
    clock.now += 30
    reporter.event({"done": 910, "total": 1000, "unit": "steps"})
    assert lines(reporter) == [
        "    train: 900/1000 steps, 21 s",
        "    train: 910/1000 steps, 51 s, 270 s left",
    ]


def test_a_rank_that_reports_later_brings_its_own_kept_rows(clock: Clock) -> None:
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), width=200)
    reporter.start("generate")
    reporter.event({"done": 0, "total": 1000, "unit": "rows", "rank": 0})
    clock.now += 10
    reporter.event({"done": 400, "total": 1000, "unit": "rows", "rank": 1})
    clock.now += 20
    reporter.event({"done": 100, "total": 1000, "unit": "rows", "rank": 0})
    assert lines(reporter) == ["    generate: 500/1000 rows, 30 s, 100 s left"]


def test_a_bar_starts_at_what_was_kept() -> None:
    reporter = Reporter()
    reporter.console = Console(file=io.StringIO(), force_terminal=True)
    reporter.start("train")
    assert reporter._live is not None
    reporter.event({"done": 900, "total": 1000, "unit": "steps"})
    (task,) = reporter._live.tasks
    assert (task.completed, task.total, task.speed) == (900, 1000, None)
    reporter.event({"done": 910, "total": 1000, "unit": "steps"})
    assert task.completed == 910
    reporter.stop("done")
