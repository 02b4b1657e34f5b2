"""admm, its sampled form, batched paths, consensus over ranks, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.linear_model import Lasso

from sparring.launch.processes import free_port
from sparring.science.admm import (
    L1,
    AdmmProblem,
    Huber,
    LeastSquares,
    Logistic,
    NoisyFunction,
    Quadratic,
    Ridge,
    Scheme,
    _Iteration,
    admm,
    difference_matrix,
    quadratic,
)
from sparring.science.admm_consensus import _Ranks, consensus_admm
from sparring.science.admm_moments import LinearRecursion
from sparring.science.admm_paths import AdmmPaths, admm_paths
from sparring.science.sme import sme

RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((60, 4))
TARGET = DATA @ np.array([1.0, 0, -2, 0.3]) + 0.3 * RNG.standard_normal(60)
SQUARES = LeastSquares(DATA, TARGET)
TINY = quadratic([[2.0, 0], [0, 1]], [1.0, -1], [[1.0, 0], [0.5, 2]], 0.5)


def cubic() -> NoisyFunction:
    return NoisyFunction(
        2, lambda x: (x**4 / 4 + x**2).sum(), lambda x: torch.diag(0.1 * x), 2, "rademacher"
    )


def test_the_result() -> None:
    result = admm(AdmmProblem(SQUARES, L1(0.1)), 1.0)
    assert result.success
    # One gradient an iteration, at 0; the Hessian of all rows is factored once.
    assert result.n_ifo == {"df": 60 * result.nit, "d2f": 60}
    assert result.fun == result.history["fun"][-1]
    assert result.history["nit"][-1] == result.nit
    assert (np.diff(result.history["nit"]) > 0).all()
    assert result.residual <= 1e-8 * 20
    short = admm(AdmmProblem(SQUARES, L1(0.1)), 1.0, max_iter=2)
    assert not short.success
    assert "2 iterations" in short.message


@pytest.mark.parametrize("options", [{}, {"omega": 1, "omega1": 1, "tau": 200.0}])
def test_batches_end_near_the_optimum_and_count_their_samples(options: dict) -> None:
    problem = AdmmProblem(SQUARES, Ridge(0.1))
    exact = np.linalg.solve(DATA.T @ DATA / 60 + 0.1 * np.eye(4), DATA.T @ TARGET / 60)
    result = admm(problem, 200.0, **options, batch=8, max_iter=3000, seed=1)
    again = admm(problem, 200.0, **options, batch=8, max_iter=3000, seed=1)
    assert result.n_ifo == {"df": 24_000, "d2f": 0 if options else 24_000}
    assert np.array_equal(result.x, again.x)
    assert result.success
    expected = sme(problem, 200.0, **options, batch=8).local.stationary_cov
    assert np.abs(result.x - exact).max() < 5 * np.sqrt(np.diag(expected).max())
    assert np.abs(result.x - exact).max() > 1e-6


class Watched(Logistic):
    """A loss that notes what it is asked for, and of how many rows."""

    def __init__(self) -> None:
        super().__init__(DATA, np.sign(TARGET))
        self.asked: dict[str, list[int]] = {"df": [], "d2f": []}

    def gradient(self, x, xi=None):
        self.asked["df"].append(60 if xi is None else len(xi))
        return super().gradient(x, xi)

    def hessian(self, x, xi=None):
        self.asked["d2f"].append(60 if xi is None else len(xi))
        return super().hessian(x, xi)


@pytest.mark.parametrize(
    "options", [{}, {"omega1": 1.0, "tau": 5.0}, {"omega1": 0.5, "tau": 5.0}], ids=str
)
@pytest.mark.parametrize("batch", [None, 8])
def test_costs_are_what_the_loss_was_asked_for(options: dict, batch: int | None) -> None:
    f = Watched()
    result = admm(AdmmProblem(f, L1(0.05)), 20.0, **options, batch=batch, max_iter=40,
                  records=1, **({"tol": 0.0} if batch is None else {}))  # fmt: skip
    # The monitor asks for all rows: at the two records, and where a run may be done.
    asked = {kind: sum(counts) for kind, counts in f.asked.items()}
    assert result.n_ifo["d2f"] == asked["d2f"]
    if batch is None:
        assert asked["df"] - result.n_ifo["df"] in range(120, 60 * 43, 60)
    else:
        assert asked["df"] - result.n_ifo["df"] == 120
    newton = 0 if options.get("omega1") == 1 else 2 * 40 * (batch or 60)
    assert result.n_ifo["d2f"] >= newton  # more than one step each
    assert result.n_ifo["df"] == result.n_ifo["d2f"] + (40 * (batch or 60) if options else 0)


def test_sampled_consensus_looks_at_all_rows_once() -> None:
    f = Watched()
    result = consensus_admm([f, f], L1(0.05), 20.0, batch=8, max_iter=30)
    assert f.asked["df"].count(60) == 2  # grad_norm, of each loss
    assert sum(f.asked["df"]) - 120 == result.n_ifo["df"]
    assert sum(f.asked["d2f"]) == result.n_ifo["d2f"]
    slopes = [f.gradient(x) + 20.0 * u for x, u in zip(result.x_local, result.u, strict=True)]
    assert result.grad_norm == pytest.approx(np.linalg.norm(slopes))


def test_the_spread_of_sampled_runs_is_the_equations() -> None:
    """Rows drawn with replacement: the covariance of the gradient is computed, not assumed."""
    problem = AdmmProblem(SQUARES, Ridge(0.1))
    model = sme(problem, 50.0, 1.0, 1.0, 50.0, omega1=1.0, batch=4)
    iterate, rng = _Iteration(problem, model.scheme), np.random.default_rng(0)
    state, seen = iterate.start(model.optimum), []
    for k in range(12_000):
        state = iterate(state, problem.f.draw(rng, 4))
        if k > 500:
            seen.append(state.x)
    expected = np.sqrt(np.diag(model.local.stationary_cov))
    np.testing.assert_allclose(np.std(seen, axis=0), expected, rtol=0.2)


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 1.5, "omega": 0.3, "omega1": 0.5, "tau": 2.0},
                {"omega": 1.0, "omega1": 1.0, "tau": 5.0}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["quadratic", "noisy"])
def test_paths_are_single_runs(name: str, options: dict) -> None:
    problem = TINY if name == "quadratic" else AdmmProblem(cubic(), Huber(0.3, 0.2))
    scheme = Scheme(rho=4.0, **options)
    start = torch.tensor([[1.0, -0.5], [0.3, 2.0], [0.0, 0.1]], dtype=torch.float64)
    paths = AdmmPaths(problem, scheme, start)
    single = _Iteration(problem, scheme)
    states = [single.start(x.numpy()) for x in start]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        normals = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        paths.step(normals)
        xi = (normals if name == "quadratic" else normals.sign()).numpy()
        states = [single(state, one) for state, one in zip(states, xi, strict=True)]
    np.testing.assert_allclose(paths.x, [state.x for state in states], rtol=0, atol=1e-12)
    np.testing.assert_allclose(paths.u, [state.u for state in states], rtol=0, atol=1e-12)


def test_moments_of_many_paths() -> None:
    scheme = Scheme(rho=10.0, alpha=1.5)
    x = admm_paths(TINY, scheme, torch.ones(2).double(), steps=20, n_paths=20_000, batch=2)
    recursion = LinearRecursion(TINY, scheme, batch=2)
    mean, cov = recursion.of_x(recursion.moments([1.0, 1.0], 20))
    np.testing.assert_allclose(x.mean(0), mean, atol=4 * np.sqrt(cov.max() / 20_000))
    np.testing.assert_allclose(np.cov(x.T), cov, atol=0.05 * cov.max())


@pytest.mark.parametrize("penalty", [Ridge(0.7), L1(0.7), Huber(0.7, 0.3), L1([0.0, 0.5, 2.0])])
def test_prox_and_gradient(penalty) -> None:
    """The prox against a fine grid; numpy and torch agree; gradients against differences."""
    v = np.array([1.3, -0.2, 0.05])
    grid = np.linspace(-2, 2, 400_001)
    found = penalty.prox(v, 0.6)
    for i in range(3):
        one = type(penalty)(
            penalty.beta[i] if penalty.beta.ndim else penalty.beta,
            *([penalty.delta] if isinstance(penalty, Huber) else []),
        )
        values = np.array([one.value(np.array([z])) for z in (grid[i::1000])])
        near = grid[i::1000][np.argmin(values + (grid[i::1000] - v[i]) ** 2 / 1.2)]
        assert found[i] == pytest.approx(near, abs=0.011)
    np.testing.assert_array_equal(penalty.prox(torch.from_numpy(v), 0.6).numpy(), found)
    if penalty.smooth:
        # The prox's optimality, and the gradient as a difference quotient.
        np.testing.assert_allclose(found + 0.6 * penalty.gradient(found), v, atol=1e-14)
        for i, e in enumerate(np.eye(3) * 1e-6):
            change = penalty.value(v + e) - penalty.value(v - e)
            assert penalty.gradient(v)[i] == pytest.approx(change / 2e-6, abs=1e-6)
            bend = (penalty.gradient(v + e) - penalty.gradient(v - e))[i] / 2e-6
            assert penalty.curvature(v)[i] == pytest.approx(bend, abs=1e-6)
    else:
        with pytest.raises(ValueError, match="Huber"):
            penalty.gradient(v)


@pytest.mark.parametrize("term", [SQUARES, Logistic(DATA, np.sign(TARGET), 2.0), TINY.f, cubic()])
def test_derivatives_and_noise(term) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal(term.dimension)
    for e in np.eye(term.dimension) * 1e-6:
        change = (term.value(x + e) - term.value(x - e)) / 2e-6
        assert term.gradient(x) @ e / 1e-6 == pytest.approx(change, abs=1e-6)
        bend = (term.gradient(x + e) - term.gradient(x - e)) / 2e-6
        np.testing.assert_allclose(term.hessian(x) @ e / 1e-6, bend, atol=1e-6)
    paths = term.gradient_paths(torch.from_numpy(np.stack([x, 2 * x])))
    np.testing.assert_allclose(paths[1], term.gradient(2 * x), atol=1e-12)
    points = torch.from_numpy(np.stack([x, 2 * x]))
    xi = torch.from_numpy(rng.standard_normal((2, term.noise(x).shape[1])))
    by_factor = (term.noise_paths(points) @ xi[:, :, None])[:, :, 0]
    torch.testing.assert_close(term.noise_times(points, xi), by_factor)
    sampled = np.stack([term.gradient(x, term.draw(rng, 1)) for _ in range(2000)])
    sigma = term.noise(x)
    scale = np.abs(sigma @ sigma.T).max()
    np.testing.assert_allclose(np.cov(sampled.T), sigma @ sigma.T, atol=0.15 * scale)
    np.testing.assert_allclose(sampled.mean(0), term.gradient(x), atol=5 * np.sqrt(scale / 2000))


def test_consensus_alone_is_admm() -> None:
    fitted = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14).fit(DATA, TARGET)
    result = consensus_admm(SQUARES, L1(0.1), 1.0, 1.5, tol=1e-13)
    assert result.success
    np.testing.assert_allclose(result.x, fitted.coef_, atol=1e-10)
    noisy = consensus_admm(SQUARES, L1(0.1), 50.0, batch=8, max_iter=400)
    assert 1e-4 < np.abs(noisy.x - fitted.coef_).max() < 0.3


def test_consensus_reduces_where_the_backend_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL knows no tensors on the CPU; the device "meta" plays the accelerator."""
    sent: list[str] = []

    class Sent(Exception):
        """The collective is reached."""

    def record(tensor: torch.Tensor, **_: object) -> None:
        sent.append(tensor.device.type)
        raise Sent

    ranks = _Ranks(None, 1)
    ranks._shared = True
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    assert ranks._device() == "cuda"
    monkeypatch.setattr(ranks, "_device", lambda: "meta")
    monkeypatch.setattr(dist, "all_reduce", record)
    with pytest.raises(Sent):
        ranks.sum(np.ones(2))
    assert sent == ["meta"]


def test_bad_consensus() -> None:
    with pytest.raises(ValueError, match="beta has 3 entries, A 4 rows"):
        consensus_admm(SQUARES, L1([0.1, 0.1, 0.1]), 1.0)
    with pytest.raises(ValueError, match=r"A must have shape \(M, 2\)"):
        consensus_admm([SQUARES, TINY.f], L1(0.1), 1.0)
    for x0 in ([0.0, 0, 0], [0.0, 0, 0, np.nan]):
        with pytest.raises(ValueError, match=r"x0 must be finite of shape \(4,\)"):
            consensus_admm(SQUARES, L1(0.1), 1.0, x0=x0)


@pytest.mark.dist
def test_consensus_over_two_ranks(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("consensus_worker.py")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    out = tmp_path / "out.json"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(worker), str(out)],
            env={**os.environ, **place, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], outputs[0][-2000:]
    found = json.loads(out.read_text())
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 5))
    target = rows @ np.array([1.0, 0, -2, 0, 0.5]) + 0.1 * rng.standard_normal(60)
    fitted = Lasso(alpha=0.2, fit_intercept=False, tol=1e-14).fit(rows, target)
    for name in ("standard", "gradient-based"):
        assert found[name]["success"]
        np.testing.assert_allclose(found[name]["x"], fitted.coef_, atol=1e-10)
    assert found["noisy"][0] == found["noisy"][1]  # the ranks agree to the last bit
    assert np.abs(np.array(found["noisy"][0]) - fitted.coef_).max() < 0.3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rho": 0.0}, "rho must be positive"),
        ({"rho": float("inf")}, "rho must be positive"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 2\), got 0.0"),
        ({"alpha": 2.0}, r"alpha must be in \(0, 2\), got 2.0"),
        ({"omega": 1.1, "tau": 1.0}, "omega must be in"),
        ({"omega1": -0.1}, "omega1 must be in"),
        ({"tau": -1.0}, "tau must be"),
        ({"omega": 1.0}, "give tau > 0"),
        ({"alpha": 1.8, "omega": 1.0, "tau": 0.4}, "unstable.*take tau > 0.444"),
        ({"alpha": 0.4, "omega": 1.0, "tau": 0.37}, "unstable.*take tau > 0.375"),
        ({"batch": 0}, "batch"),
        ({"batch": 2, "tol": 1e-3}, "leave tol out"),
        ({"tol": -1.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"x0": [1.0, 2.0]}, "x0 must be"),
    ],
)
def test_bad_options(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        admm(AdmmProblem(SQUARES, Ridge(0.1)), **{"rho": 1.0, **options})


def test_a_tau_too_small_for_f_is_reported() -> None:
    steep = AdmmProblem(Quadratic(100 * np.eye(2), np.ones(2)), Ridge(0.1))
    result = admm(steep, 1.0, omega=1, omega1=1, tau=2.0, max_iter=1000)
    assert not result.success
    assert "larger tau" in result.message


def test_singular_systems() -> None:
    flat = quadratic(np.diag([1.0, 0.0]), [1.0, 0.0], np.eye(2), 1.0, [[1.0, 0.0]])
    with pytest.raises(ValueError, match=r"no unique solution.*tau > 0"):
        admm(flat, 1.0)
    assert admm(flat, 1.0, tau=0.1).success
    with pytest.raises(ValueError, match=r"M = .* must be positive definite.*take tau > 0"):
        sme(flat, 1.0)
    assert sme(flat, 1.0, tau=0.1).M[1, 1] == pytest.approx(0.1)
    # Fewer rows in a batch than variables, an A without full column rank: not every ξ has one.
    with pytest.raises(ValueError, match=r"no unique|singular up to rounding"):
        admm(AdmmProblem(SQUARES, Ridge(1.0), np.ones((1, 4))), 1.0, batch=1)


def test_bad_problems() -> None:
    with pytest.raises(ValueError, match=r"\(M, 4\).*\(4, 3\); transpose it"):
        AdmmProblem(SQUARES, Ridge(1.0), np.ones((4, 3)))
    with pytest.raises(ValueError, match="2 axes"):
        AdmmProblem(SQUARES, Ridge(1.0), np.ones(4))
    with pytest.raises(ValueError, match="beta has 3 entries, A 4 rows"):
        AdmmProblem(SQUARES, L1([1.0, 1, 1]))
    with pytest.raises(ValueError, match="at least 0"):
        L1(-1.0)
    with pytest.raises(ValueError, match="delta"):
        Huber(1.0, 0.0)
    with pytest.raises(ValueError, match="symmetric"):
        Quadratic([[1.0, 2], [0, 1]], [0, 0])
    with pytest.raises(ValueError, match="eigenvalue -1"):
        Quadratic([[1.0, 0], [0, -1]], [0, 0])
    with pytest.raises(ValueError, match="needs H"):
        Quadratic(np.eye(3), [0, 0])
    with pytest.raises(ValueError, match="as many targets"):
        LeastSquares(DATA, TARGET[:5])
    with pytest.raises(ValueError, match="finite"):
        LeastSquares(np.full((2, 2), np.nan), [0, 0])
    with pytest.raises(ValueError, match="weight"):
        LeastSquares(DATA, TARGET, 0.0)
    with pytest.raises(ValueError, match="2 \\* labels"):
        Logistic(DATA, np.arange(60) % 2)
    with pytest.raises(ValueError, match="rademacher"):
        NoisyFunction(1, lambda x: x.sum(), lambda x: x[:, None], law="cauchy")
    with pytest.raises(ValueError, match="order"):
        difference_matrix(3, 3)


def test_bad_equations() -> None:
    with pytest.raises(ValueError, match="L1 has kinks"):
        sme(AdmmProblem(SQUARES, L1(0.1)), 1.0)
    with pytest.raises(ValueError, match="unstable"):
        sme(TINY, 1.0, 1.5, 1.0, 0.3)
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 2\)"):
        sme(TINY, 1.0, 2.5)
    with pytest.raises(ValueError, match="batch"):
        sme(TINY, 1.0, batch=0)
    model = sme(TINY, 10.0)
    with pytest.raises(ValueError, match="em, tamed, exact"):
        model.simulate(2, 0.1, "milstein", t=1.0, x0=[0, 0])
    with pytest.raises(ValueError, match="dt > 0"):
        model.simulate(2, 0.0, t=1.0, x0=[0, 0])
    with pytest.raises(ValueError, match="at least two"):
        model.weak_error([0.1], t=1.0, x0=[0, 0])
    for x0 in ([0.0], [0.0, np.nan], [[0.0, 0.0]]):
        for ask in (
            lambda x: model.simulate(2, 0.1, t=1.0, x0=x),
            lambda x: model.mean_cov(1.0, x),
            lambda x: model.weak_error([0.1, 0.2], t=1.0, x0=x),
            lambda x: model.stopping_time(x),
            model.drift,
            model.diffusion,
        ):
            with pytest.raises(ValueError, match=r"must be finite of shape \(2,\)"):
                ask(x0)
    with pytest.raises(ValueError, match=r"t = 0.1 ends before .* ε = 0.2; raise t"):
        model.weak_error([0.1, 0.2], t=0.1, x0=[0, 0])
    with pytest.raises(ValueError, match="target_std"):
        model.advise(0.0)
    with pytest.raises(ValueError, match="stiffness"):
        model.advise(0.1, stiffness=2.0)
    with pytest.raises(ValueError, match="tolerance"):
        model.stopping_time([0, 0], 0.0)
    curved = sme(AdmmProblem(Logistic(DATA, np.sign(TARGET)), Ridge(0.1)), 10.0)
    with pytest.raises(ValueError, match="mean_cov is exact"):
        curved.mean_cov(1.0, np.zeros(4))
    with pytest.raises(ValueError, match="'em' or 'tamed'"):
        curved.simulate(2, 0.1, "exact", t=1.0, x0=np.zeros(4))
    with pytest.raises(ValueError, match="Quadratic f"):
        LinearRecursion(curved.problem, curved.scheme)
    with pytest.raises(ValueError, match="not Logistic"):
        curved.weak_error([0.1, 0.2], lambda x: x[:, 0], t=1.0, x0=np.zeros(4))
    silent = sme(quadratic(np.eye(2), [0, 0]), 1.0)
    for ask in (lambda: silent.advise(0.1), lambda: silent.stopping_time([1.0, 1.0])):
        with pytest.raises(ValueError, match="no noise"):
            ask()
    assert curved.simulate(3, 0.05, "em", t=0.2, x0=np.zeros(4)).shape == (3, 4)
