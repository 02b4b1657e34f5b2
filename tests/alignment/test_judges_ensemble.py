"""The ensemble: averaged probabilities, and its configuration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment.config import JudgeConfig, JudgeMember
from sparring.alignment.judges import build as build_module
from sparring.alignment.judges.build import build_ensemble, build_judge
from sparring.alignment.judges.ensemble import SMALLEST, Ensemble, Member
from sparring.alignment.judges.protocol import checked_matrix
from sparring.alignment.judging import make_judge
from sparring.alignment.preferences import pair_probabilities, win_probabilities
from sparring.launch.config import build, parse, plain, read_toml
from sparring.launch.errors import SparringError, UsageError


class Fixed:
    """A judge with given logits."""

    identity = "fixed/1"
    name = "fixed"

    def __init__(self, logits):
        self.logits = np.asarray(logits, dtype=np.float32)

    def matrix(self, prompts, responses):
        return self.logits

    def details(self, prompts, responses):
        return {"seen": np.ones((len(prompts), len(responses[0])), dtype=np.float32)}


logits = st.integers(2, 4).flatmap(
    lambda k: st.lists(
        st.lists(
            st.lists(st.floats(-30, 30, width=32), min_size=k, max_size=k), min_size=k, max_size=k
        ),
        min_size=2,
        max_size=2,
    )
)


@given(logits, st.floats(0.1, 5))
def test_probabilities_are_averaged_and_the_result_is_antisymmetric(two, weight):
    one, other = (np.array(rows) * (1 - np.eye(len(rows))) for rows in two)
    judge = Ensemble([Member("a", Fixed(one[None]), weight), Member("b", Fixed(other[None]), 1.0)])
    k = len(one)
    matrix = checked_matrix(judge, ["p"], [["x"] * k])
    np.testing.assert_array_equal(matrix, -matrix.swapaxes(1, 2))
    sigmas = [1 / (1 + np.exp(-(m - m.T) / 2)) for m in (one, other)]
    mean = (weight * sigmas[0] + sigmas[1]) / (weight + 1)
    expected = np.clip(mean, SMALLEST, 1 - SMALLEST)
    np.testing.assert_allclose(1 / (1 + np.exp(-matrix[0].astype(float))), expected, atol=1e-6)
    # The pairing stage's default reads exactly that back, whichever symmetric convention.
    P = pair_probabilities(torch.tensor(matrix), "pairwise")[0].numpy()
    np.testing.assert_allclose(P, expected, atol=1e-5)
    np.testing.assert_allclose(P + P.T, 1, atol=1e-6)
    assert win_probabilities(torch.tensor(matrix)).mean().item() == pytest.approx(0.5, abs=1e-6)


def test_one_member_is_its_own_symmetric_self_and_extremes_are_finite():
    judge = Ensemble([Member("a", Fixed([[[0, 500], [-400, 0]]]))])
    matrix = checked_matrix(judge, ["p"], [["x", "y"]])
    assert matrix[0, 0, 1] == pytest.approx(np.log((1 - SMALLEST) / SMALLEST), abs=1e-2)
    single = checked_matrix(Ensemble([Member("a", Fixed([[[0]]]))]), ["p"], [["x"]])
    np.testing.assert_array_equal(single, [[[0]]])


def test_a_members_fault_is_the_members():
    judge = Ensemble([Member("a", Fixed([[[0, np.nan], [0, 0]]]))])
    with pytest.raises(SparringError, match="judge fixed returned nan"):
        judge.matrix(["p"], [["x", "y"]])


def test_details_carry_their_members_label():
    judge = Ensemble([Member("a", Fixed([[[0, 1], [1, 0]]])), Member("b", Fixed(np.zeros(4)))])
    assert set(judge.details(["p"], [["x", "y"]])) == {"a.seen", "b.seen"}
    assert judge.usage() == {}
    assert judge.identity == "ensemble/1 1·(fixed/1) + 1·(fixed/1)"


TOML = """
name = "ensemble"

[[members]]
name = "verifier"
weight = 2
options = {relevance = false, pass_logit = 4.0}

[[members]]
name = "letter_judge:make"
label = "letters"
"""


def test_members_come_from_toml_and_take_overrides(tmp_path):
    path = tmp_path / "judge.toml"
    path.write_text(TOML)
    config = build(JudgeConfig, read_toml(path), "judge.toml")
    assert [m.label or m.name for m in config.members] == ["verifier", "letters"]
    assert build(JudgeConfig, plain(config), "again") == config
    changed = parse(
        JudgeConfig,
        ["--members.1.weight", "3", "--chunk", "7"],
        prog="x",
        description="",
        default=config,
    )
    assert changed.members[1].weight == 3
    assert changed.members[0] == config.members[0]
    judge = make_judge(config)
    assert [(m.label, m.weight) for m in judge.members] == [("verifier", 2.0), ("letters", 1.0)]
    assert judge.members[0].judge.pass_logit == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ensemble"}, "need each other"),
        ({"name": "pairrm", "members": [{"name": "verifier"}]}, "need each other"),
        ({"name": "ensemble", "members": [{"name": "verifier"}] * 2}, "different labels"),
        ({"name": "ensemble", "members": [{"name": "ensemble"}]}, "a single judge"),
        ({"name": "ensemble", "members": [{}]}, "a single judge"),
        ({"name": "ensemble", "members": [{"name": "llm", "weight": 0}]}, "must be positive"),
        ({"name": "ensemble", "members": [{"name": "llm", "wieght": 1}]}, "unknown key .*wieght"),
    ],
)
def test_wrong_members_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        build(JudgeConfig, settings, "judge")


def test_an_ensemble_without_members_is_refused():
    with pytest.raises(UsageError, match="needs members"):
        Ensemble([])
    with pytest.raises(UsageError, match="members"):
        build_judge("ensemble")
    with pytest.raises(UsageError, match="different labels"):
        Ensemble([Member("a", Fixed([]))] * 2)
    with pytest.raises(UsageError, match="must be positive"):
        Ensemble([Member("a", Fixed([]), 0.0)])
    assert JudgeMember(name="llm").weight == 1


def test_a_local_model_is_loaded_before_the_others(monkeypatch):
    """vLLM chooses its accelerator by the environment, which torch reads once."""
    built = []

    def record(name, path=None, **options):
        built.append(name)
        return Fixed([])

    monkeypatch.setattr(build_module, "build_judge", record)
    members = [JudgeMember(name=name) for name in ("pairrm", "verifier", "llm")]
    judge = build_ensemble(members)
    assert built == ["llm", "pairrm", "verifier"]
    assert [member.label for member in judge.members] == ["pairrm", "verifier", "llm"]
