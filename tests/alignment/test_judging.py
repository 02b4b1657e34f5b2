"""Stage `judge`: ranking, health, portions, and a second judge to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from one_stage import run_stage

from sparring.alignment.health import judged_text
from sparring.alignment.judges.build import build_judge
from sparring.alignment.preferences import win_probabilities
from sparring.alignment.response_files import read_responses
from sparring.alignment.rows import Judged, Ranked
from sparring.launch import cli
from sparring.launch.artifacts import Artifact
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows
from sparring.launch.stages import numbered


@pytest.fixture(scope="module")
def inputs(tiny_chain: dict[str, Path]) -> dict[str, Path]:
    return {"prompts": tiny_chain["prompts"], "responses": tiny_chain["generate"]}


@pytest.fixture(scope="module")
def judged(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run_stage(
        "judge", tmp_path_factory.mktemp("j") / "letters", inputs, name="letter_judge:make"
    )


def test_ranks_are_those_of_the_win_probabilities(
    inputs: dict[str, Path], judged: Artifact
) -> None:
    rows = read_rows(judged.path / "judged.parquet", Judged)
    ranked = read_rows(judged.path / "ranked.parquet", Ranked)
    texts = {(r.prompt_id, r.k): r.text for r in read_responses(inputs["responses"])}
    assert {(r.prompt_id, r.k): r.text for r in ranked} == texts
    for row in rows:
        wins = win_probabilities(torch.tensor([row.logits], dtype=torch.float64))[0].numpy()
        mine = [r for r in ranked if r.prompt_id == row.prompt_id]
        assert [r.k for r in mine] == list(range(len(wins)))
        assert np.allclose([r.win_probability for r in mine], wins)
        expected = [1 + sum(other > win + 1e-9 for other in wins) for win in wins]
        assert [r.rank for r in mine] == expected


def test_the_judge_itself_is_examined(judged: Artifact) -> None:
    health = judged.figures["health"]
    assert health["prompts"] == judged.figures["prompts"] == 24
    assert health["swap_consistency"][0] == 1  # a judge by score does not see the order
    assert abs(health["first_place_advantage"][0]) < 1e-12
    assert health["cyclic_triples"][0] == 0
    shown = judged_text(judged.path)
    assert "judge health" in shown
    assert "same verdict when swapped" in shown


def test_two_judges_are_compared(inputs: dict[str, Path], judged: Artifact, tmp_path: Path) -> None:
    given = {**inputs, "second": judged.path}
    sharper = run_stage(
        "judge", tmp_path / "s", given, name="letter_judge:make", options={"weight": 2.0}
    )
    health = sharper.figures["health"]
    assert health["agreement"][0] == 1
    assert health["kendall"][0] == pytest.approx(1)
    assert health["temperature"][0] == pytest.approx(0.5, abs=1e-3)
    assert any("sharper than the second judge" in line for line in health["verdicts"])


def test_health_can_be_left_out_and_asked_for(inputs: dict[str, Path], tmp_path: Path) -> None:
    made = run_stage("judge", tmp_path / "a", inputs, name="letter_judge:make", health=False)
    assert "health" not in made.figures
    paths = ["--prompts", "p.jsonl", "--responses", "r", "--out", "o"]
    options = cli._stage_options("judge", [*paths, "--health"])[2]
    assert options.settings.health


def test_portions_merge_to_the_whole(
    inputs: dict[str, Path], judged: Artifact, tmp_path: Path
) -> None:
    parts = [
        run_stage(
            "judge", tmp_path / f"{n}", inputs, name="letter_judge:make", chunk=5, shard=f"{n}/3"
        ).path
        for n in range(3)
    ]
    merged = run_stage("merge", tmp_path / "m", numbered("shards", parts)).path
    for name in ("judged.parquet", "ranked.parquet"):
        assert (merged / name).read_bytes() == (judged.path / name).read_bytes()


def test_relevance_ranks_without_rules(tmp_path: Path) -> None:
    """On the subject before off the subject, and sharper by its setting."""
    question = "Name a river in France."
    answers = [["The Loire.", "Bees eat nectar.", "The Loire."]]
    judge = build_judge("relevance")
    logits = judge.matrix([question], answers)[0]
    assert logits[0, 1] > 0.5
    assert logits[0, 2] == 0
    assert np.array_equal(logits, -logits.T)
    cosine = judge.details([question], answers)["relevance"][0]
    assert logits[0, 1] == pytest.approx(5 * (cosine[0] - cosine[1]), abs=1e-5)
    double = build_judge("relevance", sharpness=10)
    assert np.allclose(double.matrix([question], answers)[0], 2 * logits, atol=1e-6)
    assert judge.identity != double.identity


@pytest.mark.parametrize("sharpness", [0, -1, float("inf")])
def test_sharpness_must_be_positive(sharpness: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number of logits"):
        build_judge("relevance", sharpness=sharpness)


def test_one_response_a_prompt_is_judged_and_ranked(tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "a?", "responses": ["aaa"]}) + "\n")
    given = {"prompts": file, "responses": file}
    made = run_stage("judge", tmp_path / "j", given, name="letter_judge:make")
    assert read_rows(made.path / "judged.parquet", Judged)[0].logits == ((0.0,),)
    (row,) = read_rows(made.path / "ranked.parquet", Ranked)
    assert (row.rank, row.win_probability) == (1, 0.5)


def test_a_judge_that_returns_nan_ends_the_stage(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SparringError, match="judge letter returned nan for prompt"):
        run_stage(
            "judge", tmp_path / "j", inputs, name="letter_judge:make", options={"broken": 1.0}
        )
    assert not (tmp_path / "j" / "manifest.json").exists()
