"""What holds for every pairwise judge's matrix, shown on PairRM with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_deberta import tiny_config, tiny_tokenizer

from sparring.alignment.judges.cache import VerdictCache
from sparring.alignment.judges.pairrm import DebertaV2PairRM, PairRM
from sparring.alignment.judges.protocol import checked_matrix
from sparring.alignment.preferences import pair_probabilities, win_probabilities
from sparring.launch.errors import SparringError

SYMMETRIC = ("pairwise", "mean-probability", "aggregated")
texts = st.text("abc ?<|>[]SEPNone/s", max_size=30)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    return DebertaV2PairRM(tiny_config())


slow_ok = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@slow_ok
@given(texts, st.lists(texts, min_size=1, max_size=4), st.data())
def test_permutations_symmetry_and_means(model, prompt, responses, data):
    judge = PairRM(model, tiny_tokenizer())
    order = data.draw(st.permutations(range(len(responses))))
    matrix = checked_matrix(judge, [prompt], [responses])
    permuted = judge.matrix([prompt], [[responses[i] for i in order]])
    np.testing.assert_allclose(permuted[0], matrix[0][np.ix_(order, order)], atol=1e-5)
    for convention in SYMMETRIC:
        P = pair_probabilities(torch.tensor(matrix), convention)
        torch.testing.assert_close(P + P.mT, torch.ones_like(P))
        mean = win_probabilities(torch.tensor(matrix), convention).mean().item()
        assert mean == pytest.approx(0.5, abs=1e-5)


@slow_ok
@given(st.lists(texts, min_size=2, max_size=3), st.sampled_from([1, 40, 100, 5000]))
def test_token_budget_and_batch_mates_do_not_matter(model, responses, budget):
    alone = PairRM(model, tiny_tokenizer(), batch_size=1).matrix(["why?"], [responses])
    mates = [["x" * 200, "y", *responses[2:]], responses]
    together = PairRM(model, tiny_tokenizer(), batch_tokens=budget).matrix(["a", "why?"], mates)
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


def test_the_budget_holds_with_padding(model, monkeypatch):
    shapes = []
    forward = PairRM._forward
    monkeypatch.setattr(
        PairRM,
        "_forward",
        lambda self, rows: shapes.append([len(r.ids) for r in rows]) or forward(self, rows),
    )
    judge = PairRM(model, tiny_tokenizer(), batch_size=7, batch_tokens=120)
    judge.matrix(["why?"] * 2, [["a" * n for n in (1, 5, 9)], ["b" * n for n in (2, 40, 150)]])
    assert sum(map(len, shapes)) == 12
    assert all(len(rows) * max(rows) <= 120 or len(rows) == 1 for rows in shapes)
    assert max(map(len, shapes)) > 2
    with pytest.raises(SparringError, match="batch_size must be at least 1"):
        PairRM(model, tiny_tokenizer(), batch_size=0)


def test_one_response_a_blank_one_and_a_very_long_one(model):
    judge = PairRM(model, tiny_tokenizer())
    np.testing.assert_array_equal(judge.matrix(["p", "q"], [["a"], ["b"]]), np.zeros((2, 1, 1)))
    responses = [["", "word " * 600, "None"]]
    matrix = checked_matrix(judge, ["p"], responses)
    assert np.count_nonzero(matrix) == 6
    details = judge.details(["p"], responses)
    np.testing.assert_array_equal(details["empty"], [[1, 0, 0]])
    np.testing.assert_array_equal(details["truncated"], [[0, 1, 0]])


def test_nan_weights_are_named_and_their_scores_not_kept(tmp_path):
    broken = DebertaV2PairRM(tiny_config())
    with torch.no_grad():
        broken.head_layer[1].weight[0, 0] = float("nan")
    judge = PairRM(broken, tiny_tokenizer())
    judge.open_cache(str(tmp_path))
    with pytest.raises(SparringError, match=r"pairrm returned nan .*try float32"):
        checked_matrix(judge, ["p"], [["a", "b"]])
    assert len(VerdictCache(tmp_path, judge.identity)) == 0


def test_scores_from_the_cache_equal_computed_ones(model, tmp_path):
    responses = [["a", "bc", "", "None"]]
    first, second = (PairRM(model, tiny_tokenizer()) for _ in range(2))
    for judge in (first, second):
        judge.open_cache(str(tmp_path))
    computed = first.matrix(["p"], responses)
    second.open_cache(str(tmp_path))  # parts are read at opening
    np.testing.assert_array_equal(second.matrix(["p"], responses), computed)
    assert second.usage()["pairs_computed"] == 0
    third = PairRM(model, tiny_tokenizer(), batch_size=1, source_tokens=100, total_tokens=200)
    third.open_cache(str(tmp_path))  # other limits, another judge
    third.matrix(["p"], responses)
    assert third.usage()["pairs_from_cache"] == 0
