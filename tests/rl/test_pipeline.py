"""`sparring run` of policy-gradient recipes: bytes, resuming, ranks, divergence, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparring.launch import cli, stages
from sparring.launch.artifacts import hash_file
from sparring.launch.config import build as build_config
from sparring.launch.config import read_toml
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.metrics import read_metrics
from sparring.launch.processes import World
from sparring.launch.stages import Context, LaunchConfig, Step
from sparring.rl import learning
from sparring.rl.config import LearnConfig, MethodConfig, Recipe
from sparring.rl.environments import open_environment
from sparring.rl.pipeline import LEARN
from sparring.rl.policies import CategoricalPolicy, GaussianPolicy
from sparring.rl.policy_files import read_policy, write_policy

RECIPE = """
name = "tiny"
pipeline = "rl"
trajectories = 30
seeds = 2
[environment]
id = "{env}"
horizon = 20
[policy]
hidden = [8]
[[methods]]
method = "gpomdp"
batch = 4
lr = {lr}
[[methods]]
method = "storm-pg"
alpha = 0.5
init_batch = 6
batch = 4
lr = 0.02
[launch]
inline = ["learn"]
"""
OWN = "sparring/ContinuousCartPole-v0"


def recipe(folder: Path, *, env: str = OWN, lr: float = 0.02) -> str:
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(env=env, lr=lr))
    return str(path)


def learn_config(**changes: Any) -> LearnConfig:
    data = {
        "environment": {"id": OWN, "horizon": 20},
        "policy": {"hidden": [8]},
        "method": {"method": "storm-pg", "alpha": 0.5, "init_batch": 6, "batch": 4, "lr": 0.02},
        "trajectories": 42,
    }
    return build_config(LearnConfig, {**data, **changes}, "test")


def context(work: Path, **changes: Any) -> Context:
    work.mkdir(parents=True, exist_ok=True)
    events: dict[str, Any] = {"emit": lambda **_: None}
    return Context(**{"world": World(), "work": work, "seed": 11, **events, **changes})


def learned(folder: Path, config: LearnConfig, **changes: Any) -> dict[str, str]:
    """Run the stage's function; hashes of what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    learning.run(config, {}, folder, context(folder / "work", **changes))
    return {p.name: hash_file(p) for p in sorted(folder.iterdir()) if p.is_file()}


def test_a_run_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", recipe(tmp_path), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "return mean by trajectories" in out
    assert "95 % t-interval over all seeds" in out
    assert "5 steps computed, 0 kept" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<svg" in page
    assert "storm-pg" in page
    rows = read_metrics(tmp_path / "run/storm-pg/seed1/metrics.jsonl")
    assert rows[-1]["trajectories"] == 6 + 6 * 4
    assert [row["iteration"] for row in rows] == list(range(1, 8))
    assert rows[-1]["env_steps"] > rows[0]["env_steps"] > 0
    assert cli.main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["computed"], again["kept"]) == (0, 5)
    assert set(again["comparison"]) == {"gpomdp", "storm-pg"}
    assert again["comparison"]["storm-pg"]["seeds"] == 2


def test_the_first_policy_depends_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)  # moves the global generator
        return torch.cat([p.flatten() for p in learning.build(learn_config(), seed)._parameters])

    with torch.random.fork_rng():
        assert torch.equal(weights(1), weights(1))
        assert not torch.equal(weights(1), weights(2))


def test_arms_share_their_first_policy_and_their_noise(tmp_path: Path) -> None:
    configs = [learn_config(), learn_config(method={"method": "gpomdp", "batch": 6, "lr": 0.5})]
    first = []
    for n, config in enumerate(configs):
        learned(tmp_path / str(n), config)
        first.append(read_metrics(tmp_path / str(n) / "metrics.jsonl")[0])
    assert first[0]["return_mean"] == first[1]["return_mean"]
    assert first[0]["gradient_norm"] == first[1]["gradient_norm"]
    assert learned(tmp_path / "2", configs[0], seed=12) != learned(tmp_path / "3", configs[0])


_KILLED = """
import os, signal, sys
from pathlib import Path
from sparring.launch import cli
from sparring.rl import learning
learning._SAVE_EVERY = -1.0
original = learning.save_state
def save(path, state):
    original(path, state)
    if state["counters"]["iteration"] == 4:
        with (path.parent.parent / "metrics.jsonl").open("a") as file:
            # A row that the checkpoint does not have yet, and one cut short.
            file.write('{"iteration": 5, "trajectories": 0}' + chr(10) + '{"iteration": 6, "tr')
        os.kill(os.getpid(), signal.SIGKILL)
learning.save_state = save
cli.main(sys.argv[1:])
"""


def test_killed_it_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def artifacts(run: str) -> dict[str, str]:
        paths = (tmp_path / run).glob("*/seed*/[!.]*")
        return {
            str(p.relative_to(tmp_path / run)): hash_file(p)
            for p in paths
            if p.name != "manifest.json"
        }

    path = recipe(tmp_path)
    killed = [sys.executable, "-c", _KILLED, "run", path, "--out", str(tmp_path / "killed")]
    done = subprocess.run(killed, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "killed/gpomdp/seed0/work/state.pt").is_file()
    assert not (tmp_path / "killed/gpomdp/seed0/manifest.json").exists()
    capsys.readouterr()
    assert cli.main(["run", path, "--out", str(tmp_path / "killed")]) == 0
    assert "going on from iteration 4" in capsys.readouterr().err
    assert cli.main(["run", path, "--out", str(tmp_path / "whole")]) == 0
    assert len(artifacts("whole")) == 8
    assert artifacts("killed") == artifacts("whole")
    assert not list((tmp_path / "killed").rglob("work"))


@pytest.mark.parametrize(
    "method",
    [
        {"method": "storm-pg", "alpha": 0.5, "init_batch": 6, "batch": 4, "lr": 0.02},
        {"method": "svrpg", "period": 3, "init_batch": 6, "batch": 4, "lr": 0.02},
        {"method": "page-pg", "probability": 0.4, "init_batch": 6, "batch": 4, "lr": 0.02,
         "optimizer": "mars", "baseline": "running", "lr_decay": 0.9},
    ],
)  # fmt: skip
def test_stopped_it_saves_and_goes_on(tmp_path: Path, method: dict[str, Any]) -> None:
    config = learn_config(method=method)
    asked = iter([False, False, False, True])
    with pytest.raises(Stopped, match="run the same command again"):
        learned(tmp_path / "a", config, stopped=lambda: next(asked))
    notes: list[str] = []
    went_on = learned(tmp_path / "a", config, emit=lambda **e: notes.append(e.get("note", "")))
    assert "going on from iteration 3" in notes
    assert went_on == learned(tmp_path / "b", config)


@pytest.mark.dist
def test_two_ranks_equal_one_through_the_launcher(tmp_path: Path) -> None:
    def run(processes: int) -> tuple[list[Any], dict[str, Any]]:
        folder = tmp_path / str(processes)
        artifact, fresh = stages.execute(
            Step("learn", LEARN, learn_config(trajectories=30), {}, seed=11),
            {},
            folder / "learn",
            LaunchConfig(processes=processes, inline=("learn",)),
            logs=folder / "logs",
            on_event=lambda _: None,
        )
        assert fresh
        return read_metrics(folder / "learn" / "metrics.jsonl"), {
            **read_policy(folder / "learn" / "policy.safetensors").state_dict(),
            "figures": artifact.figures,
        }

    (alone, one), (together, two) = run(1), run(2)
    assert len(alone) == len(together) == 7
    for mine, expected in zip(together, alone, strict=True):
        # Parameters are float32 here; tests/rl/test_ranks.py has 1e-6 in float64.
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert one.pop("figures")["env_steps"] == two.pop("figures")["env_steps"]
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-4), name


def test_a_run_that_diverges_is_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", recipe(tmp_path, lr=1e37), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr()
    assert "diverged after 4 trajectories" in shown.err
    assert "diverged" in shown.out.splitlines()[1]
    figures = json.loads((tmp_path / "run/gpomdp/seed0/manifest.json").read_text())["figures"]
    assert "not finite" in figures["diverged"]
    assert not json.loads((tmp_path / "run/storm-pg/seed0/manifest.json").read_text())["figures"][
        "diverged"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods.1.alpha", "1.5"], "must lie in"),
        (["--methods.0.alpha", "0.5"], "gpomdp takes no alpha"),
        (["--methods.1.init-batch", "None"], "storm-pg needs init_batch"),
        (["--methods.1.defensive", "1"], "defensive of storm-pg must be in"),
        (["--methods.1.clip", "0.5"], "clip of storm-pg must be at least 1"),
        (["--methods.0.lr", "0"], "lr of gpomdp must be above 0"),
        (["--methods.0.batch", "0"], "whole number"),
        (["--environment.horizon", "0"], "environment.horizon must be a whole number"),
        (["--environment.gamma", "1.1"], "environment.gamma must lie in"),
        (["--policy.sigma", "0"], "policy.sigma must be above 0"),
        (["--policy.hidden", "0"], "policy.hidden must be a whole number"),
        (["--trajectories", "5"], "does not hold the first batch"),
        (["--seeds", "0"], "seeds must be a whole number"),
        (["--methods.1.label", "gpomdp"], "two are called 'gpomdp'"),
        (["--environment.hoizon", "3"], "--environment.horizon"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["plan", recipe(tmp_path), "--out", str(tmp_path / "run"), *options]
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr().err
    assert code == 2
    assert message in " ".join(shown.replace("│", " ").split())
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("line", "replaced", "message"),
    [
        ("lr = 0.02\n[launch]", "rate = 0.02\n[launch]", "methods.1.lr"),
        ('method = "gpomdp"', 'method = "trpo"', "methods.0.method"),
        ('pipeline = "rl"', "", "alignment"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, replaced: str, message: str
) -> None:
    path = Path(recipe(tmp_path))
    assert line in path.read_text()
    path.write_text(path.read_text().replace(line, replaced))
    assert cli.main(["plan", str(path)]) == 2
    shown = capsys.readouterr().err
    if message != "alignment":  # another pipeline's recipe, whose keys are others
        assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("env", "code", "message"),
    [
        ("CartPole-v9", 2, "did you mean 'CartPole-v1'"),
        ("sparring/ContinuousCartpole-v0", 2, f"did you mean '{OWN}'"),
        ("a/b/c", 2, "cannot be made"),
        ("FrozenLake-v1", 1, "observations must be a Box"),
    ],
)
def test_environments_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], env: str, code: int, message: str
) -> None:
    assert cli.main(["run", recipe(tmp_path, env=env), "--out", str(tmp_path / "run")]) == code
    assert message in capsys.readouterr().err


def test_without_mujoco_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == "mujoco" or ".mujoco" in m]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(SparringError, match=r'pip install "sparring\[mujoco\]"'):
        open_environment("Swimmer-v5", 1)


def test_a_mujoco_task_learns_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("mujoco", reason="needs gymnasium[mujoco]")
    config = learn_config(
        environment={"id": "InvertedPendulum-v5", "horizon": 50}, trajectories=160,
        policy={"hidden": [16], "sigma": 0.3},
        method={"method": "gpomdp", "batch": 10, "lr": 0.02},
    )  # fmt: skip
    asked = iter([False] * 4 + [True])
    with pytest.raises(Stopped):
        learned(tmp_path / "a", config, stopped=lambda: next(asked))
    went_on = learned(tmp_path / "a", config)
    assert went_on == learned(tmp_path / "b", config)
    rows = read_metrics(tmp_path / "a/metrics.jsonl")
    assert rows[-1]["return_mean"] > 2 * rows[0]["return_mean"]


def test_the_settings_of_a_recipe_reach_the_method() -> None:
    method = {
        "method": "storm-pg", "alpha": 0.25, "init_batch": 9, "batch": 5, "restart": 7, "lr": 0.3,
        "estimator": "pgt", "baseline": "running", "optimizer": "sgd", "lr_decay": 0.5,
        "clip": 2.0, "defensive": 0.4,
    }  # fmt: skip
    config = learn_config(method=method, environment={"id": OWN, "horizon": 13, "gamma": 0.7})
    built: Any = learning.build(config, 3)
    assert (built.alpha, built.init_batch, built.batch, built.restart) == (0.25, 9, 5, 7)
    assert (built.estimator, built.clip, built.defensive) == ("pgt", 2.0, 0.4)
    assert (built.horizon, built.gamma, built.seed) == (13, 0.7, 3)
    assert (built._baseline.kind, built._ascent.rule) == ("running", "sgd")
    assert (built._ascent.lr, built._ascent._decay) == (0.3, 0.5)
    others: list[tuple[dict[str, Any], str, Any]] = [
        ({"method": "srvr-pg", "period": 4, "init_batch": 9}, "period", 4),
        ({"method": "page-pg", "probability": 0.3, "init_batch": 9}, "probability", 0.3),
    ]
    for own, name, value in others:
        found = learning.build(learn_config(method={**own, "batch": 5, "lr": 0.1}), 3)
        assert (found.name, getattr(found, name)) == (own["method"], value)
    every = {field.name for field in dataclasses.fields(MethodConfig)}
    assert every - {"label", "period", "probability"} == set(method), "a new key needs a check here"


@pytest.mark.parametrize(
    "policy",
    [
        CategoricalPolicy(3, 2, hidden=(), bias=False, dtype=torch.float64),
        CategoricalPolicy(3, 4, hidden=(5, 6)),
        GaussianPolicy(4, 2, hidden=(7,), sigma=0.3),
        GaussianPolicy(4, 2, hidden=[3] * 11, learn_sigma=True),
    ],
)
def test_policies_come_back_from_their_file(
    tmp_path: Path, policy: CategoricalPolicy | GaussianPolicy
) -> None:
    write_policy(tmp_path / "p.safetensors", policy)
    again = read_policy(tmp_path / "p.safetensors")
    assert type(again) is type(policy)
    observation = torch.randn(6, 3 if isinstance(policy, CategoricalPolicy) else 4)
    observation = observation.to(next(policy.parameters()).dtype)
    action = policy.distribution(observation).sample()
    expected = policy.distribution(observation).log_prob(action)
    assert torch.equal(again.distribution(observation).log_prob(action), expected)
    assert len(list(again.parameters())) == len(list(policy.parameters()))


def test_a_file_without_a_policy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(b"nonsense")
    for name in ("p.safetensors", "none.safetensors"):
        with pytest.raises(SparringError, match="holds no policy"):
            read_policy(tmp_path / name)


def test_planning_imports_neither_torch_nor_gymnasium(tmp_path: Path) -> None:
    code = (
        "import sys; from sparring.launch import cli; assert cli.main(['plan', 'cart-pole']) == 0\n"
        "print([m for m in ('torch', 'gymnasium', 'scipy') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ}
    )
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", ["cart-pole", "mountain-car", "pendulum", "swimmer"])
def test_recipes_build_their_methods(name: str) -> None:
    if name == "swimmer":
        pytest.importorskip("mujoco", reason="needs gymnasium[mujoco]")
    data = read_toml(cli.recipe_folder() / f"{name}.toml")
    recipe_ = build_config(Recipe, data, name)
    for settings in recipe_.settings():
        small = dataclasses.replace(
            settings.method,
            batch=2,
            init_batch=settings.method.init_batch and 2,
        )
        method = learning.build(dataclasses.replace(settings, method=small), 0)
        assert method.name == settings.method.method
