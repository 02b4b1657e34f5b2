"""scripts/benchmarks/dndm.py: its grid of samplers, and its smallest runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparring.diffusion.dndm.algorithms import ALGORITHMS

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "benchmarks" / "dndm.py"
TINY = """
name = "tiny"
pipeline = "dndm"
batch = 4
count = 6
data = { source = "text8", path = "elsewhere", length = 8, heldout = 6 }
model = { hidden = 16, layers = 1, heads = 2, feedforward = 16 }
train = { batch = 8, micro_batch = 8 }
launch = { inline = ["train-text-diffusion", "sample-text-diffusion"] }
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    import importlib.util

    spec = importlib.util.spec_from_file_location("dndm_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("pairs", [True, False])
def test_the_grid_has_every_sampler_at_every_t(script: ModuleType, pairs: bool) -> None:
    """With either noise; and what makes T calls makes them on one batch where T is 1000, but for
    the baseline on pairs."""
    found = {
        name: script.arms(kind, script.TIMES, batch=7, pairs=pairs)
        for name, kind in script.NETWORKS.items()
    }
    for name, listed in found.items():
        assert len({arm.name for arm in listed}) == len(listed)
        for arm in listed:
            slow = (
                ("mdlm-cache", "rdm", "rdm-k") if pairs else ("d3pm", "mdlm-cache", "rdm", "rdm-k")
            )
            once = arm.steps == 1000 and arm.algorithm in slow
            assert arm.count == (7 if once else 0)
            assert not (once and name == "absorbing" and arm.algorithm == "rdm")
    timeless = {n for n, kind in script.NETWORKS.items() if not kind.time}
    assert timeless == {n for n in found if any(a.algorithm == "mdlm-cache" for a in found[n])}
    either = {"absorbing": ALGORITHMS.keys(), "uniform": ALGORITHMS.keys() - {"mdlm-cache"}}
    for noise, wanted in either.items():
        at = {(arm.algorithm, arm.steps) for arm in found[noise]}
        # DNDM-C is DNDM at infinity, which is written 0.
        assert {a for a, _ in at} == wanted - {"dndm-c"}
        for steps in (25, 50, 1000):
            assert {("d3pm", steps), ("rdm-k", steps)} <= at
            assert (("rdm", steps) in at) is not (noise == "absorbing" and steps == 1000)
        for steps in (25, 50, 1000, 0):
            assert {("dndm", steps), ("dndm-v2", steps), ("dndm-k", steps)} <= at
    told = {arm.algorithm for arm in found["uniform-told"]}
    assert {"dndm", "dndm-k"} <= told
    assert not told & {"d3pm", "mdlm-cache"}


def run(*arguments: str) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stdout + done.stderr


@pytest.mark.slow
def test_quick() -> None:
    found, _ = run("--quick")
    assert found["calls_measured"] == pytest.approx(found["calls_expected"], abs=0.3)
    assert found["speedup_wall_vs_ancestral"] == pytest.approx(found["speedup_calls"], rel=0.3)
    assert found["rank_aligned_calls_at_batch_100"] <= 32
    assert found["tv_vs_ancestral"] < 0.04
    assert found["threads"] == 1


@pytest.mark.slow
def test_a_tiny_grid_is_made_in_pieces_and_kept(tmp_path: Path) -> None:
    """A second piece adds to the first; the same command again computes nothing."""
    recipe, text = tmp_path / "tiny.toml", tmp_path / "text8"
    recipe.write_text(TINY)
    text.write_text("the cat sat on the mat and saw the dog " * 30)
    common = ["--out", str(tmp_path / "out"), "--recipes", str(recipe), "--steps", "2"]
    common += ["--data", f"tiny={text}", "--seeds", "0", "--networks", "absorbing"]
    run(*common, "--T", "5")
    found, _ = run(*common, "--T", "5", "inf")
    again, shown = run(*common, "--T", "5", "inf")
    assert again == found
    steps = re.findall(r"^ *\[\d+/\d+\].*", shown, re.M)
    assert len(steps) > 30
    assert all("kept" in line for line in steps)
    arms = found["figures"]["tiny"]["absorbing"]
    assert {"d3pm-T=5", "mdlm-cache-T=5", "dndm-T=5", "dndm-T=inf", "threshold-0.9-sample"} <= set(
        arms
    )
    for figures in arms.values():
        assert figures["seeds"] == 1
        assert {"perplexity", "entropy", "bits", "nfe", "seconds_a_batch"} <= set(figures)
    assert arms["d3pm-T=5"]["nfe"][0] == 5
    assert arms["dndm-T=inf"]["nfe"][0] == 8
    assert arms["d3pm-T=5"]["bits"] == arms["dndm-T=5"]["bits"]
    assert len(list((tmp_path / "out").glob("*.svg"))) == 4
