"""Verdicts kept by content: found again, shared by processes, never trusted when damaged."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment import judging
from sparring.alignment.config import JudgeMember
from sparring.alignment.judges.build import open_cache
from sparring.alignment.judges.cache import VerdictCache, verdict_key
from sparring.alignment.judges.ensemble import Ensemble, Member
from sparring.alignment.judges.pairwise import PairwiseJudge
from sparring.alignment.judges.protocol import Metered, checked_matrix
from sparring.alignment.judges.verifier import VerifierJudge
from sparring.alignment.stages import JudgeStage
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows
from sparring.launch.stages import Context

NAN = float("nan")


class Vowels(PairwiseJudge):
    """Vowels of the first minus those of the second, plus one for being shown first."""

    name = "vowels"
    identity = "vowels/1"

    def __init__(self, odd: dict[str, float | None] | None = None) -> None:
        super().__init__()
        self.asked: list[tuple[str, str, str]] = []
        self.odd = odd or {}

    def compare(self, triples):
        for triple in reversed(triples):
            self.asked.append(triple)
            _, first, second = triple
            gap = sum(c in "aeiou" for c in first) - sum(c in "aeiou" for c in second)
            yield triple, self.odd.get(first, gap / 3 + 1)


def make(path, **options):
    return Vowels(**options)


@given(
    st.tuples(*[st.text(max_size=4)] * 3),
    st.tuples(*[st.text(max_size=4)] * 3),
    st.sampled_from(["a", "b"]),
)
def test_keys_are_equal_for_equal_content_only(one, other, judge):
    assert (verdict_key("a", one) == verdict_key(judge, other)) == (("a", one) == (judge, other))
    assert verdict_key("j", ("a", "\ud83d", "b")) != verdict_key("j", ("a", "?", "b"))


def test_logits_survive_exactly_and_by_judge(tmp_path):
    values = {("p", "a", "b"): 0.1, ("p", "b", "a"): -1e-30, ("", "", ""): 3.0}
    cache = VerdictCache(tmp_path, "one")
    cache.add(values | {("p", "x", "y"): NAN, ("p", "y", "x"): np.inf})
    cache.flush()
    cache.flush()  # nothing new, nothing written
    assert len(list(tmp_path.iterdir())) == 1
    again = VerdictCache(tmp_path, "one")
    assert again.find([*values, ("p", "x", "y")]) == values
    assert len(VerdictCache(tmp_path, "two")) == 0


def test_writers_do_not_meet(tmp_path):
    """Several ranks or hosts: parts have names of their own, and equal keys do no harm."""
    writers = [VerdictCache(tmp_path, "j") for _ in range(3)]
    for n, writer in enumerate(writers):
        writer.add({("p", "shared", "x"): 1.0, ("p", str(n), "x"): float(n)})
    for writer in writers:
        writer.flush()
    assert len(VerdictCache(tmp_path, "j")) == 4
    assert len(list(tmp_path.glob("*.parquet"))) == 3


def test_damaged_parts_are_ignored_with_a_note(tmp_path):
    good = VerdictCache(tmp_path, "j")
    good.add({("p", "a", "b"): 1.0})
    good.flush()
    (whole,) = tmp_path.glob("*.parquet")
    data = whole.read_bytes()
    prefix = whole.name.partition("-")[0]
    (tmp_path / f"{prefix}-cut.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / f"{prefix}-empty.parquet").write_bytes(b"")
    flipped = bytearray(data)
    flipped[len(data) // 4] ^= 0xFF
    (tmp_path / f"{prefix}-flipped.parquet").write_bytes(bytes(flipped))
    table = pq.read_table(whole)
    pq.write_table(table.rename_columns(["key", "score"]), tmp_path / f"{prefix}-named.parquet")
    nan = table.set_column(1, table.schema.field(1), [[NAN]])
    pq.write_table(nan, tmp_path / f"{prefix}-nan.parquet")
    (tmp_path / f".{prefix}-half.tmp").write_bytes(data[:10])
    cache = VerdictCache(tmp_path, "j")
    assert cache.find([("p", "a", "b")]) == {("p", "a", "b"): 1.0}
    names = {"cut", "empty", "flipped", "named", "nan"}
    assert {re.match(r"\w+-(\w+)\.parquet ignored: .", n)[1] for n in cache.notes} == names


def test_a_folder_that_cannot_be_one_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SparringError, match=r"judge\.cache .*file"):
        VerdictCache(tmp_path / "file", "j")


def test_more_responses_compute_only_new_pairs(tmp_path):
    """K from 5 to 7: 42 ordered pairs, 20 of them known."""
    responses = ["a", "be", "sea", "dieu", "queue", "aeiou", "x"]
    first = Vowels()
    first.open_cache(str(tmp_path))
    five = first.matrix(["p"], [responses[:5]])
    second = Vowels()
    second.open_cache(str(tmp_path))
    seven = second.matrix(["p"], [responses])
    assert len(second.asked) == 42 - 20
    assert all({a, b} & set(responses[5:]) for _, a, b in second.asked)
    np.testing.assert_array_equal(seven[:, :5, :5], five)
    np.testing.assert_array_equal(seven, Vowels().matrix(["p"], [responses]))
    assert second.usage() == {"pairs_asked": 42, "pairs_computed": 22, "pairs_from_cache": 20}


@given(st.permutations(range(4)), st.lists(st.sampled_from("abeio"), min_size=4, max_size=4))
def test_matrix_follows_permutations_and_repeats_are_asked_once(order, texts):
    judge = Vowels()
    matrix = judge.matrix(["p"], [texts])[0]
    permuted = Vowels().matrix(["p"], [[texts[i] for i in order]])[0]
    np.testing.assert_array_equal(permuted, matrix[np.ix_(order, order)])
    assert len(judge.asked) == len(set(judge.asked))


def test_one_response_and_no_prompt():
    judge = Vowels()
    np.testing.assert_array_equal(checked_matrix(judge, ["p", "q"], [["a"], ["b"]]), [[[0]], [[0]]])
    assert judge.matrix([], []).shape == (0, 0, 0)
    assert judge.asked == []


def test_what_is_not_finite_is_refused_and_not_kept(tmp_path):
    judge = Vowels(odd={"bad": NAN, "none": None})
    judge.open_cache(str(tmp_path))
    with pytest.raises(SparringError, match="returned nan for prompt #0, response k=0"):
        checked_matrix(judge, ["p"], [["bad", "a"]])
    matrix = checked_matrix(judge, ["p"], [["none", "a"]])
    assert matrix[0, 0, 1] == 0
    assert ("p", "none", "a") in judge.undecided
    kept = VerdictCache(tmp_path, judge.identity)
    asked = [("p", "bad", "a"), ("p", "a", "bad"), ("p", "none", "a"), ("p", "a", "none")]
    assert set(kept.find(asked)) == {("p", "a", "bad"), ("p", "a", "none")}


def test_what_was_computed_before_an_error_is_kept(tmp_path):
    class Breaks(Vowels):
        def compare(self, triples):
            yield next(super().compare(triples))
            raise SparringError("gone")

    judge = Breaks()
    judge.open_cache(str(tmp_path))
    with pytest.raises(SparringError, match="gone"):
        judge.matrix(["p"], [["a", "b"]])
    assert len(VerdictCache(tmp_path, judge.identity)) == 1


def test_blank_responses_are_counted():
    details = Vowels().details(["p"], [["", " \n", "text"]])
    np.testing.assert_array_equal(details["empty"], [[1, 1, 0]])


def test_a_cache_needs_a_pairwise_judge(tmp_path):
    with pytest.raises(UsageError, match=r"judge\.cache.*verifier does not judge pair by pair"):
        open_cache(VerifierJudge(None), str(tmp_path))
    inside = Vowels()
    mixed = Ensemble([Member("v", VerifierJudge(None)), Member("w", inside)])
    assert open_cache(mixed, str(tmp_path)) == [inside]


def stage(folder, tiny_chain, config, rank=0, size=1, finish=True):
    inputs = {"prompts": tiny_chain["prompts"], "responses": tiny_chain["generate"]}
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    events = []
    context = Context(World(rank, size), work, 0, emit=lambda **event: events.append(event))
    figures = judging.run(config, inputs, folder, context)
    if finish:
        figures |= judging.finish(config, inputs, folder, context)
    return figures, [event["note"] for event in events if "note" in event]


def test_the_stage_counts_over_ranks_and_results_do_not_know_the_cache(tiny_chain, tmp_path):
    name = f"{__name__}:make"
    plain, _ = stage(tmp_path / "plain", tiny_chain, JudgeStage(name=name, chunk=5))
    cached = JudgeStage(name=name, chunk=5, cache=str(tmp_path / "cache"))
    stage(tmp_path / "ranks", tiny_chain, cached, rank=1, size=2, finish=False)
    figures, notes = stage(tmp_path / "ranks", tiny_chain, cached, rank=0, size=2)
    assert notes == []
    for key in ("pairs_asked", "pairs_computed", "mean_empty"):
        assert figures[key] == plain[key]
    assert figures["pairs_asked"] == plain["prompts"] * 4 * 3
    (part, *_) = (tmp_path / "cache").glob("*.parquet")
    (tmp_path / "cache" / part.name.replace(".parquet", "0.parquet")).write_bytes(b"half")
    again, notes = stage(tmp_path / "again", tiny_chain, cached)
    assert again["pairs_computed"] == 0
    assert again["pairs_from_cache"] == figures["pairs_computed"]
    assert "ignored" in notes[0]
    assert len(again["cache_parts_ignored"]) == 1
    rows = [
        read_rows(tmp_path / run / "judged.parquet", judging.Judged)
        for run in ("plain", "ranks", "again")
    ]
    assert rows[0] == rows[1] == rows[2]


def test_usage_of_an_interrupted_process_stays(tmp_path, tiny_chain):
    config = JudgeStage(name=f"{__name__}:make", chunk=5)
    work = tmp_path / "run" / "work"
    work.mkdir(parents=True)
    (work / "usage-0-dead.json").write_text(json.dumps({"pairs_asked": 7.0, "price": 0.5}))
    figures, _ = stage(tmp_path / "run", tiny_chain, config)
    assert figures["pairs_asked"] == figures["prompts"] * 4 * 3 + 7
    assert figures["price"] == 0.5


def test_a_judge_of_an_ensemble_uses_the_cache(tmp_path):
    config = JudgeStage(
        name="ensemble",
        members=(JudgeMember(name=f"{__name__}:make", label="v"),),
        cache=str(tmp_path),
    )
    judge = judging.make_judge(config)
    judge.matrix(["p"], [["a", "b"]])
    assert isinstance(judge, Metered)
    assert judge.usage()["v.pairs_computed"] == 2
    again = judging.make_judge(config)
    again.matrix(["p"], [["a", "b"]])
    assert again.usage()["v.pairs_from_cache"] == 2
