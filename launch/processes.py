"""Processes: how a stage's ranks are started, watched and stopped.

A stage is SPMD. One rank runs as one process; several are started by DeepSpeed's own launcher.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sparring.launch.errors import SparringError, Stopped

EVENT = "@sparring "
_GRACE = 60.0  # seconds a stage has to save a checkpoint after SIGTERM


@dataclass(frozen=True)
class World:
    """This process among those of its stage."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @staticmethod
    def from_environment() -> World:
        get = os.environ.get
        return World(int(get("RANK", 0)), int(get("WORLD_SIZE", 1)), int(get("LOCAL_RANK", 0)))


def emit(**event: Any) -> None:
    """Tell the driver something (progress, a note); plain JSON on standard output."""
    print(EVENT + json.dumps(event), flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(python: str, job: Path, ranks: int) -> list[str]:
    """The command line that runs a job file on this host."""
    worker = ["sparring.launch.worker", str(job)]
    if ranks == 1:
        return [python, "-m", *worker]
    launcher = [python, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null"]
    return [
        *launcher,
        "--num_gpus",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        *worker,
    ]


def watch_driver(pid: int, host: str) -> None:
    """End this process when its driver on the same host is gone, so that no orphan writes on."""
    if host != socket.gethostname():
        return

    def watch() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and the first Ctrl-C into a flag that a loop asks for between steps."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:  # twice: at once
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reader(
    process: subprocess.Popen[str], log: Path, on_event: Callable[[dict[str, Any]], None]
) -> None:
    assert process.stdout is not None
    with process.stdout, log.open("a", encoding="utf-8") as file:
        for line in process.stdout:
            if line.startswith(EVENT):
                on_event(json.loads(line.removeprefix(EVENT)))
            else:
                file.write(line)
                file.flush()


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def run(
    arguments: list[str],
    *,
    log: Path,
    errors: Path,
    environment: Mapping[str, str],
    on_event: Callable[[dict[str, Any]], None],
) -> None:
    """Run a stage's processes to the end; their output goes to `log`, their events to `on_event`.

    Raises:
        SparringError: a rank failed; the message is that of the rank that failed first.
        Stopped: interrupted (Ctrl-C, SIGTERM) after the stage saved what it had.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,
    )
    reader = threading.Thread(target=_reader, args=(process, log, on_event), daemon=True)
    reader.start()
    try:
        code = process.wait()
    except (KeyboardInterrupt, Stopped):
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            process.wait()
        raise Stopped("stopped; run the same command again to go on") from None
    finally:
        _signal_group(process, signal.SIGKILL)
        reader.join(timeout=5)
    if code == Stopped.exit_code:
        raise Stopped("stopped; run the same command again to go on")
    if code:
        raise SparringError(_failure(code, log, errors))


def record_error(errors: Path, rank: int, error: BaseException) -> None:
    """Keep a rank's last exception where the driver finds it."""
    import traceback

    errors.mkdir(parents=True, exist_ok=True)
    kind = "user" if isinstance(error, SparringError) else "internal"
    text = "".join(traceback.format_exception(error))
    record = {"kind": kind, "message": str(error), "traceback": text, "time": time.time()}
    (errors / f"rank{rank}.txt").write_text(json.dumps(record))


def _failure(code: int, log: Path, errors: Path) -> str:
    records = [(json.loads(path.read_text()), path.stem) for path in errors.glob("rank*.txt")]
    if not records:
        ending = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the stage {ending} and left no message; its output is in {log}"
    first, rank = min(records, key=lambda item: item[0]["time"])
    if first["kind"] == "user":
        return str(first["message"])
    last = first["traceback"].strip().splitlines()[-1]
    return f"{rank} failed: {last}\nThe traceback is in {errors / rank}.txt, the output in {log}"


def python_of(choice: Mapping[str, str], stage: str) -> str:
    """The interpreter that a recipe names for a stage, or this one."""
    chosen = choice.get(stage, sys.executable)
    if not Path(chosen).exists():
        raise SparringError(f"launch.python.{stage}: {chosen} does not exist")
    return chosen
