"""Make a run's steps by several processes of one machine, each with its share of the cores.

`sparring run` makes one step after the other, which leaves cores idle where steps are small:
networks of several seeds, samples of several arms. Here each lane takes the next step whose inputs
are there and that no other has. What is computed is the same: running it again goes on where it
was stopped, and `sparring run` finds the steps done and writes the report.

    python scripts/lanes.py confdiff-ala5 --lanes 2 --out runs/confdiff-ala5
    sparring run confdiff-ala5 --out runs/confdiff-ala5

Cores, and the devices of CUDA_VISIBLE_DEVICES if it is set, are dealt out to the lanes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from sparring.launch import artifacts, runs, stages
from sparring.launch.cli import find_recipe
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.progress import Reporter
from sparring.launch.runs import Pipeline
from sparring.launch.stages import Step

PAUSE = 1.0
"""Seconds between looks for a step while others make all that can be made."""


def work(pipeline: Pipeline, recipe: Any, out: Path, lane: int) -> None:
    """Make steps until all are done.

    Raises:
        SparringError: a step failed; those that do not need it are other lanes' to make.
    """
    reporter = Reporter()
    # Live bars of several processes would write over each other.
    reporter.console = Console(stderr=True, force_terminal=False, soft_wrap=True)
    (out / ".lanes").mkdir(parents=True, exist_ok=True)
    while True:
        plan = runs.plan(pipeline, recipe, out)
        if all(planned.state == "done" for planned in plan):
            return
        ready = [planned.step for planned in plan if planned.state == "to do"]
        if not any(_made(step, recipe, out, lane, reporter) for step in ready):
            time.sleep(PAUSE)


def _made(step: Step, recipe: Any, out: Path, lane: int, reporter: Reporter) -> bool:
    """Make a step, unless another lane does."""
    lock = FileLock(out / ".lanes" / f"{step.name.replace('/', '-')}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        inputs = {
            name: Path(source.removeprefix("path:")) if source.startswith("path:") else out / source
            for name, source in step.inputs.items()
        }
        reporter.start(f"lane {lane}: {step.name}")
        artifact, fresh = stages.execute(
            step, inputs, out / step.name, recipe.launch, logs=out / "logs", on_event=reporter.event
        )
        if fresh:
            reporter.stop(runs.describe(artifact))
        return True
    finally:
        lock.release()


def _share(values: list[str], lane: int, lanes: int) -> list[str]:
    return values[lane::lanes] or [values[lane % len(values)]]


def _lane(lane: int, lanes: int, path: Path, out: Path) -> None:
    cores = _share([str(core) for core in sorted(os.sched_getaffinity(0))], lane, lanes)
    os.sched_setaffinity(0, {int(core) for core in cores})
    os.environ["OMP_NUM_THREADS"] = str(len(cores))
    if devices := os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_share(devices.split(","), lane, lanes))
    try:
        with runs.sigterm_stops():
            work(*runs.load_recipe(path), out, lane)
    except SparringError as error:
        print(f"lane {lane}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(Stopped.exit_code)


def main() -> int:
    """Parse, start the lanes, wait; 0 if all steps are done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="name, or path of a TOML file")
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    options = parser.parse_args()
    if options.lanes < 1:
        parser.error(f"--lanes must be at least 1, not {options.lanes}")
    path = find_recipe(options.recipe)
    try:
        with artifacts.locked(options.out / ".lock", options.out):
            runs.claim(options.out, runs.load_recipe(path)[1])
            return run(path, options.out, options.lanes)
    except SparringError as error:
        sys.exit(f"error: {error}")


def run(path: Path, out: Path, count: int) -> int:
    """The lanes' worst exit code."""
    spawn = multiprocessing.get_context("spawn")
    lanes = [spawn.Process(target=_lane, args=(n, count, path, out)) for n in range(count)]
    try:
        with runs.sigterm_stops():
            for process in lanes:
                process.start()
            for process in lanes:
                process.join()
    except (KeyboardInterrupt, Stopped):
        for process in lanes:
            process.terminate()
            process.join()
    return max(process.exitcode or 0 for process in lanes)


if __name__ == "__main__":
    sys.exit(main())
