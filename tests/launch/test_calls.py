"""Stages as Python functions: the same artifacts as the command's, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.launch.calls import run_stage
from sparring.launch.cli import main
from sparring.launch.errors import UsageError

PROMPTS = [{"prompt": f"Say {word}."} for word in ("one", "two", "three", "four")]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def test_a_call_makes_what_the_command_makes(tmp_path: Path, prompts: Path) -> None:
    settings = {"source": str(prompts), "train": 2, "heldout": 2}
    made = run_stage("prompts", tmp_path / "a", seed=3, quiet=True, **settings)
    assert made.figures["train"] == 2
    words = ["--source", str(prompts), "--train", "2", "--heldout", "2", "--seed", "3"]
    assert main(["prompts", *words, "--out", str(tmp_path / "b"), "--json"]) == 0
    other = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert made.digest == other["digest"]
    again = run_stage("prompts", tmp_path / "a", seed=3, quiet=True, **settings)
    assert again.manifest == made.manifest


def test_a_setting_may_be_called_name_and_the_folder_be_this_one(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    made = run_stage("prompts", ".", quiet=True, source=str(prompts), train=2, heldout=2)
    assert (tmp_path / "here" / "manifest.json").is_file()
    assert made.figures["train"] == 2
    with pytest.raises(UsageError, match="needs the input"):
        run_stage("judge", "judged", {}, quiet=True, name="verifier")


@pytest.mark.parametrize(
    ("name", "inputs", "settings", "message"),
    [
        ("promts", {}, {}, "did you mean 'prompts'"),
        ("pair", {"promts": "x"}, {}, "takes no input 'promts'; it takes"),
        ("extrapolate", {"new": "x"}, {}, "needs the input 'old'"),
        ("extrapolate", {"new": "x", "old": 3}, {}, "a path or an artifact, not 3"),
        ("prompts", {}, {"trian": 2}, "trian"),
    ],
)
def test_wrong_calls_are_refused(
    name: str,
    inputs: dict,
    settings: dict,
    message: str,
    tmp_path: Path,  # type: ignore[type-arg]
) -> None:
    with pytest.raises(UsageError, match=message):
        run_stage(name, tmp_path / "o", inputs, quiet=True, **settings)
