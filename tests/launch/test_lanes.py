"""scripts/lanes.py: a run's steps by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sparring.launch.cli import main

LANES = Path(__file__).parents[2] / "scripts" / "lanes.py"
RECIPE = """
name = "tiny"
pipeline = "conformations"
target = 330.0
seeds = 2

[md]
sequence = "{sequence}"
nanoseconds = 0.002
equilibration = 0.0002
save_every = 0.1
platform = "Reference"

[train]
steps = {steps}
batch = 4
micro_batch = 4

[evaluate]
lag = 2
energies = 2

[[arms]]
num_samples = 2
steps = 3
filter = false

[launch]
inline = ["conf-md", "conf-train", "conf-sample", "conf-evaluate"]
"""


def start(folder: Path, *, sequence: str = "AA", steps: int = 2) -> list[str]:
    recipe = folder / "tiny.toml"
    recipe.write_text(RECIPE.format(sequence=sequence, steps=steps))
    return [sys.executable, str(LANES), str(recipe), "--lanes", "2", "--out", str(folder / "run")]


def test_lanes_make_what_a_run_makes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(start(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lane 0: " in done.stderr
    assert "lane 1: " in done.stderr
    recipe = str(tmp_path / "tiny.toml")
    for run, computed in ((tmp_path / "run", 0), (tmp_path / "alone", 10)):
        assert main(["run", recipe, "--out", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["computed"] == computed
    for step in ("md-source", "md-target", "seed0/base", "seed1/base"):
        one, other = (tmp_path / run / step / "manifest.json" for run in ("run", "alone"))
        assert json.loads(one.read_text())["digest"] == json.loads(other.read_text())["digest"]


def test_lanes_tell_why_they_end(tmp_path: Path) -> None:
    command = start(tmp_path, sequence="AXA")
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode not in (0, 75)
    for lane in (0, 1):
        assert f"lane {lane}: residue 2 of AXA is 'X'" in failed.stderr
    wrong = subprocess.run([*command, "--lanes", "0"], capture_output=True, text=True, check=False)
    assert "--lanes must be at least 1, not 0" in wrong.stderr


def test_lanes_stop_and_go_on(tmp_path: Path) -> None:
    command = start(tmp_path, steps=100_000)
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            end = time.monotonic() + 120
            while not list((tmp_path / "run").glob("seed*/base/work/metrics.jsonl")):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            process.terminate()
            assert process.wait(60) == 75
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert list((tmp_path / "run").glob("seed*/base/work/checkpoint-*/done"))
