"""IGSO(3) against its series, its moments and its own finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from confdiff_inputs import normal
from scipy.stats import kstest

from sparring.science.confdiff.igso3 import (
    UNIFORM,
    angle_density,
    exp_rotation,
    log_density,
    log_rotation,
    sample,
    score,
    score_norm,
    score_over_angle,
)

GRID = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
EPS = (0.02, 0.1, 0.13, 0.3, 0.5, 1.0, 1.5, 1.99, 2.01, 3.0)


def series(omega: np.ndarray, eps: float) -> np.ndarray:
    """The defining sum in float64, 2000 terms."""
    order = np.arange(2000)[:, None]
    terms = (2 * order + 1) * np.exp(-order * (order + 1) * eps**2 / 2)
    return np.asarray((terms * np.sin((order + 0.5) * omega)).sum(0) / np.sin(omega / 2))


@pytest.mark.parametrize("eps", EPS)
def test_density_has_integral_one_and_the_exact_mean_trace(eps: float) -> None:
    density = angle_density(GRID, eps)
    cell = math.pi / len(GRID)
    assert float(density.sum() * cell) == pytest.approx(1, abs=1e-10)
    trace = float((density * (1 + 2 * GRID.cos())).sum() * cell)
    assert trace == pytest.approx(3 * math.exp(-(eps**2)), abs=1e-10)


@pytest.mark.parametrize("eps", EPS)
def test_density_is_the_series(eps: float) -> None:
    omega = np.linspace(1e-3, min(math.pi, 10 * eps), 400)
    found, expected = log_density(torch.tensor(omega), eps).exp().numpy(), series(omega, eps)
    trusted = expected > 1e-3  # below, the series has cancelled
    assert trusted.sum() > 20
    np.testing.assert_allclose(found[trusted], expected[trusted], rtol=1e-8)


@pytest.mark.parametrize(
    ("eps", "expected"), [(0.1, -9.9916), (0.13, -7.6815), (0.3, -3.3078), (0.5, -1.9584)]
)
def test_tabulated_scores(eps: float, expected: float) -> None:
    # Computed elsewhere at omega = eps, by differences: good to 6e-4. Ours is the closed form's.
    found = float(score_over_angle(torch.tensor(eps), eps)) * eps
    assert found == pytest.approx(expected, abs=6e-4)
    closed = -1 / eps + 1 / eps - 0.5 / math.tan(eps / 2)
    assert found == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.5, 1.5, 2.5])
def test_score_is_the_slope_into_the_tail(eps: float) -> None:
    omega, step = torch.tensor([1e-4, 0.05, 0.5, 1.5, 3.0], dtype=torch.float64), 1e-5
    slope = (log_density(omega + step, eps) - log_density(omega - step, eps)) / (2 * step)
    found = score_over_angle(omega, eps) * omega
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-5)


def test_limit_at_zero() -> None:
    found = float(score_over_angle(torch.zeros(()), 0.2))
    assert found == pytest.approx(-(1 / 0.04 - 1 / 12), rel=1e-7)


def test_score_is_the_gradient_along_the_body() -> None:
    vector, eps, step = normal(20, 3) * 0.8, 0.6, 1e-5
    for axis in torch.eye(3, dtype=torch.float64):
        ends = [
            log_density(
                log_rotation(exp_rotation(vector) @ exp_rotation(sign * step * axis)).norm(dim=-1),
                eps,
            )
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(score(vector, eps) @ axis, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.7, 1.5, UNIFORM])
def test_sampled_angles_have_the_distribution(eps: float) -> None:
    drawn = sample(normal(1, 20_000, 3), torch.tensor([eps]))[0]
    cdf = np.cumsum(angle_density(GRID, eps).numpy()) * math.pi / len(GRID)

    def distribution(omega: np.ndarray) -> np.ndarray:
        return np.interp(omega, GRID.numpy() + math.pi / len(GRID) / 2, cdf, left=0)

    # p < 1e-3 would happen by chance once in a thousand seeds; this one is fixed.
    assert kstest(drawn.norm(dim=-1).numpy(), distribution).pvalue > 1e-3
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert bool((drawn.mean(0).abs() < 4 * error).all())
    if eps == UNIFORM:
        expected = kstest(drawn.norm(dim=-1).numpy(), lambda w: (w - np.sin(w)) / math.pi)
        assert expected.pvalue > 1e-3
    if eps == 0.1:
        assert float(drawn.square().sum(-1).mean()) == pytest.approx(2.998e-2, rel=0.03)


def test_samples_of_a_narrow_one_are_the_gaussian() -> None:
    z = normal(2, 50, 3)
    drawn = sample(z, torch.tensor([0.01, 0.02]))
    expected = torch.tensor([0.01, 0.02], dtype=torch.float64)[:, None, None] * z
    # The distribution function is linear within a cell: 1e-4 of eps, and more in its far tails.
    torch.testing.assert_close(drawn, expected, rtol=2e-2, atol=1e-5)


def test_semigroup() -> None:
    count = 20_000
    first, second = (
        exp_rotation(sample(normal(1, count, 3, seed=seed), torch.tensor([eps]))[0])
        for seed, eps in ((1, 0.6), (2, 0.9))
    )
    trace = (first @ second).diagonal(dim1=-2, dim2=-1).sum(-1)
    error = float(trace.std()) / math.sqrt(count)
    assert abs(float(trace.mean()) - 3 * math.exp(-(0.6**2 + 0.9**2))) < 4 * error


@pytest.mark.parametrize("eps", [0.13, 0.5, 1.5])
def test_score_norm(eps: float) -> None:
    omega = GRID[::10].numpy()
    density = series(omega, eps)
    slope = np.gradient(density, omega) / np.where(density > 1e-9, density, np.inf)
    square = (slope**2 * density * (1 - np.cos(omega)) / math.pi).sum() * math.pi / len(omega)
    found = float(score_norm(torch.tensor(eps)))
    assert found == pytest.approx(math.sqrt(square / 3), rel=1e-3)


def test_score_norm_of_a_narrow_one_is_the_gaussians() -> None:
    assert float(score_norm(torch.tensor(0.02))) == pytest.approx(50, rel=1e-3)


def test_number_types_and_shapes() -> None:
    z = normal(3, 4, 3).float()
    drawn = sample(z, torch.tensor([0.1, 0.5, 9.0]))
    assert drawn.dtype == torch.float32
    assert score(drawn, 0.3).dtype == torch.float32
    assert sample(torch.zeros(1, 2, 3), torch.ones(1)).abs().max() == 0
    assert log_density(torch.rand(3, 4), torch.rand(3, 1) + 0.1).shape == (3, 4)
    mixed = log_density(torch.tensor([1.0, 1.0]), torch.tensor([0.5, 4.0]))
    torch.testing.assert_close(mixed[1], log_density(torch.tensor(1.0), 4.0))


def test_gradients_at_the_identity_are_finite() -> None:
    rotation = torch.eye(3, dtype=torch.float64)[None].requires_grad_()
    score(log_rotation(rotation), 0.3).sum().backward()
    assert rotation.grad is not None
    assert bool(rotation.grad.isfinite().all())
