"""The benchmark's smallest setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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
