"""Bootstrap intervals against normal theory, and what clustering does to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.alignment.statistics import bootstrap_mean, paired_difference


def test_width_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    mean, low, high = bootstrap_mean(values, seed=1)
    error = values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_level_sets_the_width() -> None:
    values = np.random.default_rng(0).normal(size=400)
    wide, narrow = (bootstrap_mean(values, seed=1, level=level) for level in (0.95, 0.5))
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert ratio == pytest.approx(1.96 / 0.6745, rel=0.08)


def test_copies_of_a_row_add_no_certainty() -> None:
    values = np.random.default_rng(2).normal(size=60)
    groups = np.arange(60)
    once = bootstrap_mean(values, groups=groups, seed=3)
    copied = bootstrap_mean(np.repeat(values, 9), groups=np.repeat(groups, 9), seed=3)
    assert copied == pytest.approx(once)
    ungrouped = bootstrap_mean(np.repeat(values, 9), seed=3)
    ratio = (once.high - once.low) / (ungrouped.high - ungrouped.low)
    assert ratio == pytest.approx(3.0, rel=0.1)


def test_groups_of_unequal_size_are_weighted_by_rows() -> None:
    values, groups = [0.0, 1.0, 1.0, 1.0], ["a", "b", "b", "b"]
    mean, low, high = bootstrap_mean(values, groups=groups, seed=0, level=0.4)
    assert (mean, low, high) == (0.75, 0.75, 0.75)  # half the resamples draw one group of each
    assert bootstrap_mean(values, groups=groups, seed=0)[1:] == (0.0, 1.0)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.lists(st.tuples(st.floats(-9, 9), st.integers(0, 4)), min_size=1, max_size=20),
    data=st.data(),
)
def test_order_of_rows_does_not_matter(rows: list[tuple[float, int]], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    results = [
        bootstrap_mean([v for v, _ in some], groups=[g for _, g in some], seed=7, resamples=50)
        for some in (rows, shuffled)
    ]
    assert results[0] == pytest.approx(results[1], abs=1e-9)
    assert results[0].low <= results[0].high


def test_seeds_decide_everything() -> None:
    values = np.random.default_rng(4).random(50)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_pairing_removes_what_both_share() -> None:
    rng = np.random.default_rng(5)
    difficulty, gain = rng.normal(0, 5, size=200), rng.normal(0.3, 0.5, size=200)
    mean, low, high = paired_difference(difficulty + gain, difficulty, seed=0)
    assert mean == pytest.approx(gain.mean())
    assert (mean, low, high) == pytest.approx(tuple(bootstrap_mean(gain, seed=0)))
    assert 0 < low < mean < high < 0.5
    groups = np.arange(200) // 4
    grouped = paired_difference(difficulty + gain, difficulty, groups=groups, seed=0)
    assert grouped == pytest.approx(bootstrap_mean(gain, groups=groups, seed=0))


def test_coverage_with_correlated_rows() -> None:
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(40), 5)
    covered = {"grouped": 0, "rows": 0}
    for seed in range(100):
        values = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=200)
        for name, labels in (("grouped", groups), ("rows", None)):
            result = bootstrap_mean(values, groups=labels, seed=seed, resamples=200)
            covered[name] += result.low <= 0 <= result.high
    assert covered["grouped"] >= 87
    assert covered["rows"] <= 80


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "non-empty"),
        ([[1.0]], {}, r"shape \(1, 1\)"),
        ([1.0, float("nan")], {}, "values is not finite at 1"),
        ([1.0, 2.0], {"groups": ["a"]}, r"shape \(2,\).*\(1,\)"),
        ([1.0], {"resamples": 0}, "resamples must be at least 1, got 0"),
        ([1.0], {"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
    ],
)
def test_refuses(values: list[float], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, seed=0, **options)


def test_refuses_rows_that_are_not_paired() -> None:
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="a must be a non-empty"):
        paired_difference([], [], seed=0)
