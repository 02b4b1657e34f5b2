"""The recursive estimator: momentum, STORM, SARAH and MARS are one recursion."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import Tensor, nn

from sparring.optimizers import MARS, RecursiveEstimator, recursive

SHAPE = (4, 3)


def stream(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_special_cases() -> None:
    """Momentum (gamma 0), STORM (gamma 1), SARAH (gamma 1, beta 1), each by its own formula."""
    now, before = stream(20, 0), stream(20, 1)
    average, storm, sarah = now[0], now[0], now[0]
    estimators = [
        RecursiveEstimator(0.9, 0.0),
        RecursiveEstimator(0.9),
        RecursiveEstimator(1.0),
    ]
    for estimator in estimators:
        estimator.update([now[0]])
    for g, h in zip(now[1:], before[1:], strict=True):
        average = 0.9 * average + 0.1 * g
        storm = g + 0.9 * (storm - h)
        sarah = sarah + g - h
        found = [estimator.update([g], [h])[0] for estimator in estimators]
        for mine, expected in zip(found, (average, storm, sarah), strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-13)


def test_mars_momentum_is_this_recursion() -> None:
    """Unclipped exact MARS, from zero instead of from the first gradient."""
    parameter = nn.Parameter(torch.zeros(SHAPE, dtype=torch.float64))
    optimizer = MARS([parameter], lr=0.0, gamma=0.3, clip_c=False, exact=True)
    estimator = RecursiveEstimator(0.95, 0.3)
    estimator.update([torch.zeros(SHAPE, dtype=torch.float64)])
    last = torch.zeros(SHAPE, dtype=torch.float64)
    for number, (g, h) in enumerate(zip(stream(10, 0), stream(10, 1), strict=True)):
        parameter.grad = h.clone()
        optimizer.step()
        parameter.grad = g.clone()
        with optimizer.moments():
            optimizer.step()
        (mine,) = estimator.update([g], [h if number else last])
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], mine)


def test_exact_correction_lowers_the_error_on_a_noisy_quadratic() -> None:
    """Specification, oracle 11: the error falls with gamma where the noise is shared by g and h.

    Independent noise makes the corrected gradient's variance (1 + kappa)^2 + kappa^2 times larger.
    """
    curvature = torch.linspace(0.1, 1, 64, dtype=torch.float64)

    def error(gamma: float) -> float:
        draws = torch.Generator().manual_seed(4)
        estimator = RecursiveEstimator(0.95, gamma)
        x = torch.full((64, 64), 1.0, dtype=torch.float64)
        before, total = x, 0.0
        for t in range(300):
            # The noise moves with x only in a small part, as far from the optimum.
            noise = torch.randn(64, 64, generator=draws, dtype=torch.float64)
            slope, offset = curvature * (1 + 0.1 * noise), noise
            (m,) = estimator.update([slope * x + offset], [slope * before + offset])
            if t > 60:
                total += float((m - curvature * x).pow(2).mean())
            before, x = x, x - 0.3 * m
        return total

    errors = [error(gamma) for gamma in (0.0, 0.025, 0.2, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[0]

    noise = torch.randn(200_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    c = [noise[:-1].clone()]
    recursive.correct_(c, [noise[1:]], recursive.correction_coefficient(0.025, 0.95))
    assert float(c[0].var()) == pytest.approx(1.475**2 + 0.475**2, rel=0.02)


def test_restart_and_saved_state() -> None:
    first, second = RecursiveEstimator(0.9), RecursiveEstimator(0.9)
    now, before = stream(4, 0), stream(4, 1)
    first.update([now[0]])
    first.update([now[1]], [before[1]])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(
        first.update([now[2]], [before[2]]), second.update([now[2]], [before[2]])
    )
    first.restart()
    assert torch.equal(first.update([now[3]])[0], now[3])
    assert not torch.equal(second.estimate[0], now[3])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"\(beta, gamma\) = \(0.9, 1.0\)"):
        RecursiveEstimator(0.5).load_state_dict(first.state_dict())


def test_wrong_input_is_refused_and_changes_nothing() -> None:
    for beta, gamma, name in ((1.1, 1.0, "beta"), (0.9, -0.1, "gamma"), (float("nan"), 0, "beta")):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\]"):
            RecursiveEstimator(beta, gamma)
    estimator = RecursiveEstimator(0.9)
    (held,) = estimator.update([torch.ones(2)])
    with pytest.raises(ValueError, match="needs `previous`"):
        estimator.update([torch.zeros(2)])
    with pytest.raises(ValueError, match="gradients have shapes"):
        estimator.update([torch.zeros(3)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="previous have shapes"):
        estimator.update([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)])
    assert torch.equal(held, torch.ones(2))


def test_example_in_the_documentation() -> None:
    assert doctest.testmod(recursive).failed == 0
