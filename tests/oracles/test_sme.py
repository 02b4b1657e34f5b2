"""The modified equation against ADMM's exact moments, scalar formulas and Monte Carlo."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from scipy.linalg import expm

from sparring.science import sme_weak
from sparring.science.admm import AdmmProblem, NoisyFunction, Ridge, Scheme, quadratic
from sparring.science.admm_moments import LinearRecursion
from sparring.science.sme import Sme, sme
from sparring.science.sme_linear import OrnsteinUhlenbeck

RNG = np.random.default_rng(0)
H = np.diag([1.0, 2.0, 0.5]) + 0.2
B, S, A = RNG.standard_normal(3), RNG.standard_normal((3, 3)), RNG.standard_normal((4, 3))
PROBLEM = quadratic(H, B, S, 0.7, A)
LAM = float(np.linalg.norm(A, 2) ** 2)
EPS = 2.0 ** -np.arange(5, 13)
START = np.array([1.0, -1.0, 2.0])
VARIANTS = {
    "standard .6": {"alpha": 0.6},
    "standard 1": {},
    "standard 1.5": {"alpha": 1.5},
    "linearised 1": {"omega": 1.0, "tau": 0.8 * LAM},
    "linearised 1.6": {"alpha": 1.6, "omega": 1.0, "tau": 0.8 * LAM},
    "gradient .5": {"alpha": 0.5, "omega": 1.0, "omega1": 1.0, "tau": 0.8 * LAM},
    "gradient 1": {"omega": 1.0, "omega1": 1.0, "tau": 0.8 * LAM},
    "mixed": {"omega": 0.3, "omega1": 0.5, "tau": 0.5},
}


def slope(values: list[float]) -> float:
    return float(np.polyfit(np.log(EPS), np.log(values), 1)[0])


def ou_moments(M: np.ndarray, eps: float, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of M dX = −∇V dt + √ε S dW by expm and numerical integration."""
    curve = H + 0.7 * A.T @ A
    rate, noise = np.linalg.solve(M, curve), math.sqrt(eps) * np.linalg.solve(M, S)
    centre = np.linalg.solve(curve, B)
    cov, _ = quad_vec(
        lambda s: expm(-rate * s) @ noise @ noise.T @ expm(-rate * s).T, 0, t, epsabs=1e-13
    )
    return centre + expm(-rate * t) @ (START - centre), cov


@pytest.mark.parametrize("name", VARIANTS)
def test_first_order_for_all_variants(name: str) -> None:
    """Spec §2: slope 1.00 of the mean, 2 of the covariance, which itself is of order ε."""
    error = sme(PROBLEM, 1.0, **VARIANTS[name]).weak_error(EPS, t=1.0, x0=START)
    assert error.slope == pytest.approx(1, abs=0.05)
    assert error.cov_slope == pytest.approx(2, abs=0.1)
    assert (error.stderr == 0).all()


@pytest.mark.parametrize("alpha", [0.6, 1.5])
def test_two_minus_alpha_is_wrong(alpha: float) -> None:
    """With (2 − α) AᵀA, the deterministic literature's matrix, the error stays where it is."""
    right, wrong = [], []
    for eps in EPS:
        recursion = LinearRecursion(PROBLEM, Scheme(rho=1 / eps, alpha=alpha))
        mean = recursion.of_x(recursion.moments(START, round(1 / eps))).mean
        for errors, factor in ((right, 1 / alpha), (wrong, 2 - alpha)):
            expected, _ = ou_moments(factor * A.T @ A, eps, 1.0)
            errors.append(float(np.linalg.norm(mean - expected)))
    assert slope(right) == pytest.approx(1, abs=0.05)
    assert abs(slope(wrong)) < 0.05
    assert min(wrong) > 0.05


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.5])
def test_residuals_are_of_second_order_for_alpha_1_only(alpha: float) -> None:
    means, stds = [], []
    for eps in EPS:
        recursion = LinearRecursion(PROBLEM, Scheme(rho=1 / eps, alpha=alpha))
        residual = recursion.of_residual(recursion.moments(START, round(0.5 / eps)))
        means.append(float(np.linalg.norm(residual.mean)))
        stds.append(math.sqrt(np.trace(residual.cov)))
    order = 2 if alpha == 1 else 1
    assert slope(means) == pytest.approx(order, abs=0.05)
    # A residual of one iteration holds one ξ: √ε of noise over ε of time.
    assert slope(stds) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("alpha", [0.7, 1.5])
def test_the_residual_is_the_predicted_multiple_of_the_speed(alpha: float) -> None:
    """r ≈ (1/α − 1) ε A dX/dt."""
    eps, steps = 2.0**-12, 2**11
    recursion = LinearRecursion(PROBLEM, Scheme(rho=1 / eps, alpha=alpha))
    residual = recursion.of_residual(recursion.moments(START, steps)).mean
    model = sme(PROBLEM, 1 / eps, alpha)
    speed = A @ model.drift(model.mean_cov(0.5, START).mean)
    np.testing.assert_allclose(residual, (1 / alpha - 1) * eps * speed, rtol=0.01)


def test_std_over_sqrt_eps_collapses() -> None:
    model = [sme(PROBLEM, 1 / eps, 1.5) for eps in EPS]
    scaled = [math.sqrt(m.mean_cov(1.0, START).cov[0, 0] / m.eps) for m in model]
    np.testing.assert_allclose(scaled, scaled[0], rtol=1e-10)
    recursion = LinearRecursion(PROBLEM, model[-1].scheme)
    found = recursion.of_x(recursion.moments(START, 2**12)).cov[0, 0] ** 0.5
    assert found / EPS[-1] ** 0.5 == pytest.approx(scaled[-1], rel=2e-3)


def test_mean_and_covariance_by_integration_and_by_hand() -> None:
    model = sme(PROBLEM, 20.0, 1.4, 0.2, 6.0)
    M = 0.3 * np.eye(3) + (1 / 1.4 - 0.2) * A.T @ A
    np.testing.assert_allclose(model.M, M)
    for t in (0.05, 0.7, 3.0):
        mean, cov = ou_moments(M, 1 / 20, t)
        found = model.mean_cov(t, START)
        np.testing.assert_allclose(found.mean, mean, atol=1e-11)
        np.testing.assert_allclose(found.cov, cov, atol=1e-11)
    far = model.mean_cov(1e5, START)  # the growing block of Van Loan's matrix must not overflow
    np.testing.assert_allclose(far.cov, model.local.stationary_cov, atol=1e-12)
    # Scalar: V'' = h + β, M = 1/α, Var = εσ²/(2 V'' M) (1 − e^{−2V''t/M}), over the batch.
    scalar = sme(quadratic([[2.0]], [1.0], [[0.5]], 1.0), 10.0, 1.6, batch=4)
    mean, cov = scalar.mean_cov(0.3, [2.0])
    rate = 3 * 1.6
    assert mean[0] == pytest.approx(1 / 3 + (2 - 1 / 3) * math.exp(-rate * 0.3), rel=1e-12)
    expected = 0.1 * 0.25 / 4 / (2 * 3 / 1.6) * (1 - math.exp(-2 * rate * 0.3))
    assert cov[0, 0] == pytest.approx(expected, rel=1e-12)


def test_drift_and_diffusion() -> None:
    model = sme(PROBLEM, 16.0, 1.5, batch=4)
    slope_ = (H + 0.7 * A.T @ A) @ START - B
    np.testing.assert_allclose(model.M @ model.drift(START), -slope_, atol=1e-12)
    square = model.M @ model.diffusion(START)
    np.testing.assert_allclose(square @ square.T, S @ S.T / 16 / 4, atol=1e-12)
    same = sme(PROBLEM, 16.0, 1.5, omega1=0.5, batch=4)
    np.testing.assert_array_equal(same.M, model.M)


def test_without_penalty_it_is_the_equation_of_sgd() -> None:
    """Gradient-based, A = I, g = 0, α = 1: steps of 1/τ = ε/c, so dX = −f'/c dt + √ε σ/c dW."""
    model = sme(quadratic(H, B, S), 50.0, 1.0, 1.0, 20.0, omega1=1.0)
    np.testing.assert_allclose(model.M, 0.4 * np.eye(3), atol=1e-14)
    np.testing.assert_allclose(model.drift(START), -(H @ START - B) / 0.4, atol=1e-13)
    covariance = model.diffusion(START) @ model.diffusion(START).T
    np.testing.assert_allclose(covariance, S @ S.T / 50 / 0.16, atol=1e-13)


@pytest.mark.parametrize(("scheme", "dt"), [("em", 1 / 400), ("tamed", 1 / 1600), ("exact", 0.3)])
def test_simulated_moments(scheme: str, dt: float) -> None:
    model = sme(PROBLEM, 50.0, 1.5)
    mean, cov = model.mean_cov(0.5, START)
    x = model.simulate(4000, dt, scheme, 1, t=0.5, x0=START).numpy()
    spread = np.sqrt(np.diag(cov))
    assert np.abs((x.mean(0) - mean) / spread).max() < 0.15
    np.testing.assert_allclose(x.std(0), spread, rtol=0.08)
    again = model.simulate(4000, dt, scheme, 1, t=0.5, x0=START).numpy()
    assert np.array_equal(x, again)


def quartic() -> AdmmProblem:
    """2003.03532: f = (ξ+1)x⁴ + (2+ξ)x² − (1+ξ)x with ξ = ±1, g = z², so that V = x⁴ + 3x² − x."""
    f = NoisyFunction(
        1,
        lambda x: (x**4 + 2 * x**2 - x).sum(),
        lambda x: (4 * x**3 + 2 * x - 1)[:, None],
        law="rademacher",
    )
    return AdmmProblem(f, Ridge(2.0))


def test_the_quartic_by_hand() -> None:
    model = sme(quartic(), 8.0, 1.5, 1.0, 8.0)
    x = np.array([0.7])
    assert model.M[0, 0] == pytest.approx(2 / 3)
    assert model.drift(x)[0] == pytest.approx(-(4 * 0.343 + 6 * 0.7 - 1) * 1.5)
    assert abs(model.diffusion(x)[0, 0]) == pytest.approx(
        abs(4 * 0.343 + 2 * 0.7 - 1) * 1.5 / math.sqrt(8)
    )
    best = model.optimum
    assert 4 * best[0] ** 3 + 6 * best[0] - 1 == pytest.approx(0, abs=1e-12)


def test_taming_keeps_the_quartic_finite_where_euler_maruyama_blows_up() -> None:
    model = sme(quartic(), 2.0, 1.5, 1.0, 2.0)  # ε = ½
    options = {"t": 4.0, "x0": [1.0]}
    plain = model.simulate(4000, 0.25, "em", **options)
    tamed = model.simulate(4000, 0.25, "tamed", **options)
    assert not bool(torch.isfinite(plain).all())
    assert bool(torch.isfinite(tamed).all())
    assert float(tamed.abs().max()) < 50


def test_weak_error_by_simulation_agrees_with_the_exact_one() -> None:
    problem = quadratic([[2.0]], [1.0], [[0.5]], 1.0)
    model = sme(problem, 1.0, 1.5)
    eps = [1 / 8, 1 / 16]
    exact = model.weak_error(eps, t=1.0, x0=[2.0])
    sampled = model.weak_error(
        eps, lambda x: x[:, 0], t=1.0, x0=[2.0], n_paths=4000, substeps=32, scheme="em"
    )
    allowed = 4 * sampled.stderr + 0.1 * exact.error
    assert (np.abs(sampled.error - exact.error) < allowed).all()
    assert (sampled.stderr < 0.2 * exact.error).all()  # what common random numbers are for


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.5, "omega": 1.0, "tau": 1.0, "omega1": 1.0},
        {"alpha": 1.0},
    ],
    ids=["gradient .5", "standard"],
)
def test_quartic_weak_error_is_of_first_order(options: dict) -> None:
    """The paper's example with its φ = x + x², T = ½; 10⁵ paths with common random numbers."""
    error = sme(quartic(), 1.0, **options).weak_error(
        [2.0**-k for k in (5, 6, 7)],
        lambda x: x[:, 0] + x[:, 0] ** 2,
        t=0.5, x0=[1.0], n_paths=100_000 if options["alpha"] < 1 else 20_000,
    )  # fmt: skip
    assert (error.stderr < 0.15 * error.error).all()
    assert 0.8 < error.slope < 1.2


def test_stopping_time_by_hand_and_in_the_middle() -> None:
    """Scalar: bias² e^{−2Bt} + v(1 − e^{−2Bt}) falls to v; it is (1 + tol) v at a closed t."""
    model = sme(quadratic([[2.0]], [1.0], [[0.5]], 1.0), 100.0)
    v = 0.01 * 0.25 / 6
    found = model.stopping_time([2.0], tolerance=0.1)
    bias = (2 - 1 / 3) ** 2
    assert found.least == pytest.approx(v, rel=1e-6)
    assert found.t == pytest.approx(math.log((bias - v) / (0.1 * v)) / 6, rel=1e-6)
    assert found.iterations == math.ceil(found.t * 100)
    assert found.mean_square == pytest.approx(1.1 * v, rel=1e-6)
    assert model.stopping_time(model.optimum).iterations == 0
    # A slow noisy direction that starts at its optimum: the least error is passed on the way.
    mixed = sme(quadratic(np.diag([5.0, 0.05]), [0, 0], np.diag([0.1, 1.0])), 100.0)
    early = mixed.stopping_time([1.0, 0.0], tolerance=0.01)
    assert early.least < 0.3 * float(np.trace(mixed.local.stationary_cov))
    assert 0.3 < early.t < 2


def test_advice_reaches_its_target() -> None:
    model = sme(PROBLEM, 10.0)
    advice = model.advise(0.05, batches=(1, 4))
    assert len(advice) == 6
    assert [a.iterations for a in advice] == sorted(a.iterations for a in advice)
    for a in advice:
        recursion = LinearRecursion(PROBLEM, Scheme(rho=a.rho, alpha=a.alpha), a.batch)
        exact = np.sqrt(np.diag(recursion.of_x(recursion.stationary()).cov).max())
        assert a.recursion_std == pytest.approx(exact)
        assert a.expected_std <= 0.05 + 1e-12
        assert exact == pytest.approx(a.expected_std, rel=0.12)
        assert a.samples == a.iterations * a.batch
    # Standard ADMM: α and 1/ρ trade at par, and the batch divides ε.
    one = {a.alpha: a for a in advice if a.batch == 1}
    assert one[1.5].rho / one[1.0].rho == pytest.approx(1.5)
    assert abs(one[1.5].iterations - one[1.0].iterations) <= 1


def test_advice_halves_an_eps_that_would_not_settle() -> None:
    """Gradient-based with ε at the stiffness bound: the iterates diverge there, though the scheme
    is stable for a small ε."""
    problem = quadratic(np.diag([1.0, 0.5]), [1.0, 0.0], np.eye(2), 1.0)
    model = sme(problem, 10.0, 0.5, 1.0, 6.0, omega1=1.0)
    asked = {"alphas": (0.5,), "batches": (1,)}
    for stiffness, halved in ((0.1, False), (1.0, True)):
        (found,) = model.advise(1e3, stiffness=stiffness, **asked)
        eps = stiffness / float(model.local.rates[-1])
        assert (1 / found.rho < 0.6 * eps) == halved
        assert found.expected_std < 1e3
        recursion = LinearRecursion(problem, model.scheme.at(found.rho))
        assert recursion.radius < 1
        assert (LinearRecursion(problem, model.scheme.at(1 / eps)).radius >= 1) == halved
        expected = recursion.of_x(recursion.stationary()).cov
        assert found.recursion_std == pytest.approx(np.diag(expected).max() ** 0.5)


def test_a_flat_direction_needs_no_optimum_to_be_simulated() -> None:
    """V = ½ x₁² − x₁ + 0 x₂: along x₂ Brownian motion, which has no stationary law."""
    flat = sme(quadratic(np.diag([1.0, 0.0]), [1.0, 0.0], np.diag([0.5, 2.0])), 100.0, 1.5)
    x0 = [0.0, 3.0]
    for scheme in ("em", "tamed"):
        x = flat.simulate(4000, 0.002, scheme, t=1.0, x0=x0).numpy()
        # By hand, with M = I/α: α = 1.5 is the rate of x₁, and αS/10 the noise of both.
        mean = [1 - math.exp(-1.5), 3.0]
        std = [0.075 * math.sqrt((1 - math.exp(-3)) / 3), 0.3]
        np.testing.assert_allclose(x.mean(0), mean, atol=0.02)
        np.testing.assert_allclose(x.std(0), std, rtol=0.05)
    for ask in (
        lambda: flat.mean_cov(1.0, x0),
        lambda: flat.advise(0.1),
        lambda: flat.stopping_time(x0),
        lambda: flat.simulate(2, 0.1, "exact", t=1.0, x0=x0),
    ):
        with pytest.raises(ValueError, match=r"has the eigenvalue 0; add curvature \(beta > 0\)"):
            ask()


@pytest.mark.gpu
def test_weak_error_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model = sme(quadratic([[2.0]], [1.0], [[0.5]], 1.0), 1.0, 1.5)
    asked = {"t": 1.0, "x0": [2.0], "n_paths": 4000, "scheme": "em"}
    exact = model.weak_error([1 / 8, 1 / 16], t=1.0, x0=[2.0])
    found = model.weak_error([1 / 8, 1 / 16], lambda x: x[:, 0], **asked, device="cuda")
    assert (np.abs(found.error - exact.error) < 4 * found.stderr + 0.3 * exact.error).all()


def test_weak_error_runs_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both its noise and its paths; "meta" plays the accelerator, without any numbers."""

    class Sent(Exception):
        """The paths are about to start."""

    seen: list[str] = []

    def paths(problem: AdmmProblem, scheme: Scheme, x: torch.Tensor, batch: int) -> None:
        seen.append(f"paths on {x.device}")
        raise Sent

    class Generator:
        def __init__(self, device: torch.device) -> None:
            seen.append(f"noise on {device}")

        def manual_seed(self, seed: int) -> None:
            return None

    monkeypatch.setattr(sme_weak, "AdmmPaths", paths)
    monkeypatch.setattr(sme_weak.torch, "Generator", Generator)
    model = sme(quadratic([[2.0]], [1.0], [[0.5]], 1.0), 1.0)
    with pytest.raises(Sent):
        model.weak_error([0.5, 0.25], lambda x: x[:, 0], t=1.0, x0=[2.0], device="meta")
    assert seen == ["noise on meta", "paths on meta"]


def test_the_process_refuses_growth() -> None:
    with pytest.raises(ValueError, match="strongly convex"):
        OrnsteinUhlenbeck(np.diag([1.0, -0.1]), np.zeros(2), np.eye(2))
    assert isinstance(sme(PROBLEM, 1.0), Sme)
