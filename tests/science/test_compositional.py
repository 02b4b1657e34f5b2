"""minimize_compositional: results, budgets, online problems, the torch optimizer, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparring.science import compositional_examples as examples
from sparring.science.compositional import (
    METHODS,
    CompositionalProblem,
    Smoothness,
    minimize_compositional,
)
from sparring.science.compositional_optimizer import CompositionalOptimizer
from sparring.science.returns import monthly_returns, synthetic_returns

TANH = examples.tanh_regression(40, 3, 2)
START = np.array([-2.0, 1, 0, 2, -1, 1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_down_and_repeats_itself(method: str) -> None:
    def run(seed: int):
        return minimize_compositional(TANH, START, method, lr=0.3, batch=4, max_ifo=3000, seed=seed)

    result, again, other = run(1), run(1), run(2)
    assert result.success
    assert result.fun < result.history["fun"][0] / 3
    assert result.fun == result.history["fun"][-1]
    assert np.array_equal(result.x, again.x)
    assert method == "gd" or not np.array_equal(result.x, other.x)
    assert (np.diff(result.history["ifo"]) > 0).all()
    assert result["grad_norm"] == result.grad_norm  # scipy's result: keys and attributes


def test_the_monitor_is_exact_and_free() -> None:
    often = minimize_compositional(TANH, np.ones(6), lr=0.1, max_iter=30, records=30)
    rarely = minimize_compositional(TANH, np.ones(6), lr=0.1, max_iter=30, records=1)
    assert often.n_ifo == rarely.n_ifo
    assert len(often.history["fun"]) == 31
    assert len(rarely.history["fun"]) == 2
    assert np.array_equal(often.x, rarely.x)
    rows = torch.arange(40)
    exact = TANH.outer(TANH.inner(torch.from_numpy(often.x), rows).mean(0), rows).mean()
    assert often.fun == pytest.approx(float(exact), rel=1e-14)


def online() -> CompositionalProblem:
    """g = E(x + w) = x, f = E ½|y − v|², v around (1, −1): the minimum is there."""
    centre = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        return torch.randn(size, 2, generator=generator, dtype=torch.float64)

    return CompositionalProblem(
        lambda x, w: x + w,
        lambda y, v: ((y - centre - v) ** 2).sum(1) / 2,
        draw_inner=draw,
        draw_outer=draw,
    )


@pytest.mark.parametrize("method", ["sarah-c", "storm-c", "vrsc-pg", "scgd"])
def test_online(method: str) -> None:
    result = minimize_compositional(
        online(), np.zeros(2), method, lr=0.05, q=50, batch=4,
        anchor_batch=2000, max_iter=150, monitor_samples=50_000, records=1,
    )  # fmt: skip
    np.testing.assert_allclose(result.x, [1, -1], atol=0.35 if method == "scgd" else 0.12)


def test_theory_defaults() -> None:
    """q = (2m+n)/3 for batches of 1; η = 1/√(6 (2m+n) (M_g⁴L_f² + M_f²L_g²))."""
    problem = CompositionalProblem(
        TANH.inner, TANH.outer, inner_count=6, outer_count=9,
        smoothness=Smoothness(g=1.0, dg=2.0, f=3.0, df=4.0),
    )  # fmt: skip
    points: list[Tensor] = []
    counted = []

    def see(iterate) -> None:
        points.append(iterate.x)
        counted.append(iterate.estimates["F"].clone())

    result = minimize_compositional(problem, np.ones(6), max_iter=8, callback=see)
    lr = 1 / np.sqrt(6 * 21 * (16 + 9 * 4))
    torch.testing.assert_close(points[1], points[0] - lr * counted[0])
    assert result.n_ifo["g"] == 2 * 6 + 6 * 2  # anchors at 0 and 7


def test_tolerance_random_output_schedules_and_normalised_steps() -> None:
    reached = minimize_compositional(TANH, np.ones(6), "gd", lr=1.0, max_iter=5000, tol=1e-3)
    assert reached.success
    assert reached.nit < 5000
    assert "tol" in reached.message
    missed = minimize_compositional(TANH, np.ones(6), "gd", lr=0.1, max_iter=3, tol=1e-3)
    assert not missed.success
    seen: list[Tensor] = []
    drawn = minimize_compositional(
        TANH, np.ones(6), lr=0.1, max_iter=30, output="random", callback=lambda i: seen.append(i.x)
    )
    assert any(np.array_equal(drawn.x, x) for x in [np.ones(6), *seen[:-1]])
    once = minimize_compositional(TANH, np.ones(6), lr=0.1, max_iter=1, output="random")
    assert np.array_equal(once.x, np.ones(6))  # x_1 is not among x_0 to x_{T-1}
    falling = minimize_compositional(
        TANH, np.ones(6), "scgd", lr=lambda t: 0.5 * (1 + t) ** -0.75,
        averaging=lambda t: (1 + t) ** -0.5, max_iter=200,
    )  # fmt: skip
    assert falling.fun < falling.history["fun"][0]
    seen.clear()
    minimize_compositional(
        TANH, START, "storm-c", lr=0.1, normalize=1e-4, max_iter=20,
        callback=lambda i: seen.append(i.x),
    )  # fmt: skip
    steps = torch.stack(seen).diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, torch.full_like(steps, 1e-5))


def test_divergence_is_a_failure_that_names_the_step_length() -> None:
    returns = synthetic_returns(20, 3)
    result = minimize_compositional(
        examples.portfolio(returns), np.ones(3), "gd", lr=1e3, max_iter=400
    )
    assert not result.success
    assert "smaller lr" in result.message
    assert result.nit < 400


def test_a_start_that_is_not_finite_and_a_spent_budget_say_so() -> None:
    nowhere = CompositionalProblem(
        lambda x, rows: x.log().expand(len(rows), -1),
        lambda y, rows: y.sum().expand(len(rows)),
        inner_count=4,
        outer_count=4,
    )
    result = minimize_compositional(nowhere, -np.ones(2), "gd", lr=0.1, max_iter=5)
    assert not result.success
    assert result.nit == 0
    assert "at x0: start where both are finite" in result.message
    spent = minimize_compositional(TANH, np.ones(6), "gd", lr=0.1, max_ifo=200)
    assert spent.message == "the budget is spent: 200 IFO calls"
    assert spent.nit == 1


@pytest.mark.parametrize(
    ("problem", "size"),
    [
        (examples.portfolio(synthetic_returns(30, 4)), 4),
        (examples.random_bellman(8, 3), 3),
        (TANH, 6),
        (examples.digits_sne(20, perplexity=5.0), 40),
    ],
    ids=["portfolio", "bellman", "tanh", "sne"],
)
def test_examples_take_the_number_type_of_x0(problem: CompositionalProblem, size: int) -> None:
    start = torch.linspace(-0.3, 0.4, size, dtype=torch.float64)

    def run(dtype: torch.dtype):
        options = {"lr": 0.01, "batch": 4, "max_iter": 5}
        return minimize_compositional(problem, start.to(dtype), "sarah-c", **options)

    single, double = run(torch.float32), run(torch.float64)
    np.testing.assert_allclose(single.x, double.x, rtol=1e-3, atol=1e-4)
    assert np.array_equal(single.x, single.x.astype(np.float32))
    assert not np.array_equal(single.x, double.x)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["sarah-c", "scgd"])
def test_on_a_gpu(method: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    data = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(device: str) -> np.ndarray:
        here = data.to(device)
        problem = CompositionalProblem(
            lambda x, rows: torch.tanh(here[rows.to(device)] * x),
            lambda y, rows: ((y - here[rows.to(device)]) ** 2).sum(1),
            inner_count=20,
            outer_count=20,
        )
        start = torch.zeros(3, dtype=torch.float64, device=device)
        return minimize_compositional(problem, start, method, lr=0.05, max_iter=9, batch=4).x

    np.testing.assert_allclose(run("cuda"), run("cpu"), atol=1e-10)


class Net(nn.Module):
    """The tanh problem as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        return TANH.inner(self.weight.reshape(-1), rows) + self.shift


@pytest.mark.parametrize("method", METHODS)
def test_the_torch_optimizer_is_minimize_compositional(method: str) -> None:
    net = Net()
    options = {"lr": 0.2, "method": method, "q": 4, "batch": 3, "seed": 7}
    optimizer = CompositionalOptimizer(
        net.parameters(), TANH.outer, inner_count=40, outer_count=40, **options
    )
    for _ in range(11):
        optimizer.step(net)
    flat = CompositionalProblem(
        lambda x, rows: TANH.inner(x[:6], rows) + x[6:], TANH.outer, inner_count=40, outer_count=40
    )
    start = np.concatenate([np.ones(6), np.zeros(3)])
    result = minimize_compositional(flat, start, max_iter=11, **options)
    found = torch.cat([net.weight.reshape(-1), net.shift]).detach()
    np.testing.assert_allclose(found, result.x, rtol=0, atol=1e-12)
    assert optimizer.n_ifo == result.n_ifo


def test_the_torch_optimizer_resumes_exactly() -> None:
    def make(net: Net) -> CompositionalOptimizer:
        return CompositionalOptimizer(
            net.parameters(), TANH.outer, inner_count=40, outer_count=40, lr=0.2, q=6, batch=2
        )

    net, resumed = Net(), Net()
    optimizer = make(net)
    for _ in range(4):
        optimizer.step(net)
    resumed.load_state_dict(net.state_dict())
    second = make(resumed)
    second.load_state_dict(optimizer.state_dict())
    for _ in range(5):
        optimizer.step(net)
        second.step(resumed)
    assert torch.equal(net.weight, resumed.weight)
    third = CompositionalOptimizer(
        Net().parameters(), TANH.outer, inner_count=40, outer_count=40, lr=0.2, method="scgd"
    )
    with pytest.raises(ValueError, match="sarah-c"):
        third.load_state_dict(optimizer.state_dict())
    wider = CompositionalOptimizer(
        Net().parameters(), TANH.outer, inner_count=40, outer_count=40, lr=0.2, q=6, batch=3
    )
    with pytest.raises(ValueError, match=r"of batch \(2, 2, 2\), this optimizer of \(3, 3, 3\)"):
        wider.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()


def test_real_data() -> None:
    returns = monthly_returns()
    assert returns.shape == (819, 30)
    assert 0.5 < returns.mean() < 2  # percent a month
    assert np.isfinite(examples.portfolio(returns).optimum)
    P = examples.neighbour_probabilities(np.random.default_rng(0).random((30, 4)), 5.0)
    assert P.sum() == pytest.approx(1)
    np.testing.assert_allclose(P, P.T)
    problem = examples.digits_sne(40, perplexity=8.0)
    start = np.random.default_rng(0).standard_normal(80) / 10
    result = minimize_compositional(problem, start, lr=0.5, batch=8, max_iter=40)
    assert result.fun < result.history["fun"][0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "adam"}, "sarah-c"),
        ({"lr": 0.0}, "positive"),
        ({"lr": None}, "give lr="),
        ({"q": 0}, "q must be at least 1"),
        ({"batch": 0}, "at least 1 sample"),
        ({"batch": (1, 0, 1)}, "at least 1 sample"),
        ({"batch": (1, 2)}, r"one whole number or three.*got \(1, 2\)"),
        ({"batch": 2.5}, "one whole number or three.*got 2.5"),
        ({"method": "sarah-c", "anchor_batch": "all"}, "anchor_batch must be one whole number"),
        ({"method": "asc-pg", "averaging": lambda t: 0.0}, r"averaging\(0\) must be in \(0, 1\]"),
        ({"method": "scgd", "averaging": lambda t: 1 - t}, r"averaging\(1\) must be in \(0, 1\]"),
        ({"lr": lambda t: float("nan")}, r"lr\(0\) must be finite"),
        ({"max_iter": None}, "budget"),
        ({"max_iter": 0}, "max_iter"),
        ({"tol": -1.0}, "tol"),
        ({"output": "best"}, "random"),
        ({"averaging": 0.5}, "leave it out"),
        ({"method": "scgd", "averaging": 1.5}, r"\(0, 1\]"),
        ({"normalize": 0.0}, "normalize"),
        ({"jacobian_limit": 17}, "3 · 6 = 18 entries.*scgd"),
        ({"method": "gd", "anchor_batch": 3}, "leave anchor_batch out"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        minimize_compositional(TANH, np.ones(6), **{"lr": 0.1, "max_iter": 2, **options})


def test_numpys_whole_numbers_are_batches() -> None:
    options = {"lr": 0.1, "max_iter": 3}
    found = minimize_compositional(TANH, np.ones(6), batch=np.int64(3), **options)
    assert found.n_ifo == minimize_compositional(TANH, np.ones(6), batch=3, **options).n_ifo


def test_derivatives_of_the_wrong_shape() -> None:
    counts = {"inner_count": 40, "outer_count": 40}
    for shape in ((6, 3), (2, 6), (3, 5), (3,)):
        bad = CompositionalProblem(
            TANH.inner, TANH.outer, **counts,
            inner_jacobian=lambda x, rows, shape=shape: x.new_zeros(shape),
        )  # fmt: skip
        for method in ("sarah-c", "scgd", "gd"):
            with pytest.raises(ValueError, match=r"inner_jacobian must return .* = \(3, 6\), got"):
                minimize_compositional(bad, np.ones(6), method, lr=0.1, max_iter=1)
    bad = CompositionalProblem(
        TANH.inner, TANH.outer, **counts, outer_gradient=lambda y, rows: y[:, None]
    )
    with pytest.raises(ValueError, match=r"outer_gradient must return .* = \(3,\), got \(3, 1\)"):
        minimize_compositional(bad, np.ones(6), lr=0.1, max_iter=1)


def test_a_large_jacobian_is_fine_without_one() -> None:
    for method in ("scgd", "asc-pg", "gd"):
        minimize_compositional(TANH, np.ones(6), method, lr=0.1, max_iter=2, jacobian_limit=17)


def test_bad_problems() -> None:
    good = {"inner_count": 4, "outer_count": 4}
    with pytest.raises(ValueError, match="draw_inner"):
        CompositionalProblem(TANH.inner, TANH.outer, inner_count=4)
    with pytest.raises(ValueError, match="at least 1"):
        CompositionalProblem(TANH.inner, TANH.outer, inner_count=0, outer_count=1)
    flat = CompositionalProblem(lambda x, rows: x, TANH.outer, **good)
    with pytest.raises(ValueError, match="one row a sample"):
        minimize_compositional(flat, np.ones(6), lr=0.1, max_iter=1)
    scalar = CompositionalProblem(TANH.inner, lambda y, rows: y.sum(), **good)
    with pytest.raises(ValueError, match="one number a sample"):
        minimize_compositional(scalar, np.ones(6), lr=0.1, max_iter=1)
    with pytest.raises(ValueError, match="vector"):
        minimize_compositional(TANH, np.ones((3, 2)), lr=0.1, max_iter=1)
    with pytest.raises(ValueError, match="finite"):
        minimize_compositional(TANH, np.full(6, np.nan), lr=0.1, max_iter=1)
    with pytest.raises(ValueError, match="online"):
        minimize_compositional(online(), np.zeros(2), "gd", lr=0.1, max_iter=1)
    with pytest.raises(ValueError, match="anchor_batch"):
        minimize_compositional(online(), np.zeros(2), lr=0.1, max_iter=1)
    with pytest.raises(ValueError, match="at least 0"):
        Smoothness(g=-1.0, dg=0, f=0, df=0)


def test_bad_examples() -> None:
    with pytest.raises(ValueError, match="singular"):
        examples.portfolio(np.random.default_rng(0).random((3, 5)))
    with pytest.raises(ValueError, match="probabilities"):
        examples.bellman(np.eye(2), np.array([[0.9, 0.9], [0, 1]]), np.ones(2))
    with pytest.raises(ValueError, match="gamma"):
        examples.bellman(np.eye(2), np.eye(2), np.ones(2), gamma=1.0)
    with pytest.raises(ValueError, match="rewards"):
        examples.bellman(np.eye(2), np.eye(2), np.ones(3))
    with pytest.raises(ValueError, match="perplexity"):
        examples.neighbour_probabilities(np.eye(4), 9.0)
    with pytest.raises(ValueError, match="FrozenLake"):
        examples.gymnasium_bellman("CartPole-v1")


def test_parameters_of_two_kinds_are_refused() -> None:
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]
    with pytest.raises(ValueError, match="share one type"):
        CompositionalOptimizer(mixed, TANH.outer, inner_count=4, outer_count=4, lr=0.1)
    net = Net()
    groups = [{"params": [net.weight]}, {"params": [net.shift]}]
    with pytest.raises(ValueError, match="one group"):
        CompositionalOptimizer(groups, TANH.outer, inner_count=4, outer_count=4, lr=0.1)
