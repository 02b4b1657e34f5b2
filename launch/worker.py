"""One rank of a stage: ``python -m sparring.launch.worker JOB.json``."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from filelock import FileLock, Timeout

from sparring.launch import artifacts, lease, processes
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.stages import LEASE, Context, run_job


def main(arguments: list[str]) -> int:
    """Run the job file; keep the exception where the driver finds it when it fails."""
    # DeepSpeed's launcher puts --local_rank=N before or after a module's own arguments.
    path = Path(next(a for a in arguments if not a.startswith("--")))
    world, work = World.from_environment(), path.parent
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
        lease.follow(work / LEASE, driver["name"])
    lock = FileLock(work.parent / f".rank{world.rank}.lock")
    try:
        try:
            lock.acquire(timeout=15)
        except Timeout:
            raise SparringError(
                f"another process is still writing {work.parent}; wait for it or stop it"
            ) from None
        with processes.stop_flag() as stopped:
            context = Context(world=world, work=work, seed=job["seed"], stopped=stopped)
            figures = run_job(job, context)
        if world.rank == 0:
            artifacts.write_json(work / "result.json", figures)
    except Exception as error:
        processes.record_error(work / "errors", world.rank, error)
        if not isinstance(error, SparringError):
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    processes.leave(main(sys.argv[1:]))
