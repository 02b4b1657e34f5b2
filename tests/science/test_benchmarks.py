"""The benchmarks' smallest setting: they run, and end with a line of JSON that has its keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks"


def run(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert summary["benchmark"] == name
    return summary


def test_sarah(tmp_path: Path) -> None:
    options = ["--passes", "2", "--seeds", "2", "--tuning-seeds", "1", "--lengths", "2"]
    options += ["--out", str(tmp_path)]
    found = run("sarah", *options, "--problems", "Bellman, FrozenLake")
    (problem,) = found["problems"].values()
    assert problem["optimum_known"]
    for method in ("sarah-c", "vrsc-pg", "storm-c", "scgd", "asc-pg", "gd"):
        mean, low, high = problem["methods"][method]["gap"]
        assert 0 < low <= mean <= high
        curve = problem["methods"][method]["curve"]
        assert curve["passes"][-1] == 2
        assert curve["mean"][-1] == pytest.approx(mean, rel=0.02)
        assert len(curve["low"]) == len(curve["high"]) == len(curve["passes"]) == 20
    assert "sarah-c" in drawn(tmp_path / "bellman-frozenlake-2-passes.svg")
    assert found["winners"].keys() == found["problems"].keys()


def drawn(path: Path) -> str:
    text = path.read_text()
    assert text.startswith("<svg")
    assert "dc:date" not in text  # equal figures give equal bytes
    assert len(text) < 150_000
    return text


def test_admm_sme(tmp_path: Path) -> None:
    options = ["--paths", "200", "--steps", "20", "--rounds", "2", "--monte-carlo", "50"]
    options += ["--out", str(tmp_path)]
    found = run("admm_sme", *options)
    assert abs(found["weak_error_slope"] - 1) < 0.05
    assert abs(found["slope_with_2_minus_alpha"]) < 0.05
    assert abs(found["std_collapse_ratio"] - 1) < 0.01
    assert found["fixed_point_error"] < 1e-10
    assert found["speed"]["baseline"] in ("torchsde sdeint euler", "one path after the other")
    assert found["speed"]["times_faster"] > 0
    for name in ("weak-error", "std"):
        assert "gradient-based" in drawn(tmp_path / f"{name}.svg")
    drawn(tmp_path / "quartic.svg")


def test_confdiff() -> None:
    found = run("confdiff", "--quick", "--count", "150", "--samples", "2", "--rounds", "1")
    assert found["igso3_norm_error"] < 1e-9
    assert found["equivariance_error"] < 1e-12
    assert abs(found["guided_mean"] - 0.75) < 4 * found["guided_error"]
    assert abs(found["guided_var"] - 0.5) < 4 * found["guided_error"]
    assert found["sampling_seconds_per_1000"] > 0
