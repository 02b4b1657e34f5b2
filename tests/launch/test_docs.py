"""The documentation is true: commands parse, links lead somewhere, generated parts are current."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparring.launch import cli
from sparring.launch.trackers import TRACKERS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
_FENCE = re.compile(r"^```bash\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `sparring` command in the page's bash blocks."""
    for block in _FENCE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "sparring":
                yield words[1:]


COMMANDS = [
    pytest.param(words, id=f"{page_name(page)}: {' '.join(words)}"[:120])
    for page in PAGES
    for words in commands(page)
]


def check(words: list[str], out: Path) -> None:
    """Parse a command as `sparring` would, without doing what it asks for."""
    command, *rest = cli.joined(words)
    rest = [word for word in rest if word != "--json"]
    if command.startswith("--"):
        assert command in ("--help", "--version")
    elif command in ("run", "plan", "demo"):
        recipe = ["demo"] if command == "demo" else [rest.pop(0)]
        # The last --out counts: no run folder of this machine has a say.
        assert cli.main(["plan", *recipe, *rest, "--out", str(out)]) == 0
    elif command in cli.STAGE_COMMANDS:
        _, stage, options = cli._stage_options(command, rest)
        assert stage.name == command
        assert options.out
    elif command == "report":
        assert len(rest) == 1
    elif command == "track":
        assert rest[1] == "--to"
        assert {*rest[2:]} <= {*TRACKERS}
    else:
        assert command in ("recipes", "doctor")
        assert not rest


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 30
    stages = {cli.joined(param.values[0])[0] for param in COMMANDS}
    assert {*cli.STAGE_COMMANDS, "run", "plan", "demo", "report", "track", "doctor"} <= stages


@pytest.mark.parametrize("words", COMMANDS)
def test_command_parses(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)  # pages name recipes by their path in the repository too
    check(words, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "no-such-recipe"],
        ["run", "demo", "--train.lrr", "1"],
        ["run", "demo", "--train.lr", "fast"],
        ["generate", "--model", "smollm2", "--out", "x"],
        ["judge", "--prompts", "p", "--responses", "r", "--out", "x", "--nome", "y"],
        ["dance"],
    ],
)
def test_a_wrong_command_would_be_noticed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check(words, tmp_path / "run")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_recipe_keys_are_current() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "document_recipes.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", RECIPES, ids=page_name)
def test_recipe_plans_and_says_what_it_is(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(path), "--out", str(tmp_path / "run")]) == 0
    first, *head = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ")
    assert len(first) <= 100
    comments = "\n".join(head[: next(n for n, line in enumerate(head) if line[:1] != "#")])
    assert "Paper" in comments
    assert "Cost" in comments
    name = page_name(path).removeprefix("recipes/").removesuffix(".toml")
    assert f'name = "{name.rpartition("/")[2]}"' in head
