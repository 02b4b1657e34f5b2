"""Sampling with the transformers engine: the right distribution, and the same draws anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparring.alignment import generate, tokens
from sparring.alignment.engines import Engine, Request, Sample, build_engine, vllm_environment
from sparring.alignment.models import load_policy
from sparring.alignment.rows import Message, Prompt, Response
from sparring.alignment.stages import GenerateStage
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context

EOS = 2
PROMPT = (1, 5, 9, 20, 7)


def engine(model: Path, **settings: Any) -> Engine:
    config = GenerateStage(**{"engine": "transformers", "max_new_tokens": 1, **settings})
    return build_engine(config, model, eos=[EOS], max_length=64, world=World())


def next_token_probabilities(model: Path, prompt: tuple[int, ...]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        logits = load_policy(model)(torch.tensor([prompt])).logits[0, -1].double()
    return logits.softmax(-1).numpy()


def sample_stage(
    folder: Path, model: Path, prompts: list[Prompt], *, ranks: int = 1, **settings: Any
) -> tuple[list[Response], dict[str, Any], list[str]]:
    """The stage as a run calls it; gives rows, figures and notes."""
    base = {"engine": "transformers", "k": 3, "max_new_tokens": 12, "chunk": 4, "probes": 0}
    config = GenerateStage(**{**base, **settings})
    (folder / "work").mkdir(parents=True)
    (folder / "prompts").mkdir()
    write_rows(folder / "prompts" / "train.parquet", Prompt, prompts)
    inputs = {"model": model, "prompts": folder / "prompts"}
    notes: list[str] = []

    def emit(**event: Any) -> None:
        notes.extend([event["note"]] if "note" in event else [])

    for rank in range(ranks):
        context = Context(World(rank, ranks, rank, ranks), folder / "work", 5, emit=emit)
        generate.run(config, inputs, folder, context)
    context = Context(World(), folder / "work", 5, emit=emit)
    figures = generate.finish(config, inputs, folder, context)
    return read_rows(folder / "responses.parquet", Response), figures, notes


def some_prompts(count: int) -> list[Prompt]:
    texts = ["cat " * (1 + n % 5) + "abcdefghij"[n % 10] for n in range(count)]
    return [Prompt(f"p{n}", (Message("user", t),), f"g{n}") for n, t in enumerate(texts)]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.3, 1.0), (0.3, 0.7)])
def test_frequencies_are_those_of_the_softmax(
    tiny_model: Path, temperature: float, top_p: float
) -> None:
    count = 20_000
    sampler = engine(tiny_model, temperature=temperature, top_p=top_p, max_batch=2000)
    drawn = sampler.sample([Request(PROMPT, seed) for seed in range(count)])
    seen = Counter(sample.ids[0] for sample in drawn)
    tempered = next_token_probabilities(tiny_model, PROMPT) ** (1 / temperature)
    tempered /= tempered.sum()
    # The nucleus: the fewest most likely tokens that together reach top_p.
    order = np.argsort(-tempered)
    size = int(np.searchsorted(np.cumsum(tempered[order]), top_p)) + 1 if top_p < 1 else 36
    nucleus = order[:size]
    expected = tempered[nucleus] / tempered[nucleus].sum() * count
    observed = np.array([seen[int(token)] for token in nucleus])
    assert observed.sum() == count, "nothing outside the nucleus"
    chi_square = ((observed - expected) ** 2 / expected).sum()
    freedom = size - 1
    # Mean and standard deviation of χ² are d and √(2d): an excess of 4 has odds below 1 : 1000.
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)
    # Seeds are fixed, so this cannot fail by chance; and another temperature would be seen:
    wrong = next_token_probabilities(tiny_model, PROMPT)[nucleus] ** (1.25 / temperature)
    wrong *= count / wrong.sum()
    assert ((observed - wrong) ** 2 / wrong).sum() > freedom + 4 * math.sqrt(2 * freedom)


def test_greedy_is_argmax(tiny_model: Path) -> None:
    model = load_policy(tiny_model)
    prompts = [PROMPT, (1, 30, 4), (1, *range(3, 20))]
    drawn = engine(tiny_model, temperature=0, max_new_tokens=8).sample(
        [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    )
    for prompt, sample in zip(prompts, drawn, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 8 and ids[-1] != EOS:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert sample.ids == tuple(ids[len(prompt) :])


def test_a_response_depends_on_its_prompt_and_seed_alone(tiny_model: Path) -> None:
    requests = [Request((1, *range(3, 4 + n % 7)), 100 + n) for n in range(12)]
    together = engine(tiny_model, max_new_tokens=10).sample(requests)
    small = engine(tiny_model, max_new_tokens=10, max_batch=5).sample(requests)
    alone = [engine(tiny_model, max_new_tokens=10).sample([r])[0] for r in requests[:3]]
    backwards = engine(tiny_model, max_new_tokens=10).sample(requests[::-1])[::-1]
    assert together == small == backwards
    assert together[:3] == alone
    assert len({sample.ids for sample in together}) > 6


@pytest.mark.parametrize(
    ("rank", "devices", "seen", "visible", "bound"),
    [
        (0, 1, None, "0", "0,4"),
        (3, 1, "4,5,6,7", "7", "3,7"),
        (2, 2, None, "2,3", "2,6|3,7"),
        (2, 2, "4,5,6,7", "6,7", "2,6|3,7"),
        (0, 4, "4,5,6,7", "4,5,6,7", "0,4|1,5|2,6|3,7"),
    ],
)
def test_what_an_engine_sees_of_its_host(
    rank: int,
    devices: int,
    seen: str | None,
    visible: str,
    bound: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two hosts of four ranks and eight cores each.
    monkeypatch.setattr(os, "environ", {"CUDA_VISIBLE_DEVICES": seen} if seen else {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    world = World(rank, 8, rank, 4).sharing(devices)
    assert world is not None
    vllm_environment(world, memory=0, devices=devices)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == bound


@pytest.mark.parametrize(
    ("given", "devices", "kept"),
    [("0-3", 1, True), ("0-3", 2, False), ("0|1", 2, True), ("0|1", 1, False)],
)
def test_cores_that_the_environment_names(
    given: str, devices: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_CPU_OMP_THREADS_BIND": given})
    vllm_environment(World(), memory=0, devices=devices)
    assert (os.environ["VLLM_CPU_OMP_THREADS_BIND"] == given) is kept


def test_other_seeds_give_other_responses(tiny_model: Path) -> None:
    drawn = engine(tiny_model, max_new_tokens=10).sample([Request(PROMPT, n) for n in range(8)])
    assert len({sample.ids for sample in drawn}) == 8


def test_eos_ends_a_response_and_belongs_to_it(tiny_model: Path) -> None:
    drawn = engine(tiny_model, max_new_tokens=30).sample([Request(PROMPT, n) for n in range(40)])
    reasons = Counter(sample.finish_reason for sample in drawn)
    assert reasons["stop"] > 5
    assert reasons["length"] > 5
    for sample in drawn:
        if sample.finish_reason == "stop":
            assert sample.ids.index(EOS) == len(sample.ids) - 1
        else:
            assert len(sample.ids) == 30
            assert EOS not in sample.ids


def test_shards_ranks_and_other_prompts_change_no_response(
    tiny_model: Path, tmp_path: Path
) -> None:
    prompts = some_prompts(10)
    whole = sample_stage(tmp_path / "whole", tiny_model, prompts, chunk=100)[0]
    for ranks, chunk in ((1, 1), (2, 3), (3, 4)):
        folder = tmp_path / f"{ranks}-{chunk}"
        assert sample_stage(folder, tiny_model, prompts, ranks=ranks, chunk=chunk)[0] == whole
    shared = sample_stage(tmp_path / "shared", tiny_model, prompts, ranks=4, devices=2)[0]
    assert shared == whole
    some = sample_stage(tmp_path / "some", tiny_model, prompts[4:7])[0]
    assert some == [row for row in whole if row.prompt_id in ("p4", "p5", "p6")]
    fewer = sample_stage(tmp_path / "fewer", tiny_model, prompts, k=2)[0]
    assert fewer == [row for row in whole if row.k < 2]


def test_rows_are_numbered_and_in_order(tiny_model: Path, tmp_path: Path) -> None:
    rows, figures, _ = sample_stage(tmp_path / "a", tiny_model, some_prompts(5), iteration=3)
    assert [(row.prompt_id, row.k) for row in rows] == [
        (f"p{n}", k) for n in range(5) for k in range(3)
    ]
    assert {row.iteration for row in rows} == {3}
    assert len({row.seed for row in rows}) == 15
    assert figures["responses"] == 15
    assert figures["tokens"] == sum(len(row.response_ids) for row in rows)
    assert figures["cut"] == sum(row.finish_reason == "length" for row in rows) / 15


def test_a_share_of_the_prompts(tiny_model: Path, tmp_path: Path) -> None:
    rows = sample_stage(tmp_path / "a", tiny_model, some_prompts(6), start=2, count=3)[0]
    assert list(dict.fromkeys(row.prompt_id for row in rows)) == ["p2", "p3", "p4"]
    with pytest.raises(SparringError, match="has 6 prompts, but 4 to 7 were asked for"):
        sample_stage(tmp_path / "b", tiny_model, some_prompts(6), start=4, count=3)


def test_a_prompt_that_is_too_long_is_named(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [*some_prompts(3), Prompt("wordy", (Message("user", "a" * 240),), "g")]
    with pytest.raises(SparringError, match=r"'wordy' has 248 tokens, more than the 100 allowed"):
        sample_stage(tmp_path / "a", tiny_model, prompts, max_prompt_tokens=100)
    with pytest.raises(SparringError, match=r"'wordy' .* need 260 tokens, but .* holds 256"):
        sample_stage(tmp_path / "b", tiny_model, prompts)


def test_what_a_checkpoint_recommends_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    opinionated = tmp_path / "model"
    shutil.copytree(tiny_model, opinionated)
    wishes = {"eos_token_id": 2, "suppress_tokens": [4, 5, 6, 7, 8], "repetition_penalty": 3.0}
    wishes |= {"min_new_tokens": 9, "min_p": 0.5, "do_sample": True}
    (opinionated / "generation_config.json").write_text(json.dumps(wishes))
    plain = sample_stage(tmp_path / "a", tiny_model, some_prompts(4))[0]
    assert sample_stage(tmp_path / "b", opinionated, some_prompts(4))[0] == plain


@pytest.mark.parametrize(
    ("text", "after", "read"),
    [
        ("<think>a </think> no</think>\n\nyes", "</think>", "yes"),
        ("well </think>", "</think>", ""),
        ("<think>cut while thinki", "</think>", ""),
    ],
)
def test_judges_read_what_follows_the_thinking(text: str, after: str, read: str) -> None:
    assert generate.answer(text, after).strip() == read


def test_a_marker_may_be_a_special_token(tiny_model: Path) -> None:
    tokenizer = tokens.load_tokenizer(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[END]"]})
    ids = tokenizer("well[END]a b</s>", add_special_tokens=False)["input_ids"]
    assert generate._text(tokenizer, ids, "[END]") == "a b"
    assert generate._text(tokenizer, ids, "") == "wella b"


def test_thinking_is_sampled_but_not_judged(tiny_model: Path, tmp_path: Path) -> None:
    prompts = some_prompts(3)
    long = {"max_new_tokens": 30}
    whole = sample_stage(tmp_path / "a", tiny_model, prompts, **long)[0]
    letters = [letter for row in whole for letter in row.text]
    mark = max(sorted(set(letters)), key=letters.count)
    rows = sample_stage(tmp_path / "b", tiny_model, prompts, max_new_tokens=30, answer_after=mark)[
        0
    ]
    assert [row.response_ids for row in rows] == [row.response_ids for row in whole]
    assert not any(mark in row.text for row in rows)
    assert all(row.text in w.text for row, w in zip(rows, whole, strict=True))
    assert [row.text for row in rows] != [w.text for w in whole]


def test_empty_responses_are_counted(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent:
        def sample(self, requests: list[Request]) -> list[Sample]:
            return [
                Sample((EOS,) if n % 3 == 0 else (4, 5, EOS), "stop") for n in range(len(requests))
            ]

    monkeypatch.setattr(generate, "build_engine", lambda *_, **__: Silent())
    rows, figures, notes = sample_stage(tmp_path / "a", tiny_model, some_prompts(4))
    assert figures["empty"] == sum(row.text == "" for row in rows) == 4
    assert notes == ["4 of 12 responses are empty; they are judged as such"]
