"""Counts: how many tokens a call reveals, and the times that the network is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from sparring.diffusion.dndm import (
    BetaSchedule,
    CosineCounts,
    CosineSchedule,
    EntropyBoundCounts,
    FirstHitting,
    LinearCounts,
    LinearSchedule,
    Reveal,
    Schedule,
    ThresholdCounts,
    TransitionTimes,
    absorbing,
)
from sparring.diffusion.dndm.draws import Draws
from sparring.diffusion.dndm.plans import DrawnPlan, Plan, TimedPlan

CPU = torch.device("cpu")
V = 5
NOISE = absorbing(V, V - 1)


def draws(rows: int, seed: int = 0) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), rows, CPU)


def full(rows: int, length: int) -> torch.Tensor:
    return torch.ones(rows, length, dtype=torch.bool)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), BetaSchedule(0.4, 0.7)])
def test_first_hitting_is_dndm_c(schedule: Schedule) -> None:
    """Oracle 7: the k-th times of both agree by KS, and with t <- t u^(1/n) written out."""
    rows, n = 2000, 4
    first = FirstHitting(schedule).plan(full(rows, n), draws(rows))
    ours = TransitionTimes(math.inf, schedule).plan(full(rows, n), draws(rows, 1))
    assert first.events_B.tolist() == [n] * rows == ours.events_B.tolist()
    assert torch.equal(first.clean_BE, ours.clean_BE)
    rng = np.random.default_rng(0)
    share = np.ones(rows)
    for k in range(n):
        share = share * rng.random(rows) ** (1 / (n - k))
        written = schedule.quantile(torch.from_numpy(share)).numpy()
        for plan in (first, ours):
            assert stats.ks_2samp(plan.time_BE[:, k].numpy(), written).pvalue > 1e-3
    assert bool((first.time_BE[:, 1:] <= first.time_BE[:, :-1]).all())


def test_means_of_ordered_times() -> None:
    """Oracle 7: the k-th largest of n uniform times has mean (n + 1 - k) / (n + 1)."""
    rows, n = 4000, 5
    for counts in (FirstHitting(), TransitionTimes(math.inf)):
        time = counts.plan(full(rows, n), draws(rows)).time_BE
        for k in range(1, n + 1):
            mean, error = (n + 1 - k) / (n + 1), float(time[:, k - 1].std()) / math.sqrt(rows)
            assert abs(float(time[:, k - 1].mean()) - mean) < 4 * error


def test_infinitely_many_steps_are_n_calls_whatever_the_rounding() -> None:
    """Beta(0.001, 0.001) has times that are 0 or 1 to the last bit."""
    free = full(3, 20)
    free[1, 4:] = False
    plan = TransitionTimes(math.inf, BetaSchedule(0.001, 0.001)).plan(free, draws(3))
    assert plan.events_B.tolist() == [20, 4, 20]
    assert plan.clean_BE[1, :5].tolist() == [1, 2, 3, 4, 4]
    for row, n in enumerate((20, 4, 20)):
        assert bool((plan.time_BE[row, :n] > 0).all())


def test_times_are_drawn_for_free_positions_only() -> None:
    """Oracle 9."""
    free = full(200, 6)
    free[:, ::2] = False
    plan = TransitionTimes(8).plan(free, draws(200))
    assert bool((plan.priority_BN[~free] == -1).all())
    assert plan.total_B.tolist() == [3] * 200
    assert int(plan.events_B.max()) <= 3
    for counts in (TransitionTimes(math.inf), FirstHitting()):
        assert counts.plan(free, draws(200)).time_BE.shape == (200, 3)
    for row in range(200):
        tau = ((plan.priority_BN[row][free[row]] * 8).floor() + 1) / 8
        times = sorted(set(tau.tolist()), reverse=True)
        assert plan.time_BE[row, : len(times)].tolist() == times
        assert not plan.time_BE[row, len(times) :].any()
        wanted = [int((tau >= t).sum()) for t in times]
        assert plan.clean_BE[row, : len(times)].tolist() == wanted


@pytest.mark.parametrize("n", [1, 3, 10, 17])
@pytest.mark.parametrize("steps", [1, 3, 10, 40])
def test_paced_counts(n: int, steps: int) -> None:
    """Against the formulas in exact or decimal arithmetic; skipped steps reveal nothing."""
    free = full(2, n + 1)
    free[0, 0] = False
    for make in (LinearCounts, CosineCounts):
        every = make(steps, skip=False).plan(free, draws(2))
        packed = make(steps).plan(free, draws(2))
        for row, total in enumerate((n, n + 1)):
            if make is LinearCounts:
                noisy = [total * (steps - e) // steps for e in range(1, steps + 1)]
            else:
                cosine = [round(math.cos(math.pi / 2 * e / steps), 12) for e in range(1, steps + 1)]
                noisy = [math.floor(total * c) for c in cosine]
            clean = [total - k for k in noisy]
            assert every.clean_BE[row].tolist() == clean
            assert int(every.events_B[row]) == steps
            distinct = sorted(set(clean) - {0})
            assert int(packed.events_B[row]) == len(distinct)
            assert packed.clean_BE[row, : len(distinct)].tolist() == distinct
            assert set(packed.clean_BE[row, len(distinct) :].tolist()) <= {total}


def test_as_many_steps_as_tokens() -> None:
    free = full(2, 4)
    free[1, 2:] = False
    plan = LinearCounts().plan(free, draws(2))
    assert plan.events_B.tolist() == [4, 2]
    assert plan.clean_BE.tolist() == [[1, 2, 3, 4], [1, 2, 2, 2]]


def test_the_told_time_is_where_the_present_share_is_expected() -> None:
    plan = LinearCounts(4, CosineSchedule()).plan(full(3, 8), draws(3))
    told = plan.time(1, torch.tensor([0, 4, 6]))
    wanted = [1.0, 2 / math.pi * math.acos(0.5), 2 / math.pi * math.acos(0.75)]
    assert told.tolist() == pytest.approx(wanted)


def run(counts: object, logits: torch.Tensor, position: str = "confidence") -> list[list[int]]:
    """Clean counts of each row after each call of a network that does not see x."""
    rows, length = logits.shape[:2]
    sampler = Reveal(counts=counts, position=position, token="argmax")  # type: ignore[arg-type]
    x = torch.zeros(rows, length, dtype=torch.long)
    state = sampler.begin(
        x, full(rows, length), noise=NOISE, generator=torch.Generator().manual_seed(0)
    )
    seen = []
    while bool(state.active.any()):
        sampler.advance(state, logits[state.active])
        seen.append(state.clean_BN.sum(1).tolist())
    return seen


def with_confidence(*rows: list[float]) -> torch.Tensor:
    """Logits whose likeliest token has these chances, the rest spread evenly over three tokens."""
    p = torch.tensor(rows, dtype=torch.float64)
    rest = ((1 - p) / (V - 2))[..., None].expand(*p.shape, V - 2)
    return torch.cat([p[..., None], rest, torch.zeros_like(p)[..., None]], -1).log()


def test_threshold() -> None:
    """All that are above it, else the surest one."""
    logits = with_confidence([0.9, 0.95, 0.4, 0.5], [0.4, 0.5, 0.45, 0.41])
    assert run(ThresholdCounts(0.6), logits) == [[2, 1], [3, 2], [4, 3], [4, 4]]
    near = with_confidence([0.92, 0.88, 0.4])
    assert run(ThresholdCounts(0.9), near) == [[1], [2], [3]]
    assert run(ThresholdCounts(0.86), near) == [[2], [3]]
    assert run(ThresholdCounts(1.0), logits) == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert run(ThresholdCounts(0.1), logits) == [[4, 4]]


@pytest.mark.parametrize("position", ["random", "left-to-right", "margin", "confidence"])
def test_threshold_takes_the_sure_positions_in_any_order(position: str) -> None:
    """The order decides nothing but which one comes where none is sure."""
    logits = with_confidence([0.3, 0.99, 0.35, 0.99, 0.3, 0.3])
    sampler = Reveal(counts=ThresholdCounts(0.9), position=position, token="argmax")
    x = torch.zeros(1, 6, dtype=torch.long)
    for seed in range(5):
        state = sampler.begin(
            x, full(1, 6), noise=NOISE, generator=torch.Generator().manual_seed(seed)
        )
        sampler.advance(state, logits)
        assert state.clean_BN[0].nonzero()[:, 0].tolist() == [1, 3]
        left = [0, 2, 4, 5]
        first = {
            "random": max(left, key=lambda n: float(state.plan.priority_BN[0, n])),
            "left-to-right": 0,
        }.get(position, 2)
        sampler.advance(state, logits)
        assert state.clean_BN[0].nonzero()[:, 0].tolist() == sorted([1, 3, first])


def test_entropy_bound() -> None:
    """Against the sum written out: least entropies first, sum minus the largest <= bound."""
    chances = [0.99, 0.9, 0.8, 0.6, 0.5]
    entropy = [
        -c * math.log(c) - (1 - c) * math.log((1 - c) / 3) if c < 1 else 0.0 for c in chances
    ]
    bound, left, clean, wanted = 0.6, entropy[:], 0, []
    while left:
        k = max(k for k in range(1, len(left) + 1) if sum(left[: k - 1]) <= bound)
        clean, left = clean + k, left[k:]
        wanted.append([clean])
    logits = with_confidence(chances)[:, [3, 0, 4, 2, 1]]
    assert run(EntropyBoundCounts(bound), logits, "entropy") == wanted
    assert 1 < len(wanted) < 5
    assert run(EntropyBoundCounts(0.0), logits, "entropy") == [[1], [2], [3], [4], [5]]
    assert run(EntropyBoundCounts(100.0), logits, "entropy") == [[5]]


def test_plans_of_one_row_are_repeated() -> None:
    plan = TransitionTimes(5).plan(full(1, 4), draws(1))
    assert isinstance(plan, TimedPlan)
    assert isinstance(plan, DrawnPlan)
    assert isinstance(plan, Plan)
    three = plan.repeated(3)
    assert three.time_BE.shape[0] == three.priority_BN.shape[0] == 3
    assert torch.equal(three.time_BE[2], plan.time_BE[0])
    assert three.time(99, torch.zeros(3)).tolist() == [0, 0, 0]
