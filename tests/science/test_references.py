"""Real data and other people's solvers: daily returns of skfolio, optima of cvxpy."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.science import compositional_examples as examples
from sparring.science.admm import (
    L1,
    AdmmProblem,
    LeastSquares,
    Logistic,
    Quadratic,
    Ridge,
    admm,
    difference_matrix,
)
from sparring.science.compositional import minimize_compositional
from sparring.science.lasso_stage import diabetes
from sparring.science.returns import daily_returns, monthly_returns


@pytest.fixture(scope="module")
def daily() -> np.ndarray:
    if importlib.util.find_spec("skfolio") is None:
        pytest.skip("needs skfolio's data file: pip install --no-deps skfolio")
    return daily_returns()


def test_daily_returns_are_those_of_the_file(daily: np.ndarray) -> None:
    spec = importlib.util.find_spec("skfolio")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "datasets/data/sp500_dataset.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    assert daily.shape == (len(rows) - 1, 20)
    names = list(rows[0])[1:]
    for day, column in ((0, 0), (100, 7), (len(rows) - 2, 19)):
        before, after = (float(rows[n][names[column]]) for n in (day, day + 1))
        assert daily[day, column] == pytest.approx(100 * (after - before) / before)


def test_the_portfolio_of_daily_returns_has_its_closed_form(daily: np.ndarray) -> None:
    problem = examples.portfolio(daily)
    best, optimum = examples.portfolio_optimum(daily)
    # Independently: the moments by hand, and the normal equations r̄ = 2 Σ x.
    mean = daily.sum(0) / len(daily)
    centred = daily - mean
    covariance = centred.T @ centred / len(daily)
    assert 2 * covariance @ best == pytest.approx(mean)
    assert optimum == pytest.approx(-mean @ best + best @ covariance @ best)
    step = 1 / (2 * np.linalg.eigvalsh(covariance)[-1])
    found = minimize_compositional(problem, np.ones(20), "gd", lr=step, max_iter=1200, records=2)
    assert found.fun - optimum < 1e-8
    assert found.x == pytest.approx(best, abs=1e-4)


def test_solvers_on_daily_returns(daily: np.ndarray) -> None:
    """What docs/science/compositional.md says of the monthly ones after twelve passes holds here
    after four: the fair SCGD is far ahead, and all are far below the start."""
    problem = examples.portfolio(daily)
    gaps = {}
    for method, lr in (("scgd", 1e-3), ("vrsc-pg", 1e-3), ("sarah-c", 1e-3), ("gd", 1e-2)):
        options: dict[str, Any] = {} if method in ("scgd", "gd") else {"q": 10}
        result = minimize_compositional(
            problem, np.ones(20), method, lr=lr, batch=5, max_ifo=4 * 3 * len(daily), seed=1,
            records=2, **options,
        )  # fmt: skip
        assert result.success
        gaps[method] = result.fun - problem.optimum
    start = float(problem.monitor(1, 0)(examples.torch.ones(20, dtype=examples.torch.float64))[0])
    assert 0 < gaps["scgd"] < 0.1 * min(gaps["vrsc-pg"], gaps["sarah-c"], gaps["gd"])
    assert max(gaps.values()) < 0.1 * (start - problem.optimum)


# ---------------------------------------------------------------- cvxpy


def solved(cvxpy: Any, x: Any, objective: Any) -> np.ndarray:
    problem = cvxpy.Problem(cvxpy.Minimize(objective))
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    assert problem.status == "optimal"
    return np.asarray(x.value)


@pytest.fixture(scope="module")
def cvxpy() -> Any:
    return pytest.importorskip("cvxpy", reason="needs cvxpy, of the extra dev")


def test_lasso_equals_cvxpys(cvxpy: Any) -> None:
    f = diabetes()
    x = cvxpy.Variable(10)
    loss = cvxpy.sum_squares(f.data @ x - f.target) / (2 * f.samples)
    exact = solved(cvxpy, x, loss + 0.1 * cvxpy.norm1(x))
    for options in ({}, {"alpha": 1.6}, {"omega": 1.0, "omega1": 1.0, "tau": 8.0}):
        found = admm(AdmmProblem(f, L1(0.1)), 1.0, **options, tol=1e-12, max_iter=50_000)
        assert np.abs(found.z - exact).max() < 1e-6


def test_logistic_regression_equals_cvxpys(cvxpy: Any) -> None:
    from sklearn.datasets import load_breast_cancer

    cells, label = load_breast_cancer(return_X_y=True)
    data, sign = (cells - cells.mean(0)) / cells.std(0), 2.0 * label - 1
    x = cvxpy.Variable(30)
    loss = cvxpy.sum(cvxpy.logistic(cvxpy.multiply(-sign, data @ x))) / len(sign)
    exact = solved(cvxpy, x, loss + 0.02 * cvxpy.norm1(x))
    found = admm(AdmmProblem(Logistic(data, sign), L1(0.02)), 0.01, 1.6, tol=1e-9)
    assert np.abs(found.z - exact).max() < 1e-5
    assert (np.abs(found.z) == 0).sum() >= 10


def test_ridge_on_diabetes_equals_scikit_learns() -> None:
    from sklearn.linear_model import Ridge as Fitted

    f = diabetes()
    exact = Fitted(alpha=0.3 * f.samples, fit_intercept=False, tol=1e-14).fit(f.data, f.target)
    for options in ({}, {"alpha": 1.6}, {"omega": 1.0, "omega1": 1.0, "tau": 8.0}):
        found = admm(AdmmProblem(f, Ridge(0.3)), 1.0, **options, tol=1e-13, max_iter=50_000)
        assert np.abs(found.x - exact.coef_).max() < 1e-10


def test_fused_lasso_of_a_real_series_equals_cvxpys(cvxpy: Any) -> None:
    """Five years of monthly returns: jumps and levels are penalised, A stacks both."""
    series = monthly_returns()[-60:, 0]
    D = np.vstack([difference_matrix(60), np.eye(60)])
    beta = np.repeat([2.0, 0.3], [59, 60])
    x = cvxpy.Variable(60)
    loss = cvxpy.sum_squares(x - series) / 2 + beta @ cvxpy.abs(D @ x)
    exact = solved(cvxpy, x, loss)
    found = admm(AdmmProblem(Quadratic(np.eye(60), series), L1(beta), D), 1.0, alpha=1.5,
                 tol=1e-11, max_iter=50_000)  # fmt: skip
    assert np.abs(found.x - exact).max() < 1e-6
    jumps = np.abs(np.diff(found.x)) > 1e-4
    assert 0 < jumps.sum() < 30  # pieces, neither one nor all


def test_fused_lasso_equals_cvxpys(cvxpy: Any) -> None:
    """A is no square matrix here."""
    rng = np.random.default_rng(0)
    steps = np.repeat([0.0, 2.0, -1.0], 12) + 0.2 * rng.standard_normal(36)
    D = difference_matrix(36)
    x = cvxpy.Variable(36)
    loss = cvxpy.sum_squares(x - steps) / 2
    exact = solved(cvxpy, x, loss + 0.7 * cvxpy.norm1(D @ x))
    problem = AdmmProblem(Quadratic(np.eye(36), steps), L1(0.7), D)
    found = admm(problem, 1.0, alpha=1.5, tol=1e-12, max_iter=50_000)
    assert np.abs(found.x - exact).max() < 1e-6


def test_the_portfolio_equals_cvxpys(cvxpy: Any, daily: np.ndarray) -> None:
    x = cvxpy.Variable(20)
    mean, covariance = daily.mean(0), np.cov(daily.T, bias=True)
    exact = solved(cvxpy, x, -mean @ x + cvxpy.quad_form(x, covariance))
    assert np.abs(examples.portfolio_optimum(daily)[0] - exact).max() < 1e-6


def test_least_squares_of_weights_is_what_the_stage_takes() -> None:
    f = diabetes()
    assert isinstance(f, LeastSquares)
    assert f.data.mean(0) == pytest.approx(np.zeros(10), abs=1e-12)
    assert f.data.std(0) == pytest.approx(np.ones(10))
