"""Mistakes on the command line of single stages: one line, an exit code, no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparring.launch.cli import main

ROWS: dict[str, Any] = {
    "responses": [
        {"prompt_id": "000000", "k": "first", "response": "yes"},
        {"prompt_id": "000000", "k": 1, "response": "no"},
    ],
    "answered": [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": 3}]}
    ],
}


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (
            "reference --model {model} --pairs {pair} --devices 0",
            2,
            "devices must be positive, not 0",
        ),
        ("pair --prompts {prompts} --responses {generate}", 2, "'best-worst' needs --judged"),
        (
            "pair --rule real-generated --prompts {prompts} --responses {generate}",
            2,
            "'real-generated' needs --model",
        ),
        (
            "judge --prompts {prompts} --responses {responses}",
            1,
            ".jsonl:1: `k` must be a whole number, this is 'first'",
        ),
        (
            "prompts --source {answered} --train 0 --heldout 0",
            1,
            "`content` must be text, this is 3",
        ),
        (
            "extrapolate --new {model} --old {model} --alpha nan",
            2,
            "must be a finite number, not nan",
        ),
    ],
)
def test_a_mistake_is_one_line(
    command: str,
    code: int,
    message: str,
    tiny_chain: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: str(path) for name, path in tiny_chain.items()}
    for name, rows in ROWS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        places[name] = str(path)
    words = command.format(**places).split()
    assert main([*words, "--out", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_made(
    tiny_chain: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below" / "out")
    assert main(["prompts", "--source", "constraints", "--out", out]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_prompts_are_read_again_when_their_file_changes(tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    command = [
        "prompts",
        "--source",
        str(file),
        "--train",
        "0",
        "--heldout",
        "0",
        "--out",
        str(out),
    ]

    def digest(text: str) -> str:
        file.write_text(json.dumps({"prompt": text}) + "\n")
        assert main([*command, "--json"]) == 0
        return str(json.loads((out / "manifest.json").read_text())["digest"])

    first = digest("one")
    assert digest("one") == first
    assert digest("two") != first


def test_a_defect_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparring.launch import doctor

    def broken() -> None:
        raise ZeroDivisionError("of our own making")

    monkeypatch.setattr(doctor, "examine", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "sparring: a defect of sparring: ZeroDivisionError: of our own making"
    (file,) = tmp_path.iterdir()
    assert str(file) in lines[1]
    assert "in broken" in file.read_text()
