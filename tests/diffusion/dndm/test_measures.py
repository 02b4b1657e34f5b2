"""Measures of texts against brute force and arithmetic by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.diffusion.dndm import evaluate
from sparring.diffusion.dndm.config import TextEvaluateConfig
from sparring.diffusion.dndm.measures import NgramModel, edits, entropy, nearest, words_known
from sparring.diffusion.dndm.rows import SampledText, Text
from sparring.diffusion.dndm.vocabulary import Vocabularies, Vocabulary
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.processes import World
from sparring.launch.rows import write_rows
from sparring.launch.stages import Context


def recursive(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return recursive(a[1:], b[1:])
    return 1 + min(recursive(a[1:], b), recursive(a, b[1:]), recursive(a[1:], b[1:]))


def test_edits_are_the_fewest() -> None:
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    for a, b in itertools.product(words, words):
        assert edits(a, b) == recursive(a, b)
    assert edits("kitten", "sitting") == 3
    assert nearest("abc", ["xyz", "abd", "abde"]) == (1, 3)


def test_the_ngram_model_by_hand() -> None:
    """aab over {a, b} and one more symbol: the formula of the docstring, written out."""
    model = NgramModel("aab", order=2, symbols="ab")
    a = (2 + 2 / 3) / (3 + 2)  # n(a) = 2, d = 2 kinds, 1/3 below
    b = (1 + 2 / 3) / (3 + 2)
    # After a: a once, b once, two kinds. After b nothing was seen.
    after_a = {"a": (1 + 2 * a) / 4, "b": (1 + 2 * b) / 4}
    found = np.exp(model.log_probabilities("abba"))
    assert found == pytest.approx([a, after_a["b"], b, a], abs=1e-12)


def test_ngram_probabilities_sum_to_one() -> None:
    rng = np.random.default_rng(0)
    text = "".join(rng.choice(list("abc"), 300))
    model = NgramModel(text, order=4, symbols="abc")
    for context in ("", "a", "cb", "abc", "ccab"):
        each = [math.exp(model.log_probabilities(context + c)[-1]) for c in "abc?"]
        assert sum(each) == pytest.approx(1, abs=1e-12)


def test_its_own_text_is_likelier_than_noise() -> None:
    text = "the cat sat on the mat " * 20
    model = NgramModel(text, symbols=sorted(set(text)))
    assert model.log_probabilities(text[:60]).mean() > -0.2
    assert model.log_probabilities("tac eht tas").mean() < -1
    with pytest.raises(ValueError, match="needs a text"):
        NgramModel("", symbols="a")
    with pytest.raises(ValueError, match="too many"):
        NgramModel("a", symbols=[str(n) for n in range(10_000)])


def test_entropy_and_words() -> None:
    assert entropy(np.array([2.0, 2, 2, 2])) == pytest.approx(2)
    assert entropy(np.array([4.0, 0])) == 0
    assert entropy(np.zeros(2)) == 0
    assert words_known("at the zat on m", frozenset({"the", "on"})) == (2, 3)


def test_a_ratio_and_its_interval() -> None:
    value, low, high = evaluate.Spread(0, 0.95).ratio([1, 0, 0, 1] * 50, [1.0] * 200)
    assert value == 0.5
    # Of 200 coins: 1.96 standard deviations are 0.069.
    assert (low, high) == pytest.approx((0.431, 0.569), abs=0.015)
    inner = evaluate.Spread(0, 0.5).ratio([1, 0, 0, 1] * 50, [1.0] * 200)
    assert inner[1:] == pytest.approx([0.476, 0.524], abs=0.01)
    assert evaluate.Spread(0, 0.95).ratio([0, 0], [0, 0]) == [0, 0, 0]


def evaluated(tmp_path: Path, texts: list[str], *, pairs: bool, **options: Any) -> dict[str, Any]:
    target = ["A B C A B", "A B"] if pairs else ["a cat sat ", "on the mat"]
    made = Vocabularies(
        Vocabulary.of(target, "words" if pairs else "characters"),
        Vocabulary.of(["xy"], "characters") if pairs else None,
    )
    made.save(tmp_path)
    held = [Text(f"h{n}", "x" if pairs else "", t) for n, t in enumerate(target)]
    write_rows(tmp_path / "heldout.parquet", Text, held)
    rows = [
        SampledText(r.text_id, r.source, r.target, ("A C",) if pairs else (), t, (), 0.0, 1, 0, 1)
        for r, t in zip(held, texts, strict=True)
    ]
    write_rows(tmp_path / "samples.parquet", SampledText, rows)
    inputs = {"samples": tmp_path, "data": tmp_path}
    context = Context(World(), tmp_path, 0, emit=lambda **_: None)
    return evaluate.run(TextEvaluateConfig(**options), inputs, tmp_path, context)


def test_errors_count_against_the_nearest_target(tmp_path: Path) -> None:
    figures = evaluated(tmp_path, ["A C", "B"], pairs=True)
    # "A C" is right as it is; "B" is one edit from "A B".
    assert figures["symbol_error"][0] == pytest.approx(1 / 4)
    assert figures["sequence_error"][0] == pytest.approx(1 / 2)


def test_bleu_of_the_target_is_100(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    figures = evaluated(tmp_path, ["A B C A B", "A B"], pairs=True, measures=("bleu", "chrf"))
    assert figures["bleu"][0] == pytest.approx(100)
    assert figures["chrf"] == pytest.approx([100, 100, 100])
    worse = evaluated(tmp_path, ["C C C A B", "A B"], pairs=True, measures=("bleu", "chrf"))
    for name in ("bleu", "chrf"):
        value, low, high = worse[name]
        assert low <= value <= high
        assert value < 90
        assert low < high


def test_bleu_and_chrf_are_sacrebleus_with_all_that_is_right(tmp_path: Path) -> None:
    """The value against corpus_score; "A C" is what else is right, as for the error rates."""
    pytest.importorskip("sacrebleu", reason="needs sacrebleu")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    said = ["A C C A B", "A C"]
    figures = evaluated(tmp_path, said, pairs=True, measures=("bleu", "chrf"))
    references = [["A B C A B", "A B"], ["A C", "A C"]]
    for name, metric in (("bleu", BLEU(tokenize="none", force=True)), ("chrf", CHRF())):
        wanted = metric.corpus_score(said, references).score
        assert figures[name][0] == pytest.approx(wanted)
        assert wanted > metric.corpus_score(said, references[:1]).score


def test_texts_are_judged_by_another_text(tmp_path: Path) -> None:
    (tmp_path / "reference.txt").write_text("a cat sat on the mat " * 30)
    same = evaluated(tmp_path, ["a cat sat ", "on the mat"], pairs=False)
    assert same["perplexity"] == same["heldout_perplexity"]
    assert same["entropy"] == same["heldout_entropy"]
    assert same["words_known"][0] == 1
    odd = evaluated(tmp_path, ["tttttttttt", "a tac tat "], pairs=False)
    assert odd["perplexity"][0] > 3 * same["perplexity"][0]
    assert odd["entropy"][0] < same["entropy"][0]
    assert odd["entropy"][1] <= odd["entropy"][0] <= odd["entropy"][2]
    assert odd["entropy"][1] < odd["entropy"][2]
    assert odd["words_known"][0] == 0


def test_what_cannot_be_measured_is_said(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"reference\.txt is missing or empty"):
        evaluated(tmp_path, ["a", "b"], pairs=False)
    with pytest.raises(UsageError, match="need pairs"):
        evaluated(tmp_path, ["a", "b"], pairs=False, measures=("errors",))
    with pytest.raises(SparringError, match="give the one that sampled, --model"):
        evaluated(tmp_path, ["a", "b"], pairs=False, measures=("bits",))
