"""Schedules, the laws of transition times, and the expected number of calls."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from sparring.diffusion.dndm import (
    BetaSchedule,
    CosineSchedule,
    CosineSquaredSchedule,
    CustomSchedule,
    LinearSchedule,
    Schedule,
    TransitionTimes,
    as_schedule,
    expected_calls,
)
from sparring.diffusion.dndm.draws import Draws


def named(schedule: Schedule) -> str:
    """Without addresses of functions, which differ between test workers."""
    return re.sub(r" at 0x\w+", "", repr(schedule))


SCHEDULES = [
    LinearSchedule(),
    CosineSchedule(),
    CosineSquaredSchedule(),
    BetaSchedule(17, 4),
    BetaSchedule(0.5, 0.3),
    CustomSchedule(lambda t: (1 - t) ** 2),
]
CLOSED = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: math.cos(math.pi / 2 * t),
    "cosine2": lambda t: math.cos(math.pi / 2 * t) ** 2,
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_pmf_of_named_schedules(name: str, steps: int) -> None:
    """Oracle 1 against plain numbers."""
    alpha = [1.0, *(CLOSED[name](t / steps) for t in range(1, steps)), 0.0]
    found = as_schedule(name).pmf(steps).numpy()
    np.testing.assert_allclose(found, -np.diff(alpha), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("a", "b"), [(17, 4), (100, 4), (3, 3), (1, 1), (0.5, 0.3), (0.05, 2)])
@pytest.mark.parametrize("steps", [1, 5, 50, 1000])
def test_beta_pmf(a: float, b: float, steps: int) -> None:
    """Differences of scipy's distribution function; finite where the density is not."""
    found = BetaSchedule(a, b).pmf(steps).numpy()
    cdf = stats.beta.cdf(np.arange(steps + 1) / steps, a, b)
    np.testing.assert_allclose(found, np.diff(cdf), rtol=0, atol=1e-13)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_linear_times_are_uniform_and_beta_1_1_is_linear() -> None:
    torch.testing.assert_close(BetaSchedule(1, 1).pmf(8), torch.full((8,), 1 / 8).double())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_density_quantile_and_alpha_agree(schedule: Schedule) -> None:
    t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    alpha = schedule.alpha(t)
    for low, high in ((0.1, 0.5), (0.5, 0.9)):
        mass, _ = integrate.quad(
            lambda s: float(schedule.density(torch.tensor([s], dtype=torch.float64))), low, high
        )
        ends = schedule.alpha(torch.tensor([low, high], dtype=torch.float64))
        assert mass == pytest.approx(float(ends[0] - ends[1]), abs=1e-9)
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(1 - schedule.alpha(schedule.quantile(u)), u, rtol=0, atol=1e-9)
    assert bool((alpha[1:] <= alpha[:-1]).all())
    ends = schedule.alpha(torch.tensor([0.0, 1.0, -1.0, 2.0]))
    assert ends.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_the_distribution_function_keeps_small_chances(schedule: Schedule) -> None:
    """1 - alpha to rounding; named ones also where 1 - alpha is nothing but rounding."""
    t = torch.linspace(-0.1, 1.1, 49, dtype=torch.float64)
    torch.testing.assert_close(schedule.cdf(t), 1 - schedule.alpha(t), rtol=0, atol=1e-15)
    assert schedule.cdf(torch.tensor([-1.0, 0.0, 1.0, 2.0])).tolist() == [0, 0, 1, 1]
    if not isinstance(schedule, CustomSchedule):
        tiny = schedule.quantile(torch.tensor([1e-20], dtype=torch.float64))
        if not isinstance(schedule, CosineSchedule):  # its quantile is an arccos, which cancels
            assert float(schedule.cdf(tiny)) == pytest.approx(1e-20, rel=1e-6)
        small = torch.tensor([1e-9], dtype=torch.float64)
        mass, _ = integrate.quad(lambda s: 1e-9 * float(schedule.density(small * s)), 0, 1)
        assert float(schedule.cdf(small)) == pytest.approx(mass, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
@settings(max_examples=30)
@given(steps=st.integers(1, 60))
def test_times_invert_the_law_exactly(schedule: Schedule, steps: int) -> None:
    """Each tau has an interval of u of its own chance, in order; the range is 1..T."""
    cdf = 1 - schedule.grid(steps)
    inside = (cdf[:-1] + cdf[1:]) / 2
    wide = cdf[1:] - cdf[:-1] > 1e-12
    found = schedule.times(inside, steps) * steps
    expected = torch.arange(1, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(found[wide], expected[wide], rtol=0, atol=1e-9)
    ends = schedule.times(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), steps) * steps
    assert float(ends[0]) >= 1 - 1e-9
    assert float(ends[1]) <= steps + 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_continuous_times_have_their_law(schedule: Schedule) -> None:
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tau = schedule.times(u, math.inf)
    test = stats.kstest(tau.numpy(), lambda t: 1 - schedule.alpha(torch.as_tensor(t)).numpy())
    assert test.pvalue > 1e-3


# Of specs and the authors' README; computed there by other code.
KNOWN = [
    (LinearSchedule(), 25, 32, 18.23),
    (LinearSchedule(), 50, 32, 23.81),
    (LinearSchedule(), 1000, 32, 31.51),
    (LinearSchedule(), 1000, 256, 225.96),
    (CosineSchedule(), 25, 32, 16.65),
    (CosineSchedule(), 50, 32, 22.46),
    (CosineSchedule(), 1000, 32, 31.40),
    (BetaSchedule(17, 4), 25, 32, 8.63),
    (BetaSchedule(17, 4), 50, 32, 13.95),
    (BetaSchedule(17, 4), 1000, 32, 30.34),
]


@pytest.mark.parametrize(("schedule", "steps", "tokens", "calls"), KNOWN)
def test_expected_calls(schedule: Schedule, steps: int, tokens: int, calls: float) -> None:
    """Oracle 4: the closed form, and what plans need within four standard errors."""
    found = expected_calls(schedule, steps, tokens)
    p = schedule.pmf(steps).numpy()
    assert found == pytest.approx(float((1 - (1 - p) ** tokens).sum()), abs=1e-9)
    assert found == pytest.approx(calls, abs=0.006)
    assert found <= steps * (1 - (1 - 1 / steps) ** tokens) + 1e-9
    free = torch.ones(1500, tokens, dtype=torch.bool)
    draws = Draws(torch.Generator().manual_seed(0), 1500, torch.device("cpu"))
    events = TransitionTimes(steps, schedule).plan(free, draws).events_B.double()
    error = float(events.std()) / math.sqrt(1500)
    assert abs(float(events.mean()) - found) < 4 * error


def test_expected_calls_at_the_limit() -> None:
    assert expected_calls(LinearSchedule(), math.inf, 17) == 17
    assert expected_calls(LinearSchedule(), 10**6, 17) == pytest.approx(17, abs=1e-3)
    assert expected_calls(CosineSchedule(), 1, 17) == pytest.approx(1)


BAD = [
    (lambda: BetaSchedule(0, 1), "Beta's a must be positive, not 0"),
    (lambda: BetaSchedule(1, -2), "Beta's b must be positive, not -2"),
    (lambda: BetaSchedule(math.nan, 1), "not nan"),
    (lambda: CustomSchedule(lambda t: t), "must not increase"),
    (lambda: CustomSchedule(lambda t: 1 - t / 2), r"alpha\(1\) must be 0, not 0.5"),
    (lambda: CustomSchedule(lambda t: (1 - t) / 2), r"alpha\(0\) must be 1, not 0.5"),
    (lambda: CustomSchedule(lambda t: t * math.nan), "finite"),
    (lambda: CustomSchedule(lambda t: t[:-1]), "shape"),
    (lambda: LinearSchedule().pmf(0), "steps must be a whole number of at least 1.*not 0"),
    (lambda: LinearSchedule().pmf(2.5), "not 2.5"),  # type: ignore[arg-type]
    (lambda: LinearSchedule().grid(math.inf), "finitely many"),  # type: ignore[arg-type]
    (lambda: as_schedule("sqrt"), "one of .*'linear'.* not 'sqrt'"),
    (lambda: as_schedule("beta", 1.0), "takes 2 parameters"),
    (lambda: as_schedule("linear", 1.0), "takes 0 parameters"),
    (lambda: expected_calls(LinearSchedule(), 5, 0), "tokens must be at least 1, not 0"),
    (lambda: TransitionTimes(0), "not 0"),
    (lambda: TransitionTimes(math.inf, skip=False), "skip=False"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_schedule_that_rises_between_checked_times_is_found_on_the_grid() -> None:
    schedule = CustomSchedule(lambda t: 1 - t)
    object.__setattr__(schedule, "function", lambda t: (1 - t) + 0.2 * torch.sin(12 * t))
    with pytest.raises(ValueError, match="must not increase"):
        schedule.pmf(10)
