"""ADMM against coordinate descent, linear solves, scikit-learn, scipy and its linear recursion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear, minimize
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.preprocessing import StandardScaler

from sparring.science.admm import (
    L1,
    AdmmProblem,
    LeastSquares,
    Logistic,
    Quadratic,
    Ridge,
    Scheme,
    _Iteration,
    admm,
    difference_matrix,
    quadratic,
)
from sparring.science.admm_moments import LinearRecursion

RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((50, 6))
TARGET = DATA @ np.array([1.0, -2, 0, 0, 0.5, 0]) + 0.1 * RNG.standard_normal(50)
# Linearised schemes with ρ = 1 and A = I need τ ≥ 1, with ω1 = 1 also f's largest curvature.
VARIANTS = {
    "standard": {},
    "over-relaxed": {"alpha": 1.6},
    "under-relaxed": {"alpha": 0.6},
    "linearised": {"omega": 1.0, "tau": 1.2},
    "linearised, relaxed": {"omega": 1.0, "tau": 1.5, "alpha": 1.4},
    "gradient-based": {"omega": 1.0, "omega1": 1.0, "tau": 4.0},
    "mixed": {"omega": 0.3, "omega1": 0.5, "tau": 2.0, "alpha": 1.2},
}


def coordinate_descent(data, target, beta: float) -> np.ndarray:
    """Lasso in scikit-learn's scaling, coordinate by coordinate until nothing moves."""
    n = len(data)
    curve, slope = data.T @ data / n, data.T @ target / n
    x = np.zeros(data.shape[1])
    for _ in range(2000):
        before = x.copy()
        for i in range(len(x)):
            partial = slope[i] - curve[i] @ x + curve[i, i] * x[i]
            x[i] = np.sign(partial) * max(abs(partial) - beta, 0) / curve[i, i]
        if np.array_equal(before, x):
            break
    return x


@pytest.mark.parametrize("name", VARIANTS)
def test_lasso_is_coordinate_descents(name: str) -> None:
    problem = AdmmProblem(LeastSquares(DATA, TARGET), L1(0.2))
    result = admm(problem, 1.0, **VARIANTS[name], tol=1e-14, max_iter=5000)
    expected = coordinate_descent(DATA, TARGET, 0.2)
    assert (expected == 0).any()
    np.testing.assert_allclose(result.z, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-10)
    assert result.success, result.message


@pytest.mark.parametrize("name", VARIANTS)
def test_ridge_through_a_matrix_is_a_linear_solve(name: str) -> None:
    A = np.random.default_rng(1).standard_normal((4, 6)) / 4
    problem = AdmmProblem(LeastSquares(DATA, TARGET), Ridge(0.5), A)
    result = admm(problem, 1.0, **VARIANTS[name], tol=1e-13, max_iter=5000)
    exact = np.linalg.solve(DATA.T @ DATA / 50 + 0.5 * A.T @ A, DATA.T @ TARGET / 50)
    np.testing.assert_allclose(result.x, exact, rtol=0, atol=1e-10)
    assert result.grad_norm < 1e-10
    np.testing.assert_allclose(problem.gradient(result.x), 0, atol=1e-10)


def test_lasso_on_diabetes_is_scikit_learns() -> None:
    data, target = load_diabetes(return_X_y=True)
    data, target = StandardScaler().fit_transform(data), (target - target.mean()) / target.std()
    fitted = Lasso(alpha=0.05, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(data, target)
    result = admm(AdmmProblem(LeastSquares(data, target), L1(0.05)), 0.5, 1.6, tol=1e-13)
    assert result.success
    np.testing.assert_allclose(result.z, fitted.coef_, rtol=0, atol=1e-10)
    assert 0 < (result.z == 0).sum() < 10  # exact zeros


@pytest.mark.parametrize("options", [{}, {"alpha": 1.5}, {"omega": 1, "omega1": 1, "tau": 4.0}])
def test_logistic_on_breast_cancer_is_scikit_learns_and_scipys(options: dict) -> None:
    data, label = load_breast_cancer(return_X_y=True)
    data, label = StandardScaler().fit_transform(data)[:, :10], 2 * label - 1
    problem = AdmmProblem(Logistic(data, label), Ridge(0.1))
    result = admm(problem, 0.5, **options, tol=1e-12, max_iter=20_000)
    assert result.success

    def objective(x):
        margin = label * (data @ x)
        slope = -(label / (1 + np.exp(margin))) @ data / len(data) + 0.1 * x
        return np.mean(np.logaddexp(0, -margin)) + 0.05 * x @ x, slope

    scipys = minimize(objective, np.zeros(10), jac=True, method="L-BFGS-B", tol=1e-15)
    np.testing.assert_allclose(result.x, scipys.x, atol=1e-4)
    np.testing.assert_allclose(objective(result.x)[1], 0, atol=1e-10)
    strength = 1 / (0.1 * len(data))
    fitted = LogisticRegression(C=strength, fit_intercept=False, tol=1e-12, max_iter=10_000)
    np.testing.assert_allclose(result.x, fitted.fit(data, label).coef_[0], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.7}, {"omega": 1.0, "tau": 5.0}])
def test_total_variation_is_the_boxed_dual(options: dict) -> None:
    """min ½‖x − y‖² + λ‖Dx‖₁ has x = y − Dᵀw with w = argmin ½‖y − Dᵀw‖², |w| ≤ λ."""
    rng = np.random.default_rng(3)
    y = np.repeat([0.0, 2.0, -1.0], 8) + 0.2 * rng.standard_normal(24)
    D, lam = difference_matrix(24), 0.7
    assert D.shape == (23, 24)
    dual = lsq_linear(D.T, y, (-lam, lam), method="bvls", tol=1e-15)
    expected = y - D.T @ dual.x
    problem = AdmmProblem(Quadratic(np.eye(24), y), L1(lam), D)
    result = admm(problem, 1.0, **options, tol=1e-13, max_iter=50_000)
    assert result.success
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-9)
    assert (np.abs(np.diff(expected)) < 1e-9).sum() > 15  # steps


def test_fused_lasso_is_the_stacked_dual() -> None:
    rng = np.random.default_rng(4)
    y = np.repeat([0.0, 1.5, 0.0], 6) + 0.2 * rng.standard_normal(18)
    A = np.vstack([np.eye(18), difference_matrix(18)])
    lam = np.concatenate([np.full(18, 0.2), np.full(17, 0.6)])
    dual = lsq_linear(A.T, y, (-lam, lam), method="bvls", tol=1e-15)
    result = admm(AdmmProblem(Quadratic(np.eye(18), y), L1(lam), A), 1.0, tol=1e-13)
    assert result.success
    np.testing.assert_allclose(result.x, y - A.T @ dual.x, rtol=0, atol=1e-8)


H = np.diag([1.0, 2.0, 0.5]) + 0.2
B, S, A = RNG.standard_normal(3), RNG.standard_normal((3, 2)), RNG.standard_normal((4, 3))
NOISY = quadratic(H, B, S, 0.7, A)


def one_step_by_blocks(scheme: Scheme, s: np.ndarray, xi: np.ndarray) -> np.ndarray:
    """(x, z, u)⁺ from the optimality conditions of all three updates as one linear system."""
    x, z, u = s[:3], s[3:7], s[7:]
    rho, alpha, omega, omega1, tau = (
        scheme.rho, scheme.alpha, scheme.omega, scheme.omega1, scheme.tau,
    )  # fmt: skip
    zero, eye = np.zeros, np.eye
    stationary = (1 - omega1) * H + (1 - omega) * rho * A.T @ A + tau * eye(3)
    left = np.block([
        [stationary, zero((3, 4)), zero((3, 4))],
        [-rho * alpha * A, (0.7 + rho) * eye(4), zero((4, 4))],
        [-alpha * A, eye(4), eye(4)],
    ])  # fmt: skip
    right = np.concatenate([
        B + S @ xi - omega1 * H @ x + (1 - omega) * rho * A.T @ (z - u)
        - omega * rho * A.T @ (A @ x - z + u) + tau * x,
        rho * ((1 - alpha) * z + u),
        u + (1 - alpha) * z,
    ])  # fmt: skip
    return np.linalg.solve(left, right)


SCHEMES = [
    Scheme(rho=8.0, **options)
    for options in (
        {}, {"alpha": 1.5}, {"alpha": 0.6}, {"omega": 1, "tau": 90.0},
        {"alpha": 1.6, "omega": 1, "omega1": 1, "tau": 90.0},
        {"omega": 0.3, "omega1": 0.5, "tau": 20.0},
    )
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_iteration_solves_its_optimality_conditions(scheme: Scheme) -> None:
    iterate = _Iteration(NOISY, scheme)
    state = iterate.start([1.0, -1, 2])
    np.testing.assert_allclose(state.z, A @ [1, -1, 2])
    np.testing.assert_allclose(state.u, 0.7 * state.z / 8)
    rng = np.random.default_rng(5)
    for _ in range(5):
        xi = rng.standard_normal(2)
        expected = one_step_by_blocks(scheme, np.concatenate(state), xi)
        state = iterate(state, xi)
        np.testing.assert_allclose(np.concatenate(state), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_exact_moments_are_those_of_the_blocks(scheme: Scheme) -> None:
    """T and N from unit vectors; mean and covariance by 7 plain steps; batch divides the noise."""
    origin = one_step_by_blocks(scheme, np.zeros(11), np.zeros(2))
    T = np.stack([one_step_by_blocks(scheme, e, np.zeros(2)) - origin for e in np.eye(11)], 1)
    N = np.stack([one_step_by_blocks(scheme, np.zeros(11), e) - origin for e in np.eye(2)], 1)
    recursion = LinearRecursion(NOISY, scheme, batch=3)
    mean, cov = recursion.start([1.0, 0, 0]), np.zeros((11, 11))
    for _ in range(7):
        mean, cov = T @ mean + origin, T @ cov @ T.T + N @ N.T / 3
    found = recursion.moments([1.0, 0, 0], 7)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.cov, cov, rtol=1e-9, atol=1e-13)
    settled, late = recursion.stationary(), recursion.moments([1.0, 0, 0], 10**5)
    np.testing.assert_allclose(settled.mean, late.mean, atol=1e-9)
    np.testing.assert_allclose(settled.cov, late.cov, atol=1e-10)
    exact = np.linalg.solve(H + 0.7 * A.T @ A, B)
    np.testing.assert_allclose(recursion.of_x(settled).mean, exact, atol=1e-10)
    np.testing.assert_allclose(recursion.of_residual(settled).mean, 0, atol=1e-10)


def test_gradient_admm_without_penalty_is_gradient_descent() -> None:
    """A = I, g = 0, α = 1: z = x and u = 0, so that x⁺ = x − f'(x, ξ)/τ."""
    problem = quadratic(H, B, S)
    iterate = _Iteration(problem, Scheme(rho=5.0, omega=1, omega1=1, tau=10.0))
    state, x, rng = iterate.start(np.ones(3)), np.ones(3), np.random.default_rng(0)
    for _ in range(20):
        xi = rng.standard_normal(2)
        state, x = iterate(state, xi), x - (H @ x - B - S @ xi) / 10
        np.testing.assert_allclose(state.x, x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("alpha", "factor"), [(0.4, 0.6 / 1.6), (0.8, 0.2 / 1.2), (1.5, 1 / 3), (1.9, 0.9 / 1.9)]
)
def test_the_line_of_stability(alpha: float, factor: float) -> None:
    """ω = 1: c > λ(1−α)/(2−α) below α = 1, c > λ(1−1/α) above. Runs diverge just beyond it."""
    lam = float(np.linalg.norm(A, 2) ** 2)

    def radius(c: float) -> float:
        scheme = Scheme(rho=1e7, alpha=alpha, omega=1, omega1=1, tau=c * 1e7)
        recursion = LinearRecursion.__new__(LinearRecursion)
        try:
            scheme.check(A)
        except ValueError:
            refused.append(c)
        object.__setattr__(scheme, "check", lambda A: None)
        recursion.__init__(NOISY, scheme)
        return recursion.radius

    refused: list[float] = []
    assert radius(1.02 * factor * lam) < 1
    assert not refused
    assert radius(0.98 * factor * lam) > 1
    assert refused
    with pytest.raises(ValueError, match=r"unstable.*take tau >"):
        Scheme(rho=2.0, alpha=alpha, omega=1, tau=2 * 0.99 * factor * lam).check(A)
