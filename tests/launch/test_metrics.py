"""metrics.jsonl: a line a step, readable after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparring.launch.errors import SparringError
from sparring.launch.metrics import MetricsFile, read_metrics


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path)
    for step in range(3):
        metrics.write(step=step, loss=1 / (step + 1))
    assert read_metrics(path) == [{"step": n, "loss": 1 / (n + 1)} for n in range(3)]


def test_a_truncated_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]
    MetricsFile(path, start=2).write(step=2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"ste\n{"step": 2}\n')
    with pytest.raises(SparringError, match=r"m\.jsonl:2: not JSON"):
        read_metrics(path)


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    metrics = MetricsFile(path)
    for step in range(5):
        metrics.write(step=step, try_=1)
    MetricsFile(path, start=3).write(step=3, try_=2)
    assert [(row["step"], row["try_"]) for row in read_metrics(path)] == [
        (0, 1),
        (1, 1),
        (2, 1),
        (3, 2),
    ]


def test_a_new_start_drops_all(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    MetricsFile(path).write(step=0)
    MetricsFile(path)
    assert read_metrics(path) == []
