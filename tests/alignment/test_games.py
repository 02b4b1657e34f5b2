"""The empirical game: what noise, selection and order of policies do to its figures."""

import json

import numpy as np
import pytest

from sparring.alignment.games import (
    best_response,
    best_responses,
    cross_play,
    cyclicity,
    duality_gap,
    exploitability,
    pairwise_probabilities,
    payoff,
)
from sparring.alignment.preferences import pair_probabilities

Array = np.ndarray


def rows_of(strengths: list[float], rows: int, seed: int, noise: float = 1.0) -> Array:
    """(rows, M, M) probabilities of a judge with noise in each one-order logit."""
    rng = np.random.default_rng(seed)
    rating = np.array(strengths)
    logits = rating[:, None] - rating[None, :] + noise * rng.normal(size=(rows, *[len(rating)] * 2))
    logits[:, np.arange(len(rating)), np.arange(len(rating))] = 0
    return pairwise_probabilities(logits)


def test_probabilities_are_the_pairwise_convention() -> None:
    import torch

    logits = np.random.default_rng(0).normal(size=(4, 3, 3)) * 5
    logits[:, range(3), range(3)] = 0
    expected = pair_probabilities(torch.from_numpy(logits), "pairwise").numpy()
    np.testing.assert_allclose(pairwise_probabilities(logits), expected, rtol=1e-12)


def test_a_better_last_iterate_is_not_exploited() -> None:
    rows = rows_of([0.0, 0.5, 1.0], 300, seed=0)
    found = cross_play(rows, groups=np.arange(300), seed=1, resamples=300)
    assert json.loads(json.dumps(found)) == found
    mean = payoff(rows)
    np.testing.assert_allclose(found["payoff"], mean)
    np.testing.assert_allclose(mean + mean.T, 1)
    assert found["exploitability_last"] == [0, 0, 0]
    value, low, high = found["exploitability_average"]
    assert value == pytest.approx(mean[2].mean() - 0.5)
    assert 0.05 < low < value < high
    assert found["duality_gap_average"] == pytest.approx([2 * x for x in (value, low, high)])
    assert np.array(found["payoff_low"])[2, 0] < mean[2, 0] < np.array(found["payoff_high"])[2, 0]
    assert found["cyclicity"][0] < 0.1


def test_a_worse_last_iterate_is_exploited() -> None:
    rows = rows_of([0.0, 1.0, 0.2], 300, seed=2)
    value, low, _ = cross_play(rows, groups=np.arange(300), seed=1, resamples=300)[
        "exploitability_last"
    ]
    assert value == pytest.approx(payoff(rows)[1, 2] - 0.5)
    assert low > 0.1


def test_groups_widen_the_interval() -> None:
    rows = np.repeat(rows_of([0.0, 1.0, 0.2], 40, seed=3, noise=3.0), 5, axis=0)
    alone, grouped = (
        cross_play(rows, groups=labels, seed=0, resamples=400)["exploitability_last"]
        for labels in (np.arange(200), np.repeat(np.arange(40), 5))
    )
    ratio = (grouped[2] - grouped[1]) / (alone[2] - alone[1])
    assert ratio == pytest.approx(5**0.5, rel=0.25)


def test_order_of_the_other_policies_does_not_matter() -> None:
    rows = rows_of([0.3, -0.4, 0.9, 0.1], 50, seed=4)
    order = [2, 0, 1, 3]
    shuffled = rows[:, order][:, :, order]
    one, two = (
        cross_play(given, groups=np.arange(50), seed=0, resamples=50) for given in (rows, shuffled)
    )
    for name in ("exploitability_last", "exploitability_average", "cyclicity"):
        assert one[name] == pytest.approx(two[name])
    prompts = [f"p{n // 2}" for n in range(50)]
    best = [best_responses(given, prompts, prompts, seed=0) for given in (rows, shuffled)]
    for name, value in best[0].items():
        assert value == pytest.approx(best[1][name])


def test_selection_does_not_make_equals_look_exploitable() -> None:
    """Every candidate is the policy's equal; only measuring where one chose would say otherwise."""
    rng = np.random.default_rng(5)
    wins = (rng.random((2000, 8, 4)) < 0.5).astype(float)
    crossed = best_response(wins)
    assert abs(crossed.mean()) < 4 * crossed.std() / 2000**0.5
    naive = wins.mean(axis=2).max(axis=1) - 0.5
    assert naive.mean() > 0.25


def test_a_best_response_that_depends_on_the_prompt_is_found() -> None:
    rng = np.random.default_rng(6)
    chance = np.where(rng.permuted(np.tile(np.arange(3), (400, 1)), axis=1) == 0, 0.9, 0.3)
    wins = (rng.random((400, 3, 8)) < chance[:, :, None]).astype(float)
    # No single candidate wins: their mean over prompts is ½. By prompt the best wins 0.9.
    assert wins.mean(axis=(0, 2)) == pytest.approx([0.5] * 3, abs=0.08)
    found = best_response(wins).mean()
    assert 0.3 < found < 0.4


def test_best_responses_are_by_prompt_and_need_two_samples() -> None:
    rows = rows_of([0.0, 2.0, 0.0], 60, seed=7, noise=0.1)
    prompts = [f"p{n // 3}" for n in range(60)]
    found = best_responses(rows, prompts, prompts, seed=0)
    assert found["best_response_last"] == pytest.approx([0.38, 0.38, 0.38], abs=0.02)
    assert found["best_response_average"][0] == pytest.approx((0.88 * 2 + 0.5) / 3 - 0.5, abs=0.02)
    assert best_responses(rows, [f"p{n}" for n in range(60)], prompts, seed=0) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exploitability(np.eye(3), [0.5, 0.5]), "payoff"),
        (lambda: exploitability(np.eye(2), [0.5, 0.6]), "sum to 1"),
        (lambda: duality_gap(np.eye(2), [1.5, -0.5]), "sum to 1"),
        (lambda: payoff(np.eye(2)), r"\(N, M, M\)"),
        (lambda: best_response(np.ones((2, 3, 1))), "at least 2"),
        (lambda: best_response(np.ones((2, 3, 2)), halves=[1, 1]), "both used"),
    ],
)
def test_refuses(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_two_policies_have_no_cycle() -> None:
    assert cyclicity([[0.5, 0.9], [0.1, 0.5]]) == pytest.approx(0, abs=1e-12)
