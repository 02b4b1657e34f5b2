"""Start a worker script on several gloo ranks of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparring.launch.processes import free_port


def launch(worker: Path, world: int, folder: Path, *arguments: str) -> Any:
    """Run `worker OUT *arguments` once a rank; returns what rank 0 wrote to OUT as JSON."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    out = folder / "out.json"
    logs = [(folder / f"rank{rank}.log").open("w") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(out), *arguments],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    try:
        codes = [process.wait(timeout=1200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
        for log in logs:
            log.close()
    assert codes == [0] * world, (folder / "rank0.log").read_text()[-3000:]
    return json.loads(out.read_text())
