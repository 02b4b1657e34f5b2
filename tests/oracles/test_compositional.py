"""SARAH-Compositional and its peers against closed forms and hand-computed costs."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from sparring.science.compositional import CompositionalProblem, Iterate, minimize_compositional
from sparring.science.compositional_examples import (
    bellman,
    gymnasium_bellman,
    portfolio,
    portfolio_optimum,
    sne,
    tanh_regression,
)
from sparring.science.returns import synthetic_returns

RETURNS = synthetic_returns(40, 4, kappa=3.0, seed=1)


def descend(objective, x0: np.ndarray, lr: float, steps: int) -> list[Tensor]:
    """Gradient descent on the written-out objective, by autograd."""
    x, path = torch.tensor(x0), []
    for _ in range(steps):
        path.append(x)
        point = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(point), point)
        x = x - lr * gradient
    return [*path, x]


def composed(problem: CompositionalProblem):
    m, n = problem.inner_count, problem.outer_count
    return lambda x: problem.outer(
        problem.inner(x, torch.arange(m)).mean(0), torch.arange(n)
    ).mean()


@pytest.mark.parametrize("method", ["sarah-c", "vrsc-pg", "gd"])
@pytest.mark.parametrize("full", ["batches", "q=1"])
def test_full_batches_and_q_1_are_gradient_descent(method: str, full: str) -> None:
    """Spec §2.1: exact estimates, also of a Jacobian that moves."""
    problem = tanh_regression(30, 3, 2)
    options = {"batch": 30, "q": 4} if full == "batches" else {"batch": 2, "q": 1}
    seen: list[Tensor] = []
    result = minimize_compositional(
        problem, np.ones(6), method, lr=0.3, max_iter=12, **options,
        callback=lambda i: seen.append(i.x),
    )  # fmt: skip
    path = descend(composed(problem), np.ones(6), 0.3, 12)
    np.testing.assert_allclose(torch.stack(seen), torch.stack(path[:-1]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.x, path[-1], rtol=0, atol=1e-12)


def test_linear_levels_give_classical_sarah_with_the_same_indices() -> None:
    """g_j(x) = x and a quadratic f_i: F must be v += ∇f_i(x_t) − ∇f_i(x_{t−1}), in numpy."""
    rng = np.random.default_rng(0)
    a, t, n, q, lr = rng.standard_normal((15, 3)), rng.standard_normal(15), 15, 5, 0.05
    features, target = torch.from_numpy(a), torch.from_numpy(t)
    drawn: list[np.ndarray] = []

    def outer(y: Tensor, rows: Tensor) -> Tensor:
        return (features[rows] @ y - target[rows]) ** 2 / 2

    def gradient(y: Tensor, rows: Tensor) -> Tensor:
        drawn.append(rows.numpy())
        return (features[rows] @ y - target[rows]) @ features[rows] / len(rows)

    problem = CompositionalProblem(
        lambda x, rows: x.expand(len(rows), -1), outer, inner_count=7, outer_count=n,
        outer_gradient=gradient,
    )  # fmt: skip
    estimates: list[Tensor] = []
    minimize_compositional(
        problem, np.zeros(3), "sarah-c", lr=lr, q=q, batch=(1, 1, 2), max_iter=14, seed=3,
        callback=lambda i: estimates.append(i.estimates["F"].clone()), records=1,
    )  # fmt: skip

    calls = [rows for rows in drawn if len(rows) == 2][::2]  # each pair of calls has the same rows
    x, before, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for step in range(14):
        if step % q == 0:
            v = (a @ x - t) @ a / n
        else:
            rows = calls.pop(0)
            v = v + a[rows].T @ (a[rows] @ (x - before)) / 2
        np.testing.assert_allclose(estimates[step], v, rtol=0, atol=1e-12)
        before, x = x, x - lr * v
    assert not calls


def test_the_errors_of_g_and_its_jacobian_are_martingales() -> None:
    """E over all index sequences of g_t − g(x_t) along a fixed path is g_0 − g(x_0), by listing."""
    from sparring.science.compositional_methods import Oracle, Rule, make
    from sparring.science.compositional_problem import Batch

    problem = tanh_regression(3, 2, 2)
    path = [torch.randn(4, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    all_rows = Batch(torch.arange(3), 3)
    rule = Rule(
        method="sarah-c", q=10, batch=(1, 1, 1), anchor_batch=(1, 1, 1),
        averaging=lambda t: (0.0, 0.0, 0.0),
    )  # fmt: skip
    errors, last_f = [], []
    for rows in product(range(3), repeat=4):  # the indices of g and of ∂g in steps 1 and 2
        queue = [0, 0, 0, rows[0], rows[1], 0, rows[2], rows[3], 0]
        oracle = Oracle(problem, torch.Generator())
        oracle.draw = lambda sizes, queue=queue: tuple(
            Batch(torch.tensor([queue.pop(0)]), 1) for _ in sizes
        )
        method = make(rule, oracle)
        for t, x in enumerate(path):
            method.direction(t, x)
        found = method.estimates()
        errors.append(
            torch.cat([
                found["g"] - problem.value(path[-1], all_rows),
                (found["dg"] - problem.jacobian(path[-1], all_rows)).reshape(-1),
            ])
        )  # fmt: skip
        last_f.append(found["F"])
    one = Batch(torch.tensor([0]), 1)
    start = torch.cat([
        problem.value(path[0], one) - problem.value(path[0], all_rows),
        (problem.jacobian(path[0], one) - problem.jacobian(path[0], all_rows)).reshape(-1),
    ])  # fmt: skip
    np.testing.assert_allclose(torch.stack(errors).mean(0), start, atol=1e-13)
    assert float(torch.stack(errors).std(0).max()) > 0.1  # the single errors do differ


def test_the_error_of_f_grows_with_the_path_and_is_reset_at_q() -> None:
    problem = tanh_regression(60, 3, 2, noise=0.5)
    gradient = torch.func.grad(composed(problem))

    def mean_errors(lr: float) -> np.ndarray:
        squared = np.zeros(20)
        for seed in range(25):

            def see(iterate: Iterate, squared: np.ndarray = squared) -> None:
                gap = iterate.estimates["F"] - gradient(iterate.x)
                squared[iterate.nit] += float(gap @ gap) / 25

            minimize_compositional(
                problem, np.ones(6), lr=lr, q=10, batch=1, max_iter=20, seed=seed, callback=see,
                records=1,
            )  # fmt: skip
        return squared

    small, large = mean_errors(0.1), mean_errors(0.2)
    for errors in (small, large):
        assert errors[0] < 1e-25
        assert errors[10] < 1e-25
        assert 0 < errors[2] < errors[5] < errors[9]
    assert 2.8 < large[1] / small[1] < 5.2  # η²
    assert small[11] > 1e-12


def test_ifo_by_hand() -> None:
    """m = 6, n = 9, q = 3, batches (2, 3, 1), 7 steps: anchors at 0, 3, 6 and four inner steps."""
    rng = np.random.default_rng(0)
    data, other = (torch.from_numpy(rng.standard_normal((k, 2))) for k in (6, 9))
    problem = CompositionalProblem.from_samples(
        lambda x, a: torch.sin(a * x), lambda y, b: (b @ y) ** 2, data, other
    )

    def counts(method: str, **options: object) -> dict[str, int]:
        result = minimize_compositional(problem, np.ones(2), method, lr=0.01, max_iter=7, **options)
        assert result.history["ifo"][-1] == sum(result.n_ifo.values())
        return result.n_ifo

    expected = {"g": 3 * 6 + 4 * 2 * 2, "dg": 3 * 6 + 4 * 2 * 3, "df": 3 * 9 + 4 * 2 * 1}
    assert counts("sarah-c", q=3, batch=(2, 3, 1)) == expected
    assert counts("vrsc-pg", q=3, batch=(2, 3, 1)) == expected
    assert counts("storm-c", batch=(2, 3, 1)) == {"g": 30, "dg": 42, "df": 21}
    assert counts("storm-c", batch=1, anchor_batch=(5, 4, 3)) == {"g": 17, "dg": 16, "df": 15}
    assert counts("scgd", batch=(2, 3, 1)) == {"g": 14, "dg": 21, "df": 7}
    assert counts("asc-pg", batch=2) == {"g": 14, "dg": 14, "df": 14}
    assert counts("gd") == {"g": 42, "dg": 42, "df": 63}


def test_a_step_over_the_ifo_budget_is_not_begun() -> None:
    problem = tanh_regression(20, 2, 2)
    for method in ("sarah-c", "vrsc-pg", "storm-c", "scgd", "gd"):
        result = minimize_compositional(problem, np.ones(4), method, lr=0.1, q=3, max_ifo=130)
        assert 66 < sum(result.n_ifo.values()) <= 130
    # Anchor and gradient take 2m + n = 60: without a single step there is no result to speak of.
    with pytest.raises(ValueError, match=r"max_ifo = 59 does not hold the first step .* 60 IFO"):
        minimize_compositional(problem, np.ones(4), "gd", lr=0.1, max_ifo=59)
    assert minimize_compositional(problem, np.ones(4), "gd", lr=0.1, max_ifo=60).nit == 1


@pytest.mark.parametrize("method", ["gd", "sarah-c", "vrsc-pg"])
def test_portfolio_reaches_its_closed_form(method: str) -> None:
    problem = portfolio(RETURNS)
    best, value = portfolio_optimum(RETURNS)
    sample = np.cov(RETURNS.T, bias=True)
    np.testing.assert_allclose(2 * sample @ best, RETURNS.mean(0), atol=1e-12)
    assert float(composed(problem)(torch.from_numpy(best))) == pytest.approx(value, abs=1e-12)
    result = minimize_compositional(
        problem, np.ones(4), method, lr=0.1, batch=8, q=5, max_iter=3000, tol=1e-7
    )
    assert result.success
    assert result.fun - value < 1e-8
    np.testing.assert_allclose(result.x, best, atol=1e-6)


def test_bellman_is_least_squares() -> None:
    rng = np.random.default_rng(5)
    P = rng.random((12, 12))
    P /= P.sum(1, keepdims=True)
    phi, R, gamma = rng.random((12, 3)), rng.random((12, 12)), 0.9
    problem = bellman(phi, P, R, gamma)
    solution, residual, *_ = np.linalg.lstsq(phi - gamma * P @ phi, (P * R).sum(1), rcond=None)
    w = rng.standard_normal(3)
    direct = np.mean((phi @ w - (P * (R + gamma * (phi @ w))).sum(1)) ** 2)
    assert float(composed(problem)(torch.from_numpy(w))) == pytest.approx(direct, rel=1e-13)
    assert problem.optimum == pytest.approx(residual[0] / 12, rel=1e-10)
    # The unbiasedness that the authors' self-normalised batches lack: single samples average out.
    single = torch.stack(
        [problem.inner(torch.from_numpy(w), torch.tensor([j]))[0] for j in range(12)]
    )
    exact = phi @ w - (P * (R + gamma * (phi @ w))).sum(1)
    np.testing.assert_allclose(single.mean(0), exact, atol=1e-13)
    result = minimize_compositional(problem, np.zeros(3), "gd", lr=0.5, max_iter=20000, tol=1e-9)
    assert result.success
    np.testing.assert_allclose(result.x, solution, atol=1e-6)


def test_frozen_lake_value_is_that_of_value_iteration() -> None:
    import gymnasium

    table = gymnasium.make("FrozenLake-v1").unwrapped.P
    value = np.zeros(16)
    for _ in range(2000):
        value = np.array([
            np.mean([
                sum(p * (r + 0.95 * value[s] * (not done)) for p, s, r, done in table[i][a])
                for a in range(4)
            ])
            for i in range(16)
        ])  # fmt: skip
    problem = gymnasium_bellman("FrozenLake-v1", gamma=0.95)
    assert problem.optimum == pytest.approx(0, abs=1e-25)
    assert float(composed(problem)(torch.from_numpy(value))) == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("name", ["portfolio", "bellman", "sne", "tanh"])
def test_analytic_derivatives_are_autograds(name: str) -> None:
    rng = np.random.default_rng(2)
    P = rng.random((6, 6))
    P /= P.sum(1, keepdims=True)
    problem, size = {
        "portfolio": (portfolio(RETURNS), 4),
        "bellman": (bellman(rng.random((6, 3)), P, rng.random((6, 6))), 3),
        "sne": (sne(P / 6, 2), 12),
        "tanh": (tanh_regression(6, 3, 2), 6),
    }[name]
    x, rows = torch.from_numpy(rng.standard_normal(size)), torch.tensor([0, 3, 3, 5])
    batch = type(problem.draw(0, 1, torch.Generator()))(rows, 4)
    expected = torch.func.jacrev(lambda z: problem.inner(z, rows).mean(0))(x)
    torch.testing.assert_close(problem.jacobian(x, batch), expected)
    y = problem.inner(x, torch.arange(6)).mean(0)
    slope = torch.func.grad(lambda z: problem.outer(z, rows).mean())(y)
    torch.testing.assert_close(problem.outer_gradient(y, batch), slope)


def test_sne_is_the_published_sum() -> None:
    rng = np.random.default_rng(4)
    P = rng.random((5, 5))
    w = rng.standard_normal((5, 2))
    squared = ((w[:, None] - w[None]) ** 2).sum(-1)
    s = np.exp(-squared).sum(1) - 1
    expected = (P * squared).sum() + (P * np.log(s)[:, None]).sum()
    found = composed(sne(P, 2))(torch.from_numpy(w.ravel()))
    assert float(found) == pytest.approx(expected, rel=1e-13)
