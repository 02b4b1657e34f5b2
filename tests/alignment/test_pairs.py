"""Pair rules: who is chosen, with which numbers, and why rows are dropped."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.alignment.algorithms import PAIR_RULES, pair_rule
from sparring.alignment.pairs import (
    Dropped,
    all_responses,
    best_worst,
    mix,
    random_pair,
    real_generated,
    reverse_half,
)
from sparring.alignment.preferences import CONVENTIONS
from sparring.alignment.rows import Judged, Message, Pair, Prompt, Response
from sparring.launch.errors import SparringError

CYCLIC = ((0.0, 1.2, -0.4), (-0.8, 0.0, 0.6), (0.9, -0.5, 0.0))


def judged(logits: Sequence[Sequence[float]], prompt_id: str = "p") -> Judged:
    return Judged(prompt_id, iteration=2, logits=tuple(tuple(row) for row in logits))


def response(
    k: int, text: str | None = None, ids: tuple[int, ...] | None = None, iteration: int = 2
) -> Response:
    return Response(
        prompt_id="p",
        k=k,
        iteration=iteration,
        text=f"answer {k}" if text is None else text,
        prompt_ids=(1, 2, 3),
        response_ids=(10 + k, 0) if ids is None else ids,
        finish_reason="stop",
        seed=k,
    )


def responses(count: int) -> list[Response]:
    return [response(k) for k in range(count)]


def from_rewards(*rewards: float) -> list[list[float]]:
    return [[a - b for b in rewards] for a in rewards]


def must_pair(result: Pair | Dropped) -> Pair:
    assert isinstance(result, Pair)
    return result


def prompt(prompt_id: str = "p") -> Prompt:
    return Prompt(prompt_id, (Message("user", "hello"),), group="g", real="hi")


@pytest.mark.parametrize(
    ("convention", "chosen_win", "rejected_win", "pair_win"),
    [
        ("aggregated", 0.557277, 0.426362, 1 / (1 + math.exp(-(0.7 / 3 + 0.3)))),
        ("pairwise", 0.524683, 0.467692, 1 / (1 + math.exp(-1.0))),
        ("mean-probability", 0.52481, 0.468269, None),
    ],
)
def test_best_against_worst(
    convention: str, chosen_win: float, rejected_win: float, pair_win: float | None
) -> None:
    pair = must_pair(best_worst(judged(CYCLIC), responses(3), convention=convention))
    assert (pair.chosen_ids, pair.rejected_ids) == ((10, 0), (11, 0))
    assert pair.chosen_win == pytest.approx(chosen_win, abs=1e-6)
    assert pair.rejected_win == pytest.approx(rejected_win, abs=1e-6)
    if pair_win is not None:
        assert pair.pair_win == pytest.approx(pair_win)
    assert (pair.pair_id, pair.prompt_id, pair.iteration) == ("p/2", "p", 2)
    assert pair.prompt_ids == (1, 2, 3)


def test_two_responses_carry_the_self_term() -> None:
    pair = must_pair(
        best_worst(judged(from_rewards(0.3, 1.0)), responses(2), convention="pairwise")
    )
    assert pair.chosen_ids == (11, 0)
    assert pair.chosen_win == pytest.approx((0.5 + pair.pair_win) / 2)
    assert pair.rejected_win == pytest.approx(1 - pair.chosen_win)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(4)))
def test_order_of_the_rows_does_not_matter(order: list[int]) -> None:
    rows = responses(4)
    logits = judged(from_rewards(0.1, 2.0, -1.0, 0.4))
    shuffled = [rows[k] for k in order]
    assert best_worst(logits, shuffled, convention="pairwise") == best_worst(
        logits, rows, convention="pairwise"
    )


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    "rewards",
    [(0.3, 0.1, -0.5, 0.3, -0.8), (-0.1, 0.0, 0.3, 0.3, 0.1), (-0.2, -0.6, -0.1, -0.2, -0.6)],
)
def test_ties_go_to_the_lowest_number(convention: str, rewards: tuple[float, ...]) -> None:
    """Summed in another order, the later of two equals comes out ahead by the last bit."""
    logits = judged(from_rewards(*rewards))
    pair = must_pair(best_worst(logits, responses(len(rewards)), convention=convention))
    assert pair.chosen_ids == (10 + rewards.index(max(rewards)), 0)
    assert pair.rejected_ids == (10 + rewards.index(min(rewards)), 0)


def test_identical_texts_are_dropped() -> None:
    same = [response(k, text="yes") for k in range(3)]
    assert best_worst(judged(CYCLIC), same, convention="pairwise") is Dropped.SAME_TEXT
    one = best_worst(judged([[0.0]]), responses(1), convention="pairwise")
    assert one is Dropped.SAME_TEXT


def test_no_preference_is_dropped_even_when_rounding_makes_one() -> None:
    zeros = judged([[0.0] * 3] * 3)
    assert best_worst(zeros, responses(3), convention="pairwise") is Dropped.NO_PREFERENCE
    cycle = judged([[0.0, 0.3, -0.3], [-0.3, 0.0, 0.3], [0.3, -0.3, 0.0]])
    assert best_worst(cycle, responses(3), convention="pairwise") is Dropped.NO_PREFERENCE


def test_margin_must_be_exceeded() -> None:
    rows, logits = responses(2), judged(from_rewards(1.0, 0.0))
    pair = must_pair(best_worst(logits, rows, convention="pairwise"))
    margin = pair.chosen_win - pair.rejected_win
    at = best_worst(logits, rows, convention="pairwise", min_margin=margin)
    assert at is Dropped.SMALL_MARGIN
    below = best_worst(logits, rows, convention="pairwise", min_margin=margin - 1e-6)
    assert below == pair
    with pytest.raises(ValueError, match=r"min_margin must be in \[0, 1\), got 1"):
        best_worst(logits, rows, convention="pairwise", min_margin=1)


def test_equal_or_missing_tokens_are_dropped() -> None:
    logits = judged(from_rewards(1.0, 0.0))
    same = [response(0, ids=(7, 0)), response(1, ids=(7, 0))]
    assert best_worst(logits, same, convention="pairwise") is Dropped.SAME_IDS
    for rows in ([response(0, ids=()), response(1)], [response(0), response(1, ids=())]):
        assert best_worst(logits, rows, convention="pairwise") is Dropped.EMPTY


def test_reasons_can_be_counted() -> None:
    rows = responses(2)
    results = [
        best_worst(judged(from_rewards(gap, 0.0)), rows, convention="pairwise", min_margin=0.1)
        for gap in (0.0, 0.1, 0.2, 3.0)
    ]
    counts = Counter(result for result in results if isinstance(result, Dropped))
    assert counts == {"no_preference": 1, "small_margin": 2}


def test_responses_must_be_the_judged_ones() -> None:
    logits = judged(from_rewards(1.0, 0.0))
    with pytest.raises(SparringError, match=r"2 responses were judged.*got \[0\]"):
        best_worst(logits, responses(1), convention="pairwise")
    with pytest.raises(SparringError, match=r"got \[1, 1\]"):
        best_worst(logits, [response(1), response(1)], convention="pairwise")
    with pytest.raises(SparringError, match="prompt q: given responses to p"):
        best_worst(judged(CYCLIC, "q"), responses(3), convention="pairwise")


def test_bad_judgements_name_the_prompt() -> None:
    for logits in (((0.0, math.nan), (0.0, 0.0)), ((0.0, 1.0), (0.0,)), ((0.0,), (0.0,))):
        with pytest.raises(SparringError, match="prompt p: "):
            best_worst(judged(logits), responses(2), convention="pairwise")
    with pytest.raises(SparringError, match="got 'elo'"):
        best_worst(judged(CYCLIC), responses(3), convention="elo")


@settings(deadline=None, max_examples=60)
@given(
    rewards=st.lists(st.floats(-3, 3), min_size=2, max_size=7, unique=True),
    empty=st.sets(st.integers(0, 6), max_size=2),
)
def test_all_responses_are_equally_often_there(rewards: list[float], empty: set[int]) -> None:
    """So that the mean over pairs is the mean over responses, each with its own target."""
    count = len(rewards)
    rows = [response(k, ids=() if k in empty else None) for k in range(count)]
    made = all_responses(judged(from_rewards(*rewards)), rows, convention="pairwise")
    if made == [Dropped.NO_PREFERENCE]:  # rewards that differ in the last bits only
        assert max(rewards) - min(rewards) < 1e-7
        return
    pairs = [must_pair(one) for one in made if not isinstance(one, Dropped)]
    left = [k for k in range(count) if k not in empty]
    assert len(made) - len(pairs) == count - len(left)
    seen = Counter(ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    if len(left) > 1:
        assert set(seen) == {(10 + k, 0) for k in left}
        assert set(seen.values()) == {1 if len(left) % 2 == 0 else 2}
        assert len({pair.pair_id for pair in pairs}) == len(pairs)
    expected = {
        (10 + i, 0): np.mean([1 / (1 + math.exp(b - a)) for b in rewards])
        for i, a in enumerate(rewards)
    }
    for pair in pairs:
        assert pair.chosen_win == pytest.approx(expected[pair.chosen_ids])
        assert pair.rejected_win == pytest.approx(expected[pair.rejected_ids])
        assert pair.chosen_win >= pair.rejected_win - 1e-9


def test_all_responses_drop_what_teaches_nothing() -> None:
    same = [response(k, text="yes") for k in range(3)]
    assert all_responses(judged(CYCLIC), same, convention="pairwise") == [Dropped.SAME_TEXT]
    zeros = judged([[0.0] * 3] * 3)
    assert all_responses(zeros, responses(3), convention="pairwise") == [Dropped.NO_PREFERENCE]
    close = judged(from_rewards(0.1, 0.0, 0.05))
    dropped = all_responses(close, responses(3), convention="pairwise", min_margin=0.2)
    assert dropped == [Dropped.SMALL_MARGIN]


def test_a_random_pair_is_any_two_and_the_better_is_chosen() -> None:
    rng = np.random.default_rng(0)
    rewards = (0.3, -1.0, 2.0, 0.9)
    seen: Counter[tuple[int, int]] = Counter()
    for _ in range(600):
        pair = must_pair(
            random_pair(
                judged(from_rewards(*rewards)), responses(4), convention="pairwise", rng=rng
            )
        )
        better, worse = pair.chosen_ids[0] - 10, pair.rejected_ids[0] - 10
        assert rewards[better] > rewards[worse]
        assert pair.pair_win == pytest.approx(1 / (1 + math.exp(rewards[worse] - rewards[better])))
        seen[better, worse] += 1
    assert len(seen) == 6
    assert 60 < min(seen.values()) <= max(seen.values()) < 150


def test_a_random_pair_drops_equals() -> None:
    rng = np.random.default_rng(0)
    one = random_pair(judged([[0.0]]), responses(1), convention="pairwise", rng=rng)
    assert one is Dropped.SAME_TEXT
    equal = [response(0, text="yes"), response(1, text="yes")]
    logits = judged(from_rewards(1.0, 0.0))
    assert random_pair(logits, equal, convention="pairwise", rng=rng) is Dropped.SAME_TEXT
    tied = random_pair(judged([[0.0] * 2] * 2), responses(2), convention="pairwise", rng=rng)
    assert tied is Dropped.NO_PREFERENCE


def test_rules_are_found_by_name() -> None:
    assert pair_rule("all") == PAIR_RULES["all"]
    assert pair_rule("my_rules:mine") == "my_rules:mine"
    with pytest.raises(
        ValueError, match="unknown pair rule 'best-wors'; did you mean 'best-worst'"
    ):
        pair_rule("best-wors")


@pytest.mark.parametrize("convention", ["pairwise", "mean-probability", "aggregated"])
def test_control_reverses_half_of_the_verdicts_and_nothing_else(convention: str) -> None:
    """A reversed pair is that of a judge with the opposite logits, as `best_worst` finds it."""
    real, opposite = [], []
    for n in range(41):
        rewards = [math.sin(7 * n + k) for k in range(5)]
        logits, rows = judged(from_rewards(*rewards)), responses(5)
        minus = judged(from_rewards(*(-reward for reward in rewards)))
        real.append(must_pair(best_worst(logits, rows, convention=convention)))
        opposite.append(must_pair(best_worst(minus, rows, convention=convention)))
    control = reverse_half(real, np.random.default_rng(0))
    turned = [n for n, pair in enumerate(control) if pair != real[n]]
    assert len(turned) == 20
    assert turned != list(range(20))
    for n in turned:
        for name in ("chosen_win", "rejected_win", "pair_win"):
            assert getattr(control[n], name) == pytest.approx(getattr(opposite[n], name))
            object.__setattr__(control[n], name, getattr(opposite[n], name))
        assert control[n] == opposite[n]
    assert reverse_half(real, np.random.default_rng(1)) != reverse_half(
        real, np.random.default_rng(2)
    )
    assert reverse_half([], np.random.default_rng(0)) == []


def test_real_against_generated() -> None:
    pair = must_pair(real_generated(prompt(), response(1), [8, 9, 0]))
    assert (pair.chosen_ids, pair.rejected_ids) == ((8, 9, 0), (11, 0))
    assert (pair.chosen_win, pair.rejected_win, pair.pair_win) == (1.0, 0.0, 1.0)
    assert (pair.pair_id, pair.iteration, pair.prompt_ids) == ("p/2/1", 2, (1, 2, 3))


def test_real_against_generated_drops() -> None:
    assert real_generated(prompt(), response(0), [10, 0]) is Dropped.SAME_IDS
    assert real_generated(prompt(), response(0), []) is Dropped.EMPTY
    assert real_generated(prompt(), response(0, ids=()), [10, 0]) is Dropped.EMPTY
    blank = replace(prompt(), real=" \n")
    assert real_generated(blank, response(1), [0]) is Dropped.EMPTY
    with pytest.raises(SparringError, match="prompt q: given a response to p"):
        real_generated(prompt("q"), response(0), [10, 0])


def test_mix_holds_both_iterations_once() -> None:
    def pairs(iteration: int) -> list[Pair]:
        rows = [response(k, iteration=iteration) for k in range(4)]
        return [must_pair(real_generated(prompt(), row, [8, 0])) for row in rows]

    assert mix(pairs(0), []) == pairs(0)
    both = mix(pairs(1), pairs(0))
    assert both == pairs(1) + pairs(0)
    assert len({pair.pair_id for pair in both}) == 8
    with pytest.raises(SparringError, match=r"4 of 8 pairs occur twice \(p/1/0, p/1/1, p/1/2, ..."):
        mix(pairs(1), pairs(1))
