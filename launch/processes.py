"""Processes: how a stage's ranks are started, watched and stopped.

A stage is SPMD. One rank runs as one process; several are started as `launch.hosts` says.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

from sparring.launch.errors import SparringError, Stopped
from sparring.launch.lease import RENEWED, Lease

EVENT = "@sparring "
DEVICES = "SPARRING_VISIBLE_DEVICES"
_GRACE = 60.0  # seconds that the other ranks have to end by themselves after one has failed
_START = 300.0  # seconds the ranks of other hosts have to be there
# Of torch on an accelerator and of `killed`, of Python, and of torch on a CPU.
_NO_MEMORY = ("out of memory", "MemoryError", "can't allocate memory")


@dataclass(frozen=True)
class World:
    """This process among those of its stage."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Ranks on this host."""

    @staticmethod
    def from_environment() -> World:
        def number(name: str, otherwise: int) -> int:
            return int(os.environ.get(name, otherwise))

        size = number("WORLD_SIZE", 1)
        local_size = number("LOCAL_WORLD_SIZE", number("LOCAL_SIZE", size))
        return World(number("RANK", 0), size, number("LOCAL_RANK", 0), local_size)

    def sharing(self, devices: int) -> World | None:
        """This process among those with `devices` accelerators each: of as many neighbours on a
        host the first takes all of theirs, and the others have nothing to do (None). A rank without
        others takes what it needs.

        Raises:
            SparringError: the ranks of this host cannot be grouped so.
        """
        if self.size == 1:
            return self
        if self.local_size % devices:
            raise SparringError(
                f"devices = {devices} does not divide the {self.local_size} ranks of a host; "
                "change it, or launch.processes (the hostfile's slots)"
            )
        if self.local_rank % devices:
            return None
        of = (self.rank, self.size, self.local_rank, self.local_size)
        return World(*(number // devices for number in of))


def emit(**event: Any) -> None:
    """Tell the driver something (progress, a note); plain JSON on standard output."""
    sys.stdout.flush()
    # One write: ranks share the pipe, and the two of `print` (text, newline) get mixed up there.
    os.write(sys.stdout.fileno(), f"{EVENT}{json.dumps(event)}\n".encode())


def restore_devices() -> None:
    """Undo that DeepSpeed's launcher numbers a host's accelerators from 0, whichever are ours."""
    visible = os.environ.pop(DEVICES, None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` would, but without taking the interpreter down.

    Gloo's threads may still let go of the last operation's tensors then, and abort a rank that has
    done all of its work (pytorch/pytorch pull request 179291).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def watch_driver(pid: int, host: str) -> bool:
    """End this process when its driver on the same host is gone, so that no orphan writes on.

    Returns:
        Whether the driver is on this host.
    """
    if host != socket.gethostname():
        return False

    def watch() -> None:
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    return True


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


class _Reader(threading.Thread):
    """Reads what a stage's processes write, until the last of them has ended."""

    def __init__(
        self, output: IO[str], log: Path, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        super().__init__(daemon=True)
        self.ranks: list[int] = []
        """Process ids of the ranks on this host."""
        self.up: set[int] = set()
        """Ranks that have started, on any host."""
        self.last = ""
        """What was written last."""
        self.error = ""
        """What a rank told that could not write it to the folder of errors."""
        self.stopped = False
        """Whether a rank was asked to stop, and did."""
        self._output, self._log, self._on_event = output, log, on_event
        self.start()

    def run(self) -> None:
        with self._output, self._log.open("a", encoding="utf-8") as file:
            for line in self._output:
                # Another rank may have left a line without its end before the event.
                text, _, event = line.partition(EVENT)
                try:
                    told = json.loads(event) if event else {}
                except json.JSONDecodeError:
                    text, told = line, {}
                if text:
                    file.write(text)
                    file.flush()
                    self.last = text.strip() or self.last
                if "pid" in told:
                    self.up.add(told["rank"])
                    self.ranks += [told["pid"]] if told["here"] else []
                elif "error" in told:
                    self.error = self.error or told["error"]
                elif "stopped" in told:
                    self.stopped = True
                elif told:
                    self._on_event(told)


def _signal(number: int, *pids: int) -> None:
    """Signal processes; a negative id is that of a group."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def run(
    arguments: list[str],
    *,
    log: Path,
    errors: Path,
    environment: Mapping[str, str],
    on_event: Callable[[dict[str, Any]], None],
    advice: str = "",
    grace: float = 60.0,
    lease: Lease | None = None,
) -> None:
    """Run a stage's processes to the end; their output goes to `log`, their events to `on_event`.

    Asked to stop, ranks have `grace` seconds to save. Those on other hosts are told by `lease` what
    those here learn from signals. `advice` is given where memory ran out.

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
    assert process.stdout is not None
    reader = _Reader(process.stdout, log, on_event)
    try:
        code = _wait(process, lease, reader, errors)
    except (KeyboardInterrupt, Stopped):
        # The ranks alone: DeepSpeed's launcher dies of the signal at once, or kills them too soon.
        if lease:
            lease.renew("stop")
        _signal(signal.SIGTERM, *(reader.ranks or ([] if lease else [-process.pid])))
        reader.join(grace)
        raise Stopped("stopped; run the same command again to go on") from None
    finally:
        if lease:
            lease.renew("end")
        _signal(signal.SIGKILL, -process.pid)
        process.wait()
        reader.join(timeout=5)
    if code == Stopped.exit_code or (code == 0 and reader.stopped):
        raise Stopped("stopped; run the same command again to go on")
    if code:
        missing = lease.missing(reader.up) if lease else []
        text = _failure(code, log, errors, reader, missing)
        ran_out = any(word in text for word in _NO_MEMORY)
        raise SparringError(f"{text}\n{advice}".rstrip() if ran_out else text)


def _wait(
    process: subprocess.Popen[str], lease: Lease | None, reader: _Reader, errors: Path
) -> int:
    """Wait for the launchers of all hosts; a rank that failed takes the others down.

    DeepSpeed's launcher does so too, but gives each rank of its host half a minute, one by one.
    """
    started, failed = time.monotonic(), None
    while True:
        try:
            return process.wait(RENEWED)
        except subprocess.TimeoutExpired:
            if lease:
                lease.renew()
                if lost := lease.lost():
                    reader.error = reader.error or _lost(lost)
        now = time.monotonic()
        if failed is None and any(errors.glob("rank*.txt")):
            failed = now
        late = lease and now - started > _START and lease.missing(reader.up)
        if late or reader.error or (failed is not None and now - failed > _GRACE):
            if lease:
                lease.renew("end")
            _signal(signal.SIGKILL, *reader.ranks, -process.pid)


def _lost(hosts: Sequence[str]) -> str:
    return (
        f"no sign of life from {', '.join(hosts)} any more: switched off, or cut off from the "
        "network or from the run's folder; the same command goes on when it is back"
    )


def killed(number: int) -> str:
    """What is said of a process that died of a signal."""
    hint = "; the host may have run out of memory" if number == signal.SIGKILL else ""
    return f"killed by {signal.Signals(number).name}{hint}"


def record_error(errors: Path, rank: int, error: BaseException) -> None:
    """Keep a rank's last exception where the driver finds it."""
    import traceback

    errors.mkdir(parents=True, exist_ok=True)
    kind = "user" if isinstance(error, SparringError) else "internal"
    text = "".join(traceback.format_exception(error))
    record = {"kind": kind, "message": str(error), "traceback": text, "time": time.time()}
    (errors / f"rank{rank}.txt").write_text(json.dumps(record))


def _failure(
    code: int, log: Path, errors: Path, reader: _Reader, missing: Sequence[str] = ()
) -> str:
    records = [(json.loads(path.read_text()), path.stem) for path in errors.glob("rank*.txt")]
    if not records:
        if reader.error:
            return reader.error
        if missing and reader.up:
            return f"no rank was started on {', '.join(missing)}; the output is in {log}"
        ending = f"was {killed(-code)}" if code < 0 else f"ended with exit code {code}"
        last = f"; its last line is: {reader.last}" if reader.last else ""
        return f"the stage {ending} and left no message; its output is in {log}{last}"
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
