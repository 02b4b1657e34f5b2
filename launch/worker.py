"""One rank of a stage: ``python -m sparring.launch.worker JOB.json``.

Where there are several, the process that the launcher started waits for one of its own that does
the work: a rank that is killed (by the kernel when memory runs out, by NCCL's watchdog) leaves no
message itself, and the ranks of other hosts would wait for it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from sparring.launch import artifacts, lease, processes
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.processes import World
from sparring.launch.stages import LEASE, Context, run_job


def main(arguments: list[str]) -> int:
    """Run the job file on this rank; returns the exit code."""
    # DeepSpeed's launcher puts --local_rank=N before or after a module's own arguments.
    path = Path(next(a for a in arguments if not a.startswith("--")))
    world = World.from_environment()
    processes.restore_devices()
    return work(path, world) if world.size == 1 else watched(path, world)


def watched(path: Path, world: World) -> int:
    """Do the work in a process of its own, and keep a record if it is killed."""
    sys.stdout.flush()
    worker = os.fork()
    if worker == 0:
        processes.leave(work(path, world))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # meant for the work, which is told itself
    with _signs(path, world.rank):
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    if code < 0:
        death = SparringError(
            f"rank {world.rank} on {socket.gethostname()} was {processes.killed(-code)}"
        )
        processes.record_error(path.parent / "errors", world.rank, death)
        return 1
    return code


def _signs(path: Path, rank: int) -> AbstractContextManager[None]:
    """Shows a driver on another host that this rank is there."""
    try:
        driver = json.loads(path.read_text())["driver"]
    except FileNotFoundError:  # the work itself says so
        return nullcontext()
    if driver["host"] == socket.gethostname():
        return nullcontext()
    return lease.signs(path.parent, driver["name"], rank)


def work(path: Path, world: World) -> int:
    """Run the job file; keep the exception where the driver finds it when it fails."""
    folder = path.parent
    try:
        job = json.loads(path.read_text())
    except FileNotFoundError:
        processes.emit(
            error=f"rank {world.rank} on {socket.gethostname()} finds no {path}: the folder of a "
            "run must be on a file system that all hosts see under the same path"
        )
        return 1
    driver = job["driver"]
    here = processes.watch_driver(driver["pid"], driver["host"])
    processes.emit(pid=os.getpid(), rank=world.rank, here=here)
    if not here:
        lease.follow(folder / LEASE, driver["name"])
    lock = FileLock(folder.parent / f".rank{world.rank}.lock")
    try:
        try:
            lock.acquire(timeout=15)
        except Timeout:
            raise SparringError(
                f"another process is still writing {folder.parent}; wait for it or stop it"
            ) from None
        with processes.stop_flag() as stopped:
            context = Context(world=world, work=folder, seed=job["seed"], stopped=stopped)
            figures = run_job(job, context)
        if world.rank == 0:
            artifacts.write_json(folder / "result.json", figures)
    except Stopped as error:
        print(error, file=sys.stderr)
        processes.emit(stopped=world.rank)
        # By any other code DeepSpeed's launcher would take the ranks that still save for lost.
        return error.exit_code if world.size == 1 else 0
    except Exception as error:
        processes.record_error(folder / "errors", world.rank, error)
        if not isinstance(error, SparringError):
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    processes.leave(main(sys.argv[1:]))
