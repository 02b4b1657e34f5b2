"""`sparring` in a forked process, so that tests of the command pay for importing torch once."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PRELOAD = [
    "accelerate",
    "matplotlib.figure",
    "peft",
    "pydantic",
    "sparring.alignment.engines",
    "sparring.alignment.evaluation",
    "sparring.alignment.extrapolation",
    "sparring.alignment.generate",
    "sparring.alignment.pairing",
    "sparring.alignment.pipeline",
    "sparring.alignment.reference",
    "sparring.alignment.results",
    "sparring.alignment.train",
    "sparring.launch.cli",
    "transformers.generation",
    "transformers.models.llama.modeling_llama",
    "tyro",
]
_TOUCHES = ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink")


class _Stream:
    """Standard output as it is when something is written."""

    def write(self, text: str) -> None:
        sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()


class _Touches:
    """Counts what Python does to the files of each unfinished step, and may kill at one."""

    def __init__(self, run: Path, kill_at: tuple[str, int] | None) -> None:
        self.run, self.kill_at = run, kill_at
        self.counts: Counter[str] = Counter()
        self._finished: set[str] = set()

    def __call__(self, event: str, values: tuple[Any, ...]) -> None:
        if event not in _TOUCHES:
            return
        path = values[1] if event in ("os.rename", "os.symlink") else values[0]
        if not isinstance(path, (str, Path)) or not Path(path).is_relative_to(self.run):
            return
        relative = Path(path).relative_to(self.run)
        for folder in map(str, relative.parents):
            if folder in self._finished:
                continue
            self.counts[folder] += 1
            if self.kill_at == (folder, self.counts[folder]):
                os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and relative.name == "manifest.json":
            self._finished.add(str(relative.parent))


def command(
    arguments: list[str],
    streams: str,
    run: str | None = None,
    kill_at: tuple[str, int] | None = None,
    touches: str | None = None,
) -> None:
    """Run the command line and end with its exit code.

    Args:
        streams: files with the suffixes .out and .err get what it prints.
        run: folder of the run, of which touches are counted.
        kill_at: folder of a step below `run` and n: kill -9 just before its n-th touch.
        touches: JSON file that gets the number of touches of each folder.
    """
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{streams}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # DeepSpeed took hold of the standard output at the moment of its import.
    for handler in logging.getLogger("DeepSpeed").handlers:
        handler.setStream(_Stream())  # type: ignore[attr-defined]
    counter = _Touches(Path(run or "/"), kill_at)
    if run:
        sys.addaudithook(counter)
    from sparring.launch import cli

    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    if touches:
        Path(touches).write_text(json.dumps(counter.counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
