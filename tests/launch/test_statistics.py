"""Bootstrap intervals against normal theory, and what clustering does to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.launch.statistics import (
    Resamples,
    bootstrap_mean,
    fit_logistic,
    paired_difference,
    percentile_interval,
)


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


# Figures that are computed anew in each resample


def test_resampled_sums_are_those_of_the_bootstrap_of_the_mean() -> None:
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(30), 4)
    values = rng.normal(size=120)
    draws = Resamples(groups, seed=3, resamples=300)
    sums = draws.sums(np.stack([values, np.ones(120)], 1))
    interval = percentile_interval(values.mean(), sums[:, 0] / sums[:, 1], 0.9)
    expected = bootstrap_mean(values, groups=groups, seed=3, resamples=300, level=0.9)
    assert interval == pytest.approx(expected)
    weights = np.concatenate(list(draws.weights()))
    np.testing.assert_allclose(weights @ values, sums[:, 0])
    assert (weights.reshape(300, 30, 4) == weights.reshape(300, 30, 4)[:, :, :1]).all()


def test_weights_come_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = Resamples(np.arange(10), seed=0, resamples=7)
    (whole,) = draws.weights()
    monkeypatch.setattr("sparring.launch.statistics._BLOCK", 30)
    blocks = list(draws.weights())
    assert [len(block) for block in blocks] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_resamples_without_the_figure_do_not_count() -> None:
    values = [float("nan"), 1.0, 2.0, 3.0]
    assert percentile_interval(2.0, values, 0.5) == (2.0, 1.5, 2.5)
    with pytest.raises(ValueError, match="undefined in every resample"):
        percentile_interval(2.0, [float("nan")], 0.5)


# Logistic regression


def test_an_intercept_alone_is_the_log_odds() -> None:
    target = np.array([1.0, 1.0, 0.25, 0.0, 1.0])
    fitted = fit_logistic(np.ones((5, 1)), target, ridge=0.0)
    assert fitted[0, 0] == pytest.approx(np.log(0.65 / 0.35), abs=1e-8)


def test_the_fit_is_stationary_and_weights_are_copies() -> None:
    rng = np.random.default_rng(8)
    features, target = rng.normal(size=(50, 3)), rng.random(50)
    weights = rng.integers(0, 3, size=(4, 50))
    fitted = fit_logistic(features, target, ridge=0.5, weights_RN=weights)
    for row, counts in zip(fitted, weights, strict=True):
        error = 1 / (1 + np.exp(-features @ row)) - target
        assert (counts * error) @ features + 0.5 * row == pytest.approx(np.zeros(3), abs=1e-7)
        copies = np.repeat(np.arange(50), counts)
        again = fit_logistic(features[copies], target[copies], ridge=0.5)
        assert again[0] == pytest.approx(row, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_separable_data_have_a_finite_solution(scale: float) -> None:
    features = scale * np.array([[-2.0], [-1.0], [1.0], [3.0]])
    fitted = fit_logistic(features, [0.0, 0.0, 1.0, 1.0], ridge=0.1)[0]
    chance = 1 / (1 + np.exp(-features @ fitted))
    gradient = (chance - [0, 0, 1, 1]) @ features + 0.1 * fitted
    assert gradient == pytest.approx([0.0], abs=1e-6)
    assert fitted[0] > 0


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ([0.0, 1.0, 1.0], {}, "do not fit"),
        ([0.0, 1.5], {}, "probabilities"),
        ([0.0, float("nan")], {}, "probabilities"),
        ([0.0, 1.0], {"ridge": -1.0}, "negative"),
    ],
)
def test_fit_refuses(target: list[float], options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_logistic([[1.0], [2.0]], target, **{"ridge": 0.0, **options})
