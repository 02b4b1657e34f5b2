"""Metrics: one JSON object a line, the source of truth from which everything else is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.launch.errors import SparringError


class MetricsFile:
    """Appends rows to a ``metrics.jsonl``; on resuming, rows from `start` on are dropped first."""

    def __init__(self, path: Path, *, start: int = 0, counter: str = "step") -> None:
        rows = [row for row in read_metrics(path) if row[counter] < start] if path.exists() else []
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        self._path = path

    def write(self, **row: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """All rows of a metrics file; a last line cut short by a crash is left out.

    Raises:
        SparringError: a line in the middle is not JSON.
    """
    rows: list[Mapping[str, Any]] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise SparringError(f"{path}:{number}: not JSON: {error}") from None
    return rows
