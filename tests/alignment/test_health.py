"""Judge health: planted faults are reported, noise alone is not."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import pytest

from sparring.alignment.games import pairwise_probabilities
from sparring.alignment.health import health, health_sections, health_text
from sparring.alignment.judge_figures import different_texts, logit_figures
from sparring.alignment.rows import Judged, Message, Prompt, Response
from sparring.launch.errors import SparringError
from sparring.launch.report import write_page
from sparring.launch.statistics import Resamples, fit_logistic

Array = np.ndarray
# The spec's example, cyclic once both orders are averaged: 0 over 1 over 2 over 0.
CYCLE = np.array([[0, 1.2, -0.4], [-0.8, 0, 0.6], [0.9, -0.5, 0]])
SEEDS = range(5)


def planted(
    seed: int,
    *,
    prompts: int = 150,
    k: int = 4,
    noise: float = 0.3,
    first_place: float = 0.0,
    per_character: float = 0.0,
) -> tuple[Array, Array]:
    """(N, K, K) one-order logits of a judge of quality, and (N, K) lengths."""
    rng = np.random.default_rng(seed)
    quality = rng.normal(size=(prompts, k))
    lengths = rng.integers(20, 200, size=(prompts, k))
    score = quality + per_character * (lengths - 110)
    logits = score[:, :, None] - score[:, None, :] + first_place
    logits = logits + noise * rng.normal(size=logits.shape)
    logits[:, np.arange(k), np.arange(k)] = 0
    return logits, lengths


def rows_of(logits: Array, iteration: int = 0) -> list[Judged]:
    return [
        Judged(f"p{n}", iteration, tuple(tuple(map(float, line)) for line in matrix))
        for n, matrix in enumerate(logits)
    ]


def answers(lengths: Array, ids: bool = True) -> list[Response]:
    """Texts of these lengths, all different."""
    return [
        Response(
            prompt_id=f"p{n}",
            k=k,
            iteration=0,
            text=f"{k:02}".ljust(int(length), "."),
            prompt_ids=(1,),
            response_ids=tuple(range(int(length))) if ids else (),
            finish_reason="stop",
            seed=0,
        )
        for n, row in enumerate(lengths)
        for k, length in enumerate(row)
    ]


def examine(logits: Array, lengths: Array, **options: object) -> dict[str, object]:
    return health(rows_of(logits), answers(lengths), **options)  # type: ignore[arg-type]


# What is planted is found, and nothing else


@pytest.mark.parametrize("seed", SEEDS)
def test_an_unbiased_noisy_judge_is_healthy(seed: int) -> None:
    found = examine(*planted(seed))
    assert found["verdicts"] == []
    for name, width in (("first_place_advantage", 0.02), ("length_slope", 0.2)):
        assert abs(found[name][0]) < width
        assert found[name][1] < found[name][0] < found[name][2]
    assert found["swap_consistency"][0] > 0.8
    assert found["tie_rate"] == found["identical_rate"] == [0, 0, 0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("offset", "place"), [(0.6, "first"), (-0.6, "second")])
def test_a_judge_that_favours_a_place(seed: int, offset: float, place: str) -> None:
    found = examine(*planted(seed, first_place=offset))
    (sentence,) = [s for s in found["verdicts"] if "place" in s]
    assert sentence.startswith(f"favours the {place} place: ")
    assert not [s for s in found["verdicts"] if "responses" in s]
    value, low, high = found["first_place_offset"]
    assert low < offset < high
    assert value == pytest.approx(offset, abs=0.05)
    assert np.sign(found["first_place_advantage"][0]) == np.sign(offset)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("weight", "word"), [(0.02, "longer"), (-0.02, "shorter")])
def test_a_judge_that_favours_a_length(seed: int, weight: float, word: str) -> None:
    found = examine(*planted(seed, per_character=weight))
    (sentence,) = found["verdicts"]
    assert sentence.startswith(f"favours {word} responses: ")
    assert "association" in sentence
    assert (found["longer_wins"][0] - 0.5) * weight > 0
    assert found["length_slope"][1] * weight > 0 < found["length_slope"][2] * weight


def test_a_judge_of_length_alone_has_the_planted_slope() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 400, size=(60, 4))
    score = 0.01 * lengths
    found = examine(score[:, :, None] - score[:, None, :], lengths)
    i, j = np.triu_indices(4, 1)
    spread = np.sqrt(np.mean((lengths[:, i] - lengths[:, j])[lengths[:, i] != lengths[:, j]] ** 2))
    assert found["length_slope"][0] == pytest.approx(0.01 * spread, rel=1e-4)
    assert found["longer_wins"] == [1, 1, 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cyclic_judge(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cycle = np.array([[0, 1, -1], [-1, 0, 1], [1, -1, 0]], dtype=float)
    logits = 2 * cycle + 0.3 * rng.normal(size=(80, 3, 3))
    logits[:, range(3), range(3)] = 0
    found = examine(logits, rng.integers(20, 200, size=(80, 3)))
    assert [s for s in found["verdicts"] if s.startswith("is cyclic")]
    assert found["cyclic_triples"][0] > 0.95
    assert found["cyclicity"][0] > 0.95
    assert not [s for s in found["verdicts"] if s.startswith("favours")]


def test_coins_have_a_quarter_of_cyclic_triples() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 5, 5))
    logits[:, range(5), range(5)] = 0
    figures = logit_figures(
        logits, np.ones((2000, 5)), np.ones((2000, 10), bool), list(map(str, range(2000))), seed=0
    )
    assert figures["cyclic_triples"][0] == pytest.approx(0.25, abs=0.01)
    assert figures["cyclicity"][0] == pytest.approx(3 / 5, abs=0.02)
    assert figures["swap_consistency"][0] == pytest.approx(0.5, abs=0.02)
    assert figures["longer_wins"] is None
    assert figures["length_slope"] is None


# Closed forms


def test_the_specs_cycle() -> None:
    found = examine(CYCLE[None], np.array([[5, 9, 7]]))
    # Pairs 01: 1.2, −.8; 02: −.4, .9; 12: .6, −.5. All keep their verdict when swapped.
    assert found["swap_consistency"] == [1, 1, 1]
    offsets = [(1.2 - 0.8) / 2, (-0.4 + 0.9) / 2, (0.6 - 0.5) / 2]
    assert found["first_place_offset"][0] == pytest.approx(np.mean(offsets))
    ordered = CYCLE[~np.eye(3, dtype=bool)]
    advantage = (1 / (1 + np.exp(-ordered))).mean() - 0.5
    assert found["first_place_advantage"][0] == pytest.approx(advantage)
    assert found["cyclic_triples"][0] == 1
    share = 3 * ((1 + 0.55 + 0.65) / 3) ** 2 / (1 + 0.55**2 + 0.65**2)
    assert found["cyclicity"][0] == pytest.approx(share)
    # 0 over 1 although shorter, 2 over 0 and longer, 1 over 2 and longer.
    assert found["longer_wins"][0] == pytest.approx(2 / 3)


def test_the_specs_ranker_is_transitive() -> None:
    rating = np.array([1, 0.2, -0.3, 0.5, 0])
    found = examine((rating[:, None] - rating[None, :])[None], np.arange(5, 10)[None])
    assert found["cyclic_triples"][0] == 0
    assert found["cyclicity"][0] == pytest.approx(0, abs=1e-15)
    assert found["first_place_offset"][0] == found["tie_rate"][0] == 0
    assert found["swap_consistency"][0] == 1
    # Numbers 0 and 3 are on top: of the ten pairs 0 loses none, and 4, the longest, wins over 2.
    longer = [rating[j] > rating[i] for i in range(5) for j in range(i + 1, 5)]
    assert found["longer_wins"][0] == pytest.approx(np.mean(longer))


def test_ties_are_neither_agreement_nor_contradiction() -> None:
    # Consistent; a tie in both orders; a tie in one order: 1, 1 and ½.
    logits = np.array([[[0, 1], [-1, 0]], [[0, 0], [0, 0]], [[0, 2], [0, 0]]], dtype=float)
    found = examine(logits, np.array([[3, 4]] * 3))
    assert found["swap_consistency"][0] == pytest.approx(2.5 / 3)
    assert found["tie_rate"][0] == pytest.approx(1 / 3)
    other = np.array([[[0, 1], [-1, 0]], [[0, 3], [-3, 0]], [[0, -2], [2, 0]]], dtype=float)
    second = examine(logits, np.array([[3, 4]] * 3), second=rows_of(other))
    assert second["agreement"][0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert second["kendall"][0] == pytest.approx((1 - 1) / 2)  # the tie has no ranking


def test_identical_texts_are_counted_and_left_out() -> None:
    logits = np.full((1, 3, 3), 4.0) * (1 - np.eye(3))
    logits[0, 0, 1], logits[0, 1, 0] = 1.0, -1.0
    texts = [["one", "two", "two"]]
    different = different_texts(texts)
    assert different.tolist() == [[True, True, False]]
    figures = logit_figures(logits, np.array([[3, 4, 5]]), different, ["p"], seed=0)
    assert figures["identical_rate"][0] == pytest.approx(1 / 3)
    assert figures["swap_consistency"][0] == pytest.approx(1 / 2)
    assert figures["first_place_offset"][0] == pytest.approx((0 + 4) / 2)
    assert figures["cyclic_triples"] is None


# A second judge


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_temperature_of_a_sharper_judge(factor: float) -> None:
    logits, lengths = planted(0)
    found = examine(factor * logits, lengths, second=rows_of(logits))
    assert found["temperature"] == pytest.approx([1 / factor] * 3, abs=1e-3)
    assert found["agreement"] == [1, 1, 1]
    assert found["kendall"][0] > 0.97  # P̂ is a mean of σ, and so not of the same order at any scale
    word = "sharper" if factor > 1 else "flatter"
    assert found["verdicts"][0].startswith(f"is {word} than the second judge")


def test_a_judge_is_calibrated_to_itself() -> None:
    logits, lengths = planted(1)
    found = examine(logits, lengths, second=rows_of(logits)[::-1])
    assert found["temperature"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert found["calibration_error"] == pytest.approx([0, 0, 0], abs=1e-12)
    assert found["verdicts"] == []
    bins = found["reliability"]
    assert sum(row["count"] for row in bins) == found["pairs"]
    assert all(row["first"] == pytest.approx(row["second"]) for row in bins)
    mirrored = [1 - row["first"] for row in reversed(bins)]
    assert [row["first"] for row in bins] == pytest.approx(mirrored)


def test_the_calibration_error_of_a_certain_judge_of_coins() -> None:
    """P₁ is 0 or 1 where P₂ is 0.6 for the same side: the error is 0.4 in every bin."""
    sign = np.array([[0, 1], [-1, 0]], dtype=float)
    certain, unsure = (np.tile(scale * sign, (40, 1, 1)) for scale in (100.0, np.log(1.5)))
    lengths = np.tile([10, 20], (40, 1))
    found = examine(certain, lengths, second=rows_of(unsure))
    assert found["calibration_error"] == pytest.approx([0.4] * 3)
    assert any("is not calibrated" in sentence for sentence in found["verdicts"])


@pytest.mark.parametrize("seed", SEEDS)
def test_judges_that_have_nothing_to_do_with_each_other(seed: int) -> None:
    logits, lengths = planted(seed)
    second, _ = planted(seed + 50)
    found = examine(logits, lengths, second=rows_of(second))
    assert any(s.startswith("hardly agrees") for s in found["verdicts"])
    assert abs(found["kendall"][0]) < 0.15
    assert found["calibration_error"][1] > 0


def test_one_newton_step_a_resample_is_as_good_as_refits() -> None:
    logits, lengths = planted(5, prompts=80, k=3, per_character=0.01)
    found = examine(logits, lengths)["length_slope"]
    i, j = np.triu_indices(3, 1)
    difference = (lengths[:, i] - lengths[:, j]).astype(float)
    spread = np.sqrt(np.mean(difference[difference != 0] ** 2))
    feature = (difference / spread).ravel()[:, None]
    chance = pairwise_probabilities(logits)[:, i, j].ravel()
    draws = Resamples(np.repeat(np.arange(80), 3), seed=1, resamples=1000)
    refits = [fit_logistic(feature, chance, ridge=0, weights_RN=w)[:, 0] for w in draws.weights()]
    low, high = np.quantile(np.concatenate(refits), [0.025, 0.975])
    assert found[0] == pytest.approx(fit_logistic(feature, chance, ridge=0)[0, 0], rel=1e-4)
    assert found[1:] == pytest.approx([low, high], abs=0.1 * (high - low))


# Invariance


def test_numbering_of_responses_and_order_of_prompts_do_not_matter() -> None:
    logits, lengths = planted(2, prompts=24, first_place=0.2, per_character=0.01)
    second, _ = planted(3, prompts=24)
    order = np.array(list(permutations(range(4))))
    rows = np.arange(24)[:, None]
    numbered = [
        given[rows[:, :, None], order[:, :, None], order[:, None, :]] for given in (logits, second)
    ]
    one = logit_figures(
        logits,
        lengths,
        np.ones((24, 6), bool),
        [f"{n:02}" for n in range(24)],
        second_NKK=second,
        seed=0,
    )
    two = logit_figures(
        numbered[0],
        lengths[rows, order],
        np.ones((24, 6), bool),
        [f"{n:02}" for n in range(24)],
        second_NKK=numbered[1],
        seed=0,
    )
    back = np.arange(24)[::-1]
    three = logit_figures(
        logits[back],
        lengths[back],
        np.ones((24, 6), bool),
        [f"{n:02}" for n in back],
        second_NKK=second[back],
        seed=0,
    )
    for other in (two, three):
        for name, value in one.items():
            if name == "reliability":
                pairs = zip(value, other[name], strict=True)
                assert all(mine == pytest.approx(theirs) for mine, theirs in pairs)
            else:
                assert other[name] == pytest.approx(value, abs=1e-7), name


def test_prompts_of_one_group_add_no_certainty() -> None:
    logits, lengths = planted(4, prompts=40)
    copies = np.repeat(np.arange(40), 4)

    def prompt(n: int, group: str) -> Prompt:
        return Prompt(f"p{n}", (Message("user", "?"),), group)

    judged, responses = rows_of(logits[copies]), answers(lengths[copies])
    widths = {
        kind: health(judged, responses, prompts=[prompt(n, group(n)) for n in range(160)])
        for kind, group in (("alone", lambda n: f"{n}"), ("grouped", lambda n: f"{n // 4}"))
    }
    assert widths["grouped"]["groups"] == 40
    alone, grouped = (widths[kind]["longer_wins"] for kind in ("alone", "grouped"))
    assert (grouped[2] - grouped[1]) / (alone[2] - alone[1]) == pytest.approx(2, rel=0.3)


# Rows in, text and report out


def test_figures_are_json_and_shown(tmp_path) -> None:  # type: ignore[no-untyped-def]
    logits, lengths = planted(0, first_place=1.0)
    second, _ = planted(0)
    found = examine(logits, lengths, second=rows_of(second))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["prompts"], found["responses"], found["pairs"]) == (150, 4, 900)
    text = health_text(found)
    assert "first place's advantage" in text
    assert "! favours the first place" in text
    assert "150 prompts in 150 groups" in text
    sections = health_sections({"iteration 1": found, "iteration 2": examine(*planted(1))})
    page = write_page(tmp_path / "r.html", title="t", lead="l", sections=sections).read_text()
    assert "Judge health" in page
    assert "favours the first place" in page
    assert "<svg" in page
    assert health_sections({}) == []


def test_a_healthy_judge_is_said_to_be() -> None:
    found = examine(*planted(0))
    assert "nothing significant is wrong" in health_text(found)
    assert health_sections({"iteration 1": found})[1].rows == [
        ["all", "nothing significant is wrong"]
    ]


def test_lengths_are_characters_where_there_are_no_ids() -> None:
    logits, lengths = planted(0, prompts=10)
    tokens = health(rows_of(logits), answers(lengths))
    characters = health(rows_of(logits), answers(lengths, ids=False))
    assert (tokens["length_unit"], characters["length_unit"]) == ("tokens", "characters")
    assert tokens["longer_wins"] == characters["longer_wins"]


def test_one_response_a_prompt_has_no_pairs() -> None:
    found = examine(np.zeros((2, 1, 1)), np.array([[3], [4]]))
    assert (found["pairs"], found["verdicts"]) == (0, [])
    assert "nothing significant" in health_text(found)


def test_two_responses_have_no_triples() -> None:
    found = examine(*planted(0, k=2))
    assert "cyclic_triples" not in found
    assert found["cyclicity"][0] == pytest.approx(0, abs=1e-12)


def test_refuses_what_does_not_fit() -> None:
    logits, lengths = planted(0, prompts=3)
    judged, responses = rows_of(logits), answers(lengths)
    with pytest.raises(SparringError, match="no judged prompts"):
        health([], responses)
    with pytest.raises(SparringError, match="prompt p2: 4 responses were judged, but there are 3"):
        health(judged, responses[:-1])
    with pytest.raises(SparringError, match="second judge has 2 prompts, the first 3; 1 are"):
        health(judged, responses, second=judged[:2])
    with pytest.raises(SparringError, match="4 responses by the first judge, 2 by the second"):
        health(judged, responses, second=rows_of(logits[:, :2, :2]))
