"""The `sparring` command: fast help, JSON on request, and usage errors that end with 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparring.launch import cli

RECIPES = sorted(cli.recipe_folder().rglob("*.toml"))
HEAVY = ("torch", "transformers", "pydantic", "pyarrow", "matplotlib", "tyro", "rich")


@pytest.fixture
def sparring(capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command here; gives exit code, standard output and standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # how tyro ends
            code = int(stop.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sparring.launch import cli; cli.main(['--help'])\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "usage: sparring COMMAND" in done.stdout


def test_help_is_immediate() -> None:
    script = Path(sys.executable).with_name("sparring")
    times = []
    for _ in range(5):
        before = os.times()
        subprocess.run([str(script), "--help"], capture_output=True, check=True)
        after = os.times()
        # Of the processor, which a busy machine changes little.
        times.append(after.children_user - before.children_user)
    assert min(times) < 0.5


def test_a_family_of_commands_is_two_words(sparring: Any) -> None:
    assert cli.joined(["conf", "md", "--seed", "1"]) == ["conf-md", "--seed", "1"]
    assert cli.joined(["run", "conf"]) == ["run", "conf"]
    assert {cli.spoken("conf-md"), cli.spoken("image-model")} == {"conf md", "image-model"}
    code, _, err = sparring("conf", "mdd")
    assert (code, "did you mean 'conf md'?" in err) == (2, True)


def test_help_lists_every_command(sparring: Any) -> None:
    code, out, _ = sparring("--help")
    assert code == 0
    assert set(cli.COMMANDS) == set(cli._HANDLERS)
    assert all(f"\n  {cli.spoken(name)} " in out for name in cli.COMMANDS)
    assert sparring()[1] == sparring("-h")[1] == sparring("help")[1] == out
    assert sparring("conf") == sparring("conf", "--help") == (0, out, "")


def test_version(sparring: Any) -> None:
    from importlib.metadata import version

    assert sparring("--version") == (0, version("sparring") + "\n", "")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_each_command(sparring: Any, command: str) -> None:
    code, out, _ = sparring(command, "--help")
    assert code == 0
    assert f"usage: sparring {cli.spoken(command)}" in out


@pytest.mark.parametrize("command", ["recipes", "doctor"])
def test_commands_without_options_refuse_any(sparring: Any, command: str) -> None:
    code, _, err = sparring(command, "--nonsense")
    assert code == 2
    assert "--nonsense" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evalute"], "unknown command 'evalute'; did you mean 'evaluate'?"),
        (["zzz"], "unknown command 'zzz' (sparring --help lists all)"),
        (["run"], "sparring run needs a recipe first; `sparring recipes` lists them"),
        (["plan", "no-such"], "no such recipe; `sparring recipes` lists them"),
        (["plan", "demo", "--train.batch", "0"], "train.batch must be positive, not 0"),
        (["plan", "demo", "--train.batch", "x"], "'x'"),
        (["plan", "demo", "--train.bacth", "4"], "--train.bacth"),
        (["plan", "demo", "--algorithm", "spo"], "unknown algorithm 'spo'; did you mean 'sppo'?"),
        (["plan", "demo", "--generate.engine", "magic"], "magic"),
    ],
)
def test_usage_errors(sparring: Any, arguments: list[str], message: str) -> None:
    code, out, err = sparring(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""


def test_a_stage_command_asks_for_its_inputs(sparring: Any) -> None:
    code, _, err = sparring("generate", "--out", "x")
    assert code == 2
    assert "--model" in err
    assert "--prompts" in err


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(sparring: Any, path: Path, tmp_path: Path) -> None:
    code, out, err = sparring("plan", str(path), "--out", str(tmp_path / "run"), "--json")
    assert (code, err) == (0, "")
    plan = json.loads(out)
    assert plan["steps"][-1]["step"].endswith("evaluate") or plan["recipe"]["pipeline"] != (
        "alignment"
    )
    assert all(step["state"] in ("to do", "waits") for step in plan["steps"])


def test_recipes_that_come_along_are_found_by_name(sparring: Any) -> None:
    assert RECIPES
    for path in RECIPES:
        name = path.relative_to(cli.recipe_folder()).with_suffix("").as_posix()
        assert cli.find_recipe(name) == path


def test_plan_lists_the_steps_without_a_model(
    sparring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.path", "/no/model", "--iterations", "1", "--momentum.alpha", "0"]
    code, out, _ = sparring("plan", "demo", *options)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == "demo: 12 steps in runs/demo"
    assert [line.split()[-1] for line in lines[1:3]] == ["prompts", "model"]
    assert "waits  iter0/train" in out
    assert "from model, iter0/reference" in out
    assert not list(tmp_path.iterdir())


def test_plan_loads_no_model_code(tmp_path: Path) -> None:
    code = (
        "import sys; from sparring.launch import cli; assert cli.main(['plan', 'demo']) == 0\n"
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stderr.strip() == "[]"


def test_json_of_plan_recipes_and_doctor(sparring: Any) -> None:
    plan = json.loads(sparring("plan", "demo", "--json")[1])
    assert plan["recipe"]["name"] == "demo"
    assert {"step", "state", "inputs"} <= plan["steps"][0].keys()
    listed = json.loads(sparring("recipes", "--json")[1])
    assert "demo" in [row["recipe"] for row in listed["recipes"]]
    assert {"sppo", "spin"} <= {row["algorithm"] for row in listed["algorithms"]}
    findings = json.loads(sparring("doctor", "--json")[1])
    assert {"name", "ok", "detail"} == findings[0].keys()


def test_with_json_nothing_else_is_on_standard_output(
    sparring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.launch import doctor

    def chatty() -> list[doctor.Finding]:
        print("[WARNING] a library has something to say")
        return [doctor.Finding("a", True, "fine")]

    monkeypatch.setattr(doctor, "examine", chatty)
    code, out, err = sparring("doctor", "--json")
    assert (code, json.loads(out)[0]["name"]) == (0, "a")
    assert "something to say" in err


def test_doctor_fails_where_something_is_missing(
    sparring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparring.launch import doctor

    good, bad = doctor.Finding("a", True, "fine"), doctor.Finding("b", False, "no b: get it")
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert sparring("doctor")[0] == 0
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    code, out, _ = sparring("doctor")
    assert code == 1
    assert "NO  b" in out
    assert "no b: get it" in out


def test_overrides_beat_the_recipe(sparring: Any) -> None:
    out = sparring("plan", "demo", "--json", "--train.lr", "5e-7", "--iterations", "1")[1]
    recipe = json.loads(out)["recipe"]
    assert (recipe["train"]["lr"], recipe["iterations"]) == (5e-7, 1)


def test_a_schedule_on_the_command_line(sparring: Any) -> None:
    code, out, err = sparring("plan", "demo", "--json", "--train.beta", "0.01", "0.1", "1.0")
    assert code == 0, err
    assert json.loads(out)["recipe"]["train"]["beta"] == [0.01, 0.1, 1.0]


def test_interrupting_is_resumable(sparring: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(call: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli._HANDLERS, "run", interrupt)
    code, _, err = sparring("run", "demo")
    assert code == 75
    assert "run the same command again" in err


def test_report_needs_a_run(sparring: Any, tmp_path: Path) -> None:
    code, _, err = sparring("report", str(tmp_path))
    assert code == 1
    assert "is no run" in err


def test_the_module_form_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparring.launch.cli", "runn"],
        capture_output=True,
        text=True,
        env={**os.environ},
        check=False,
    )
    assert done.returncode == 2
    assert "did you mean 'run'?" in done.stderr
