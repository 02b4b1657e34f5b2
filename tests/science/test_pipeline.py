"""`sparring run` of solver recipes: what is written, the equation beside it, ranks, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.launch import cli, stages
from sparring.launch.config import build
from sparring.launch.metrics import read_metrics
from sparring.launch.stages import LaunchConfig, Step
from sparring.science import compositional_examples as examples
from sparring.science import lasso_stage
from sparring.science.admm import L1, AdmmProblem, LeastSquares, Scheme, admm
from sparring.science.admm_consensus import consensus_admm
from sparring.science.compositional import minimize_compositional
from sparring.science.config import AdmmStage
from sparring.science.pipeline import ADMM, CONSENSUS
from sparring.science.returns import monthly_returns
from sparring.science.sme_lasso import support_process

PORTFOLIO = """
name = "tiny"
pipeline = "science"
seeds = 2
[portfolio]
passes = 3
[[compositional]]
method = "sarah-c"
lr = 0.0002
q = 10
[[compositional]]
method = "gd"
lr = {lr}
[launch]
inline = ["compose"]
"""
LASSO = """
name = "tiny"
pipeline = "science"
seeds = 1
[lasso]
iterations = 200
[[admm]]
label = "relaxed"
alpha = 1.5
[[admm]]
label = "consensus"
parts = 2
[launch]
inline = ["admm", "consensus"]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "tiny.toml"
    path.write_text(text)
    return str(path)


def execute(folder: Path, stage: Any, processes: int = 1, **scheme: Any) -> tuple[Path, Any]:
    """One run of ADMM as its stage."""
    lasso = {"iterations": scheme.pop("iterations", 300)}
    config = build(AdmmStage, {"lasso": lasso, "scheme": {"label": "a", **scheme}}, "test")
    artifact, _ = stages.execute(
        Step("a", stage, config, {}, seed=5),
        {},
        folder / "a",
        LaunchConfig(processes=processes, inline=(stage.name,)),
        logs=folder / "logs",
        on_event=lambda _: None,
    )
    return folder / "a", artifact.figures


def test_a_portfolio_run_and_the_same_command_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", write(tmp_path, PORTFOLIO.format(lr=2e-4)), "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "gap by passes" in out
    assert "geometric mean" in out
    # Gradient descent draws nothing, so that one seed is all there is.
    assert "4 steps computed, 0 kept" in out
    problem = examples.portfolio(monthly_returns())
    exact = minimize_compositional(
        problem, np.ones(30), "gd", lr=2e-4, batch=5, max_ifo=3 * 3 * 819
    )
    rows = read_metrics(tmp_path / "run/gd/seed0/metrics.jsonl")
    assert rows[-1]["gap"] == pytest.approx(exact.fun - problem.optimum, rel=1e-12)
    assert rows[-1]["passes"] == 3
    assert rows[-1]["ifo"] == sum(exact.n_ifo.values())
    solution = json.loads((tmp_path / "run/gd/seed0/solution.json").read_text())
    assert solution["x"] == pytest.approx(exact.x.tolist(), rel=1e-12)
    seeds = [tmp_path / f"run/sarah-c/seed{n}/metrics.jsonl" for n in range(2)]
    assert seeds[0].read_text() != seeds[1].read_text()
    assert cli.main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["computed"], again["kept"]) == (0, 4)
    assert again["comparison"]["gd"]["table"][-1][0] == pytest.approx(rows[-1]["gap"])


def test_a_step_that_is_too_long_is_said_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PORTFOLIO.format(lr=1e200)
    assert cli.main(["run", write(tmp_path, text), "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "take a smaller lr" in shown.err
    assert "diverged" in shown.out.splitlines()[1]
    rows = read_metrics(tmp_path / "run/gd/seed0/metrics.jsonl")
    assert all(math.isfinite(row["gap"]) for row in rows)


def test_a_lasso_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, LASSO)
    assert cli.main(["run", path, "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["comparison"]) == {"relaxed", "consensus"}
    figures = found["comparison"]["relaxed"]["figures"]
    assert set(figures) == {"residual", "std", "predicted_std"}
    rows = read_metrics(tmp_path / "run/consensus/seed0/metrics.jsonl")
    assert (rows[0]["rows"], rows[0]["distance"]) == (0, pytest.approx(1))
    assert rows[-1]["rows"] == 200 * 64
    assert rows[-1]["distance"] < 0.6


@pytest.mark.parametrize(
    ("stage", "scheme"),
    [
        (ADMM, {}),
        (ADMM, {"alpha": 1.5}),
        (ADMM, {"omega": 1.0, "omega1": 1.0, "c": 2.0}),
        (CONSENSUS, {"parts": 4}),
    ],
)
def test_the_measured_deviation_is_the_predicted_one(
    tmp_path: Path, stage: Any, scheme: dict[str, Any]
) -> None:
    """Twelve relaxation times in the second half; the kinks take a few per cent off."""
    _, figures = execute(tmp_path, stage, iterations=5000, **scheme)
    assert figures["std"] == pytest.approx(figures["predicted_std"], rel=0.25)
    assert figures["distance"] < 0.06
    assert figures["diverged"] == ""


def test_a_larger_c_is_quieter_and_relaxation_noisier() -> None:
    f = lasso_stage.diabetes()
    best = admm(AdmmProblem(f, L1(0.1)), 1.0).z
    stds = [
        np.diag(support_process(f, best, Scheme(rho=100, **scheme), 8).stationary_cov).mean()
        for scheme in ({"omega": 1.0, "tau": 200.0}, {}, {"alpha": 1.5})
    ]
    assert stds[0] < stds[1] < stds[2]
    with pytest.raises(ValueError, match="lower the penalty"):
        support_process(f, np.zeros(10), Scheme(rho=1.0), 1)


def test_the_support_process_by_hand() -> None:
    """One coordinate moves: Var = ε s² / (2 B M h), s² the variance of its rows' gradients."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((50, 3))
    target = rng.standard_normal(50)
    best = np.array([0.0, 0.4, 0.0])
    process = support_process(
        LeastSquares(data, target), best, Scheme(rho=40.0, alpha=1.25, tau=20.0), batch=5
    )
    a = data[:, 1]
    slopes = (0.4 * a - target) * a
    weight = 20 / 40 + 1 / 1.25
    expected = slopes.var() / 40 / 5 / (2 * weight * np.mean(a**2))
    assert process.stationary_cov == pytest.approx(np.array([[expected]]))
    assert process.centre == pytest.approx([0.4])


# ---------------------------------------------------------------- consensus


def losses(parts: int) -> list[LeastSquares]:
    f = lasso_stage.diabetes()
    return [
        LeastSquares(f.data[n::parts], f.target[n::parts], weight=len(f.data[n::parts]) / 442)
        for n in range(parts)
    ]


def test_several_losses_on_a_rank_reach_the_lasso() -> None:
    exact = admm(AdmmProblem(lasso_stage.diabetes(), L1(0.1)), 1.0, tol=1e-13).z
    for parts in (1, 3):
        found = consensus_admm(losses(parts), L1(0.1), 0.5, tol=1e-12, max_iter=20_000)
        assert found.success
        assert np.abs(found.x - exact).max() < 1e-9
        assert found.x_local.shape == found.u.shape == (parts, 10)
    single = consensus_admm(losses(1)[0], L1(0.1), 0.5, tol=1e-12)
    assert single.x_local.shape == (10,)
    assert single.x == pytest.approx(consensus_admm(losses(1), L1(0.1), 0.5, tol=1e-12).x)
    seen: list[int] = []
    consensus_admm(
        losses(2), L1(0.1), 0.5, max_iter=3, tol=0.0, callback=lambda k, z, r: seen.append(k)
    )
    assert seen == [1, 2, 3]
    with pytest.raises(ValueError, match="at least one loss"):
        consensus_admm([], L1(0.1), 0.5)


@pytest.mark.dist
def test_two_ranks_equal_one_through_the_launcher(tmp_path: Path) -> None:
    alone, _ = execute(tmp_path / "one", CONSENSUS, parts=4)
    together, _ = execute(tmp_path / "two", CONSENSUS, processes=2, parts=4)
    first, second = (
        json.loads((folder / "solution.json").read_text())["z"] for folder in (alone, together)
    )
    assert first == pytest.approx(second, abs=1e-12)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (alone, together)]
    assert len(rows[0]) == len(rows[1])
    for mine, expected in zip(*rows, strict=True):
        assert mine == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (PORTFOLIO, ["--compositional.0.lr", "-1"], "lr of sarah-c must be positive"),
        (PORTFOLIO, ["--compositional.1.q", "3"], "gd has no anchors"),
        (PORTFOLIO, ["--compositional.0.averaging", "0.5"], "sarah-c does not average"),
        (PORTFOLIO, ["--portfolio.passes", "0"], "portfolio.passes must be positive"),
        (PORTFOLIO, ["--portfolio.returns", "hourly"], "hourly"),
        (PORTFOLIO, ["--seeds", "0"], "seeds must be at least 1"),
        (LASSO, ["--admm.0.alpha", "2"], "alpha of relaxed must be in (0, 2)"),
        (LASSO, ["--admm.0.omega", "1.5"], "omega of relaxed must be in [0, 1]"),
        (LASSO, ["--admm.1.omega", "1"], "consensus is consensus, which has no omega"),
        (LASSO, ["--admm.1.parts", "5"], "cannot be dealt out to the 5 parts"),
        (LASSO, ["--admm.0.c", "-1"], "c of relaxed must not be negative"),
        (LASSO, ["--lasso.rho", "0"], "lasso.rho must be positive"),
        (LASSO, ["--lasso.iterations", "1"], "lasso.iterations must be at least 2"),
        (LASSO, ["--admm.1.label", "relaxed"], "two are called 'relaxed'"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    options: list[str],
    message: str,
) -> None:
    path = write(tmp_path, text.replace("{lr}", "0.1"))
    try:
        code = cli.main(["plan", path, "--out", str(tmp_path / "run"), *options])
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown


def test_one_kind_of_solver_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = PORTFOLIO.format(lr=0.1) + '[[admm]]\nlabel = "a"\n'
    assert cli.main(["plan", write(tmp_path, both)]) == 2
    assert "one of the two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--admm.0.omega", "1", "--admm.0.c", "0.3"], "are unstable"),
        (["--lasso.penalty", "100"], "lower the penalty"),
    ],
)
def test_what_only_the_run_can_tell_is_an_error_with_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    arguments = ["run", write(tmp_path, LASSO), "--out", str(tmp_path / "run"), *options]
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_without_the_data_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparring.launch.packaged.find_spec", lambda name: None)
    path = write(tmp_path, PORTFOLIO.format(lr=0.1))
    for returns, package in (("monthly", "linearmodels"), ("daily", "skfolio")):
        out = str(tmp_path / returns)
        assert cli.main(["run", path, "--out", out, "--portfolio.returns", returns]) == 1
        assert f"pip install --no-deps {package}" in capsys.readouterr().err
