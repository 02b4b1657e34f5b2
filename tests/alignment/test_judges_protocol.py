"""The protocol's checks, the score-to-matrix rule and building judges by name."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment.judges import build as build_module
from sparring.alignment.judges.build import build_judge, judge_names
from sparring.alignment.judges.protocol import checked_matrix, scores_to_matrix
from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError, UsageError


class Fixed:
    """A judge that returns what it was given."""

    name = "fixed"
    identity = "fixed/1"

    def __init__(self, matrix):
        self._matrix = matrix

    def matrix(self, prompts, responses):
        return self._matrix

    def details(self, prompts, responses):
        return {}


PROMPT = Prompt("p-7", (Message("user", "hi"),), group="g")


@given(st.lists(st.integers(-100, 100), min_size=2, max_size=5))
def test_scores_become_antisymmetric_logits_in_score_order(scores):
    matrix = scores_to_matrix([scores])
    assert matrix.shape == (1, len(scores), len(scores))
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix[0], -matrix[0].T)
    assert np.argmax(matrix[0].sum(axis=1)) == int(np.argmax(scores))
    assert matrix[0, 0, 1] == scores[0] - scores[1]


def test_checked_matrix_accepts_a_judge_that_is_not_antisymmetric():
    logits = np.array([[[0.0, 1.2], [-0.8, 0.0]]])
    result = checked_matrix(Fixed(logits), ["x"], [["a", "b"]])
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, logits, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_judge_that_is_not_finite_is_named_with_prompt_and_k(value):
    logits = np.zeros((2, 3, 3))
    logits[1, 2, 0] = value
    with pytest.raises(SparringError, match=r"fixed .*p-7, response k=2 against k=0"):
        checked_matrix(Fixed(logits), ["x", PROMPT], [["a", "b", "c"]] * 2)


def test_wrong_shape_and_nonzero_diagonal_are_refused():
    with pytest.raises(SparringError, match=r"fixed returned an array of shape \(1, 2, 2\)"):
        checked_matrix(Fixed(np.zeros((1, 2, 2))), ["x"], [["a", "b", "c"]])
    with pytest.raises(SparringError, match="k=1 of prompt p-7"):
        checked_matrix(Fixed(np.diag([0.0, 1.0])[None]), [PROMPT], [["a", "b"]])


@pytest.mark.parametrize("responses", [[["a", "b"], ["a"]], [[], []]])
def test_ragged_or_empty_responses_are_refused(responses):
    with pytest.raises(SparringError, match="same number"):
        checked_matrix(Fixed(np.zeros((2, 2, 2))), ["x", PROMPT], responses)
    with pytest.raises(SparringError, match="1 prompts"):
        checked_matrix(Fixed(np.zeros((2, 2, 2))), ["x"], responses)


def test_unknown_judge_and_option_list_what_there_is():
    with pytest.raises(UsageError, match=r"did you mean 'pairrm'\? .*verifier, relevance, pairrm"):
        build_judge("pair-rm")
    with pytest.raises(UsageError, match=r"no option 'pass_logits'.*pass_logit"):
        build_judge("verifier", None, pass_logits=1.0)
    with pytest.raises(UsageError, match="reward-model needs the path"):
        build_judge("reward-model")


def test_options_reach_the_verifier():
    judge = build_judge("verifier", None, relevance=False, pass_logit=5.0)
    assert judge.name == "verifier"
    assert judge.pass_logit == 5.0
    assert judge.relevance is None


@pytest.mark.parametrize("name", ["pairrm", "reward-model"])
def test_a_missing_checkpoint_is_named(name):
    with pytest.raises(SparringError, match="/nowhere/judge"):
        build_judge(name, "/nowhere/judge")


def _plugin(path, **options):
    judge = Fixed(np.zeros((1, 1, 1)))
    judge.built_with = (path, options)
    return judge


def test_plugins_come_through_the_entry_point_group(monkeypatch):
    entry = EntryPoint("mine", f"{__name__}:_plugin", build_module.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: _plugin)
    monkeypatch.setattr(build_module, "entry_points", lambda group: (entry,))
    built_in = ["verifier", "relevance", "pairrm", "reward-model", "llm", "ensemble"]
    assert judge_names() == [*built_in, "mine"]
    judge = build_judge("mine", "w", batch_size=16.0)
    assert judge.built_with == ("w", {"batch_size": 16})
    assert isinstance(judge.built_with[1]["batch_size"], int)


def test_importing_judges_and_prompts_costs_no_torch():
    code = (
        "import sys, sparring.alignment.judges, sparring.alignment.prompts, "
        "sparring.alignment.judges.build, sparring.alignment.judges.verifier; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_options_from_a_command_line_are_numbers_and_switches():
    """There they come as text, as in `sparring judge --options min_relevance 0.3`."""
    assert build_judge("verifier", relevance="False", min_relevance="0.3").min_relevance == 0.3
    judge = build_judge("relevance", sharpness="10", device="cpu")
    assert (judge.sharpness, judge.relevance.device.type) == (10.0, "cpu")
