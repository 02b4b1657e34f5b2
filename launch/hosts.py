"""Hosts: the machines that a stage's ranks run on, and the command that starts all of them.

Ranks are children of DeepSpeed's launcher, one on each host. Several hosts are reached by pdsh,
over ssh, or by srun inside a SLURM allocation. All see the run's folder under the same path.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparring.launch.errors import SparringError
from sparring.launch.processes import DEVICES, free_port

WORKER = "sparring.launch.worker"
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[1-9]\d*)")


@dataclass(frozen=True)
class Hosts:
    """How many ranks on which host, in the order of the ranks."""

    ranks: Mapping[str, int]
    reach: Literal["here", "pdsh", "srun"] = "here"
    hostfile: Path | None = None

    @property
    def total(self) -> int:
        return sum(self.ranks.values())

    def names(self) -> list[str]:
        """The host of every rank."""
        return [host for host, ranks in self.ranks.items() for _ in range(ranks)]


def find(processes: int, hostfile: str = "", slurm: bool = False) -> Hosts:
    """The hosts that a recipe's [launch] asks for.

    Raises:
        SparringError: the hostfile or the allocation is missing or wrong, or pdsh is not installed.
    """
    if hostfile:
        _installed("pdsh", "launch.hostfile")
        path = Path(hostfile).expanduser().absolute()
        return Hosts(read_hostfile(path), "pdsh", path)
    if slurm:
        _installed("srun", "launch.slurm")
        return Hosts(dict.fromkeys(_allocation(), processes), "srun")
    return Hosts({"localhost": processes})


def _installed(program: str, key: str) -> None:
    if not shutil.which(program):
        raise SparringError(f"{key} starts ranks with {program}, which is not on PATH; install it")


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks by host of a DeepSpeed hostfile: a line is ``NAME slots=RANKS``; # begins a comment.

    Raises:
        SparringError: no such file, a line of another form, a host twice, or no host.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SparringError(f"launch.hostfile: cannot read {path}: {error.strerror}") from None
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise SparringError(
                f"{path}, line {number}: {text!r} is not of the form 'NAME slots=RANKS', "
                "such as 'node1 slots=8'"
            )
        if match["host"] in found:
            raise SparringError(f"{path}, line {number}: {match['host']} is there twice")
        found[match["host"]] = int(match["slots"])
    if not found:
        raise SparringError(f"{path} names no host; a line is 'NAME slots=RANKS'")
    return found


def _allocation() -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise SparringError(
            "launch.slurm: this is not inside a SLURM allocation (SLURM_JOB_NODELIST is not set); "
            "start it from sbatch or salloc"
        )
    shown = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False
    )
    if shown.returncode or not shown.stdout.split():
        raise SparringError(f"scontrol does not know the nodes {nodes}: {shown.stderr.strip()}")
    return shown.stdout.split()


def command(python: str, job: Path, hosts: Hosts) -> list[str]:
    """The command line, on this host, that runs a job file on all ranks."""
    worker = [WORKER, str(job)]
    if hosts.reach == "srun":
        return _srun(python, worker, hosts)
    if hosts.reach == "here" and hosts.total == 1:
        return [python, "-m", *worker]
    launcher = [python, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())]
    if hosts.reach == "pdsh":
        # -N: pdsh must not put the host's name before lines. A single host may be another one.
        launcher += ["--hostfile", str(hosts.hostfile), "--launcher_args=-N", "--force_multi"]
    else:
        launcher += ["--hostfile", "/dev/null", "--num_gpus", str(hosts.total)]
    return [*launcher, "--module", *worker]


def _srun(python: str, worker: list[str], hosts: Hosts) -> list[str]:
    """One task a node: DeepSpeed's launcher, whose own way to use srun cannot run modules."""
    world = {host: list(range(ranks)) for host, ranks in hosts.ranks.items()}
    launcher = [
        python,
        *("-u", "-m", "deepspeed.launcher.launch"),
        "--world_info=" + base64.urlsafe_b64encode(json.dumps(world).encode()).decode(),
        f"--master_addr={next(iter(hosts.ranks))}",
        f"--master_port={free_port()}",
        "--module",
        *worker,
    ]
    at = launcher.index("--module")
    text = f"{shlex.join(launcher[:at])} --node_rank=$SLURM_NODEID {shlex.join(launcher[at:])}"
    # Each node's own accelerators, as SLURM gives them.
    keep = f'[ -z "${{CUDA_VISIBLE_DEVICES+x}}" ] || export {DEVICES}="$CUDA_VISIBLE_DEVICES"'
    nodes = str(len(hosts.ranks))
    # Ranks use all that the job has on a node: a task of its own would be bound to one core.
    spread = ["--nodes", nodes, "--ntasks", nodes, "--ntasks-per-node", "1", "--cpu-bind=none"]
    return ["srun", *spread, "--export=ALL", "sh", "-c", f"{keep}; exec {text}"]
