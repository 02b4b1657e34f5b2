"""Responses of the user's own files: read, judged, paired; wrong rows are refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from one_stage import run_stage

from sparring.alignment import tokens
from sparring.alignment.generate import read_prompts
from sparring.alignment.prompt_files import load_prompts
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.response_files import read_responses
from sparring.alignment.rows import Pair, Response
from sparring.alignment.stages import GenerateStage
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows

ROWS = [
    {"prompt": "a cat?", "responses": ["no", "aaa", "a dog"]},
    {"prompt": "a dog?", "responses": ["a", {"role": "assistant", "content": " ran far "}, ""]},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_list_a_prompt(tmp_path: Path) -> None:
    rows = read_responses(jsonl(tmp_path / "r.jsonl", ROWS))
    found = [(row.prompt_id, row.k, row.text) for row in rows]
    assert found == [
        ("000000", 0, "no"),
        ("000000", 1, "aaa"),
        ("000000", 2, "a dog"),
        ("000001", 0, "a"),
        ("000001", 1, "ran far"),
        ("000001", 2, ""),
    ]
    assert {row.prompt_ids for row in rows} == {()}


def test_a_row_a_response_numbered_or_not(tmp_path: Path) -> None:
    bare = [{"prompt_id": p, "response": f"{p}{n}"} for n in range(2) for p in "ab"]
    rows = read_responses(jsonl(tmp_path / "bare.jsonl", bare))
    assert [(r.prompt_id, r.k, r.text) for r in rows] == [
        ("a", 0, "a0"),
        ("b", 0, "b0"),
        ("a", 1, "a1"),
        ("b", 1, "b1"),
    ]
    numbered = [{**row, "k": 1 - n // 2} for n, row in enumerate(bare)]
    pq.write_table(pa.Table.from_pylist(numbered), tmp_path / "numbered.parquet")
    again = read_responses(tmp_path / "numbered.parquet")
    assert [(r.k, r.text) for r in again] == [(1, "a0"), (1, "b0"), (0, "a1"), (0, "b1")]


def test_what_generate_wrote_is_read_as_it_is(tiny_chain: dict[str, Path]) -> None:
    folder = tiny_chain["generate"]
    rows = read_responses(folder)
    assert rows == read_responses(folder / "responses.parquet")
    assert all(row.response_ids for row in rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there are no responses in it"),
        ([["a"]], "r.jsonl:1: a row must be an object, this is list"),
        ([{"prompt": "x", "answers": []}], r"no `responses` .*; there is prompt, answers"),
        ([ROWS[0], {"responses": "one"}], "r.jsonl:2: `responses` must be a list of texts"),
        ([{"responses": []}], r"`responses` must be a list of texts, this is \[\]"),
        ([{"responses": ["a", 3]}], "a response must be text, this is 3"),
        ([{"response": "a"}], "needs its prompt's `prompt_id`"),
        (
            [{"prompt_id": "p", "response": "a", "k": 0}] * 2,
            r"response k=0 to prompt 'p' is given twice \(1 such\)",
        ),
    ],
)
def test_wrong_rows_are_refused_by_line(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(SparringError, match=message):
        read_responses(jsonl(tmp_path / "r.jsonl", rows))


def test_half_a_character_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text(
        '{"prompt_id": "a", "response": "fine"}\n{"prompt_id": "b", "response": "\\ud83d"}\n'
    )
    with pytest.raises(SparringError, match=r"half\.jsonl:2: .* is half of a character"):
        read_responses(path)


def test_no_file_or_another_kind(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match="no such file"):
        read_responses(tmp_path / "none.jsonl")
    (tmp_path / "r.csv").write_text("a,b")
    with pytest.raises(SparringError, match=r"from \.jsonl or \.parquet files"):
        read_responses(tmp_path / "r.csv")
    (tmp_path / "r.parquet").write_text("no")
    with pytest.raises(SparringError, match="not a readable parquet file"):
        read_responses(tmp_path / "r.parquet")


def test_from_a_file_to_training_pairs(tiny_model: Path, tmp_path: Path) -> None:
    """One file is prompts and responses; pairs hold the tokens that training would see."""
    file = jsonl(tmp_path / "both.jsonl", ROWS)
    inputs = {"prompts": file, "responses": file}
    judged = run_stage("judge", tmp_path / "judged", inputs, name="letter_judge:make").path
    with pytest.raises(SparringError, match="texts without token ids; give --model"):
        run_stage("pair", tmp_path / "p", {**inputs, "judged": judged})
    given = {**inputs, "judged": judged, "model": tiny_model}
    pairs = read_rows(run_stage("pair", tmp_path / "q", given).path / "pairs.parquet", Pair)
    tokenizer = tokens.load_tokenizer(tiny_model)
    assert len(pairs) == 1  # the other prompt's worst response is empty
    chosen, rejected = (
        tokenizer.decode(ids) for ids in (pairs[0].chosen_ids, pairs[0].rejected_ids)
    )
    assert (chosen, rejected) == ("aaa</s>", "no</s>")
    assert tokenizer.decode(pairs[0].prompt_ids) == "<s>u: a cat?\na: "
    turned = [{**row, "responses": row["responses"][::-1]} for row in ROWS]
    other = {**given, "responses": jsonl(tmp_path / "turned.jsonl", turned)}
    with pytest.raises(SparringError, match="verdicts on other responses than"):
        run_stage("pair", tmp_path / "other", other)
    figures = json.loads((tmp_path / "q" / "manifest.json").read_text())["figures"]
    assert figures["dropped_because"] == {"empty": 1}


def test_given_ids_stay(tiny_chain: dict[str, Path], tmp_path: Path) -> None:
    """Sampled tokens are never encoded again, whatever model is named."""
    inputs = {
        "prompts": tiny_chain["prompts"],
        "responses": tiny_chain["generate"],
        "judged": tiny_chain["judge"],
        "model": tiny_chain["model"],
    }
    again = run_stage("pair", tmp_path / "p", inputs).path
    before = read_rows(tiny_chain["pair"] / "pairs.parquet", Pair)
    assert read_rows(again / "pairs.parquet", Pair) == before
    sampled = {
        row.response_ids
        for row in read_rows(tiny_chain["generate"] / "responses.parquet", Response)
    }
    assert {pair.chosen_ids for pair in before} <= sampled


# Prompts of a data set, as the data stages read them


def test_every_prompt_of_a_file_as_it_comes(tiny_prompts: Path, tmp_path: Path) -> None:
    settings = {"source": str(tiny_prompts), "train": 0, "heldout": 0}
    made = run_stage("prompts", tmp_path / "p", {}, **settings).path
    assert read_prompt_set(made) == load_prompts(tiny_prompts)


def test_a_folder_saved_by_datasets_is_read_directly(tmp_path: Path) -> None:
    rows = {"prompt": ["a cat?", "a dog?"], "prompt_id": ["x", "y"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    found = read_prompt_set(tmp_path / "saved")
    assert [(p.prompt_id, p.text) for p in found] == [("x", "a cat?"), ("y", "a dog?")]
    stage = GenerateStage(start=1, count=1)
    assert [p.prompt_id for p in read_prompts(tmp_path / "saved", stage)] == ["y"]
