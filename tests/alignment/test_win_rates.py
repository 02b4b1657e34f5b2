"""Length control: what a planted preference for length and a planted quality become."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.alignment.win_rates import length_controlled_win_rate, length_feature, verdicts
from sparring.launch.statistics import Interval

Array = np.ndarray


def controlled(preferences: Array, ours: Array, theirs: Array, **options: object) -> Interval:
    settings = {"groups": np.arange(len(preferences)), "seed": 0, "resamples": 200, **options}
    found = length_controlled_win_rate(preferences, ours, theirs, **settings)  # type: ignore[arg-type]
    assert found is not None
    return found


def lengths(seed: int, rows: int = 320, longer: float = 60.0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(200 + longer, 80, size=rows).round(), rng.normal(200, 80, rows).round()


@pytest.mark.parametrize("seed", range(4))
def test_a_judge_of_length_alone_gives_one_half(seed: int) -> None:
    ours, theirs = lengths(seed)
    chance = 1 / (1 + np.exp(-2.0 * np.tanh((ours - theirs) / (ours - theirs).std())))
    wins = (np.random.default_rng(seed + 100).random(320) < chance).astype(float)
    assert wins.mean() > 0.58
    value, low, high = controlled(wins, ours, theirs)
    assert low < 0.5 < high
    assert abs(value - 0.5) < 0.09
    # Soft labels carry no noise, and with them the model is exact but for its small ridge.
    assert chance.mean() > 0.6
    assert controlled(chance, ours, theirs).mean == pytest.approx(0.5, abs=1e-3)


def test_a_verdict_by_length_alone_is_separable_and_gives_one_half() -> None:
    ours, theirs = lengths(1)
    wins = 0.5 + 0.5 * np.sign(ours - theirs)
    assert wins.mean() > 0.65
    value, low, high = controlled(wins, ours, theirs)
    assert (value, low) == (pytest.approx(0.5, abs=0.1), pytest.approx(0.5, abs=0.3))
    assert np.isfinite([value, low, high]).all()


@pytest.mark.parametrize("quality", [0.2, 0.5, 0.8])
def test_quality_without_length_stays_what_it_is(quality: float) -> None:
    ours, theirs = lengths(2)
    assert controlled(np.full(320, quality), ours, theirs).mean == pytest.approx(quality, abs=2e-3)
    wins = (np.random.default_rng(3).random(320) < quality).astype(float)
    value, low, high = controlled(wins, ours, theirs)
    assert value == pytest.approx(wins.mean(), abs=0.05)
    assert low < quality < high


def test_quality_and_length_are_told_apart() -> None:
    ours, theirs = lengths(4, longer=120)
    feature = length_feature(ours, theirs)
    assert feature is not None
    truth = 1 / (1 + np.exp(-(0.4 + 1.5 * feature)))
    expected = 1 / (1 + np.exp(-0.4))
    assert truth.mean() > expected + 0.05
    assert controlled(truth, ours, theirs).mean == pytest.approx(expected, abs=1e-3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), shift=st.integers(-200, 200), soft=st.booleans())
def test_exchanging_the_policies_gives_the_complement(seed: int, shift: int, soft: bool) -> None:
    rng = np.random.default_rng(seed)
    wins = rng.random(40) if soft else rng.integers(0, 3, 40) / 2
    ours, theirs = rng.integers(1, 300, 40) + shift, rng.integers(1, 300, 40)
    one = controlled(wins, ours, theirs, resamples=20)
    other = controlled(1 - wins, theirs, ours, resamples=20)
    assert one.mean == pytest.approx(1 - other.mean, abs=1e-7)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-7)


def test_all_wins_stay_finite() -> None:
    ours, theirs = lengths(5, longer=0)
    value, _, high = controlled(np.ones(320), ours, theirs)
    assert 0.99 < value <= high < 1


def test_equal_lengths_need_no_control() -> None:
    same = np.full(10, 7.0)
    wins = np.array([1.0] * 6 + [0.0] * 4)
    assert controlled(wins, same, same).mean == pytest.approx(0.6, abs=0.01)


def test_a_constant_difference_cannot_be_told_from_quality() -> None:
    ours = np.arange(10.0)
    options = {"groups": np.arange(10), "seed": 0}
    assert length_controlled_win_rate(np.ones(10), ours + 5, ours, **options) is None  # type: ignore[arg-type]


def test_copies_of_a_row_add_no_certainty() -> None:
    ours, theirs = lengths(6, rows=60)
    wins = (np.random.default_rng(7).random(60) < 0.6).astype(float)
    once = controlled(wins, ours, theirs, ridge=0.1)
    copies = [np.repeat(x, 5) for x in (wins, ours, theirs)]
    grouped = controlled(*copies, groups=np.repeat(np.arange(60), 5), ridge=0.5)
    assert grouped == pytest.approx(once, abs=1e-6)


def test_verdicts_hear_both_orders() -> None:
    logits = np.zeros((3, 2, 2))
    logits[:, 0, 1], logits[:, 1, 0] = [2.0, 1.0, 0.5], [-1.0, 1.0, 0.75]
    assert verdicts(logits, 0, 1).tolist() == [1.0, 0.5, 0.0]
    assert verdicts(logits, 1, 0).tolist() == [0.0, 0.5, 1.0]
    assert verdicts(logits, 1, 1).tolist() == [0.5] * 3
