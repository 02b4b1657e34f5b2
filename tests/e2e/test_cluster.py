"""A run of a tiny model over the hosts of a real cluster, where there is one.

Either in a SLURM allocation, or with SPARRING_TEST_HOSTFILE, and --basetemp on a file system that
all hosts see.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import RECIPE

HOSTFILE = os.environ.get("SPARRING_TEST_HOSTFILE")
SLURM = "SLURM_JOB_NODELIST" in os.environ
OPTIONS = "--iterations 1 --train.batch 8 --train.micro-batch 1 --train.zero 2"


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(
    not (HOSTFILE or SLURM), reason="no cluster: neither SPARRING_TEST_HOSTFILE nor SLURM"
)
def test_a_run_over_all_hosts(tmp_path: Path, tiny_model: Path, tiny_prompts: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(model=tiny_model, prompts=tiny_prompts))
    place = ["--launch.hostfile", str(Path(HOSTFILE).absolute())] if HOSTFILE else []
    command = [sys.executable, "-m", "sparring.launch.cli", "run", str(recipe)]
    command += OPTIONS.split()
    command += [*(place or ["--launch.slurm"]), "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, cwd=tmp_path)
    from sparring.launch import hosts

    ranks = hosts.find(1, HOSTFILE or "", SLURM and not HOSTFILE).total
    manifest = json.loads((tmp_path / "run" / "iter0" / "train" / "manifest.json").read_text())
    assert manifest["processes"] == ranks
    log = (tmp_path / "run" / "logs" / "iter0-train.log").read_text()
    assert f"dist_world_size={ranks}" in log
