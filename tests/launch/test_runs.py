"""Runs: one folder, one recipe, one process; running again is resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from sparring.launch import artifacts, runs, stages
from sparring.launch.errors import SparringError, Stopped, UsageError
from sparring.launch.progress import Reporter
from sparring.launch.stages import LaunchConfig, Step

INLINE = LaunchConfig(inline=("add",))


@pytest.fixture
def toy() -> Any:
    import toy_pipeline

    return toy_pipeline


def execute(toy: Any, folder: Path, *, changed: bool = False, **values: Any) -> dict[str, Any]:
    recipe = toy.ToyRecipe(**{"launch": INLINE, **values})
    return runs.execute(toy.Toy(), recipe, folder, Reporter(quiet=True), changed=changed)


def manifest(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_running_again_computes_nothing(toy: Any, tmp_path: Path) -> None:
    first = execute(toy, tmp_path / "run")
    before = manifest(tmp_path / "run" / "two")
    again = execute(toy, tmp_path / "run")
    assert (first["computed"], first["kept"], first["total"]) == (2, 0, 3)
    assert (again["computed"], again["kept"], again["total"]) == (0, 2, 3)
    assert manifest(tmp_path / "run" / "two") == before


def test_the_manifest_tells_what_went_in(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run", second=5)
    one, two = (manifest(tmp_path / "run" / name) for name in ("one", "two"))
    assert two["inputs"] == {"other": one["digest"]}
    assert two["config"] == {"value": 5, "mode": "ok", "memory": 1}
    assert two["figures"] == {"total": 6}


def test_a_step_depends_on_the_content_of_its_inputs(toy: Any, tmp_path: Path) -> None:
    """Making an input again with the same content leaves what comes after it valid."""
    execute(toy, tmp_path / "run")
    (tmp_path / "run" / "one" / "manifest.json").unlink()
    assert execute(toy, tmp_path / "run")["computed"] == 1
    assert execute(toy, tmp_path / "run", changed=True, first=7)["computed"] == 2


def test_another_recipe_is_refused_with_the_keys_that_differ(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run")
    with pytest.raises(SparringError) as caught:
        execute(toy, tmp_path / "run", second=5)
    text = str(caught.value)
    assert "belongs to another recipe:\n  second: 2 -> 5\n" in text
    assert "--changed" in text
    assert "--out" in text
    assert execute(toy, tmp_path / "run")["computed"] == 0


def test_changed_keeps_what_is_still_valid(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run")
    result = execute(toy, tmp_path / "run", changed=True, second=5)
    assert (result["computed"], result["kept"], result["total"]) == (1, 1, 6)
    back = execute(toy, tmp_path / "run", changed=True)
    assert (back["computed"], back["total"]) == (0, 3)


def test_how_a_run_is_launched_is_no_change(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run")
    again = execute(toy, tmp_path / "run", launch=LaunchConfig())
    assert again["computed"] == 0


def test_memory_and_speed_may_change_between_two_calls(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run", memory=2)
    (tmp_path / "run" / "two" / "manifest.json").unlink()
    again = execute(toy, tmp_path / "run", memory=1)
    assert (again["computed"], again["kept"]) == (1, 1)
    made = {name: manifest(tmp_path / "run" / name)["config"]["memory"] for name in ("one", "two")}
    assert made == {"one": 2, "two": 1}, "what each was made with"
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert recorded["memory"] == 1
    with pytest.raises(SparringError, match=r"another recipe:\n  second: 2 -> 5\n"):
        execute(toy, tmp_path / "run", memory=3, second=5)


def test_a_recipe_that_another_version_recorded_is_compared_too(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    recorded = json.loads(path.read_text())["recipe"]
    path.write_text(json.dumps({"recipe": {**recorded, "third": 3}}))
    with pytest.raises(SparringError, match=r"third: 3 -> None"):
        execute(toy, tmp_path / "run")
    del recorded["mode"]  # a setting that is new since then, at its default
    path.write_text(json.dumps({"recipe": recorded}))
    assert execute(toy, tmp_path / "run")["computed"] == 0


def test_a_folder_of_someone_else_is_refused(toy: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(SparringError, match="is not empty and is no run"):
        execute(toy, tmp_path)
    assert not (tmp_path / "run.json").exists()


def test_a_run_that_failed_early_can_be_started_again(toy: Any, tmp_path: Path) -> None:
    with pytest.raises(SparringError, match="buy another"):
        execute(toy, tmp_path / "run", mode="user")
    assert execute(toy, tmp_path / "run", changed=True)["kept"] == 1


@pytest.mark.parametrize(("mode", "word"), [("user", "failed"), ("deaf", "stopped")])
def test_the_last_step_says_how_it_ended(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, word: str
) -> None:
    recipe = toy.ToyRecipe(mode=mode, launch=INLINE)
    with pytest.raises(SparringError):
        runs.execute(toy.Toy(), recipe, tmp_path / "run", Reporter())
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.split() == ["[2/2]", "two", word]


def test_a_second_process_is_told(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparring.launch import artifacts\n"
        "folder = Path(sys.argv[1])\n"
        "try:\n"
        "  with artifacts.locked(folder / '.lock', folder): print('entered')\n"
        "except artifacts.SparringError as error: print(error)"
    )

    def second() -> str:
        command = [sys.executable, "-c", code, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with artifacts.locked(tmp_path / ".lock", tmp_path):
        told = second()
    assert f"another sparring process is working in {tmp_path}" in told
    assert "--out" in told
    assert second() == "entered\n"


def test_sigterm_becomes_stopped_and_the_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="run the same command again"), runs.sigterm_stops():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_to_stop_that_a_stage_does_not_notice_is_not_lost(
    toy: Any, tmp_path: Path
) -> None:
    with pytest.raises(Stopped, match="run the same command again"):
        execute(toy, tmp_path / "run", mode="deaf")
    assert manifest(tmp_path / "run" / "two")["figures"] == {"total": 3}
    assert not (tmp_path / "run" / "report.html").exists()
    assert execute(toy, tmp_path / "run", mode="deaf")["kept"] == 2


def test_plan_says_what_is_done_and_writes_nothing(toy: Any, tmp_path: Path) -> None:
    def states(**values: Any) -> list[str]:
        planned = runs.plan(toy.Toy(), toy.ToyRecipe(launch=INLINE, **values), tmp_path / "run")
        return [p.state for p in planned]

    assert states() == ["to do", "waits"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(SparringError):
        execute(toy, tmp_path / "run", mode="user")
    assert states() == ["done", "to do"]
    execute(toy, tmp_path / "run", changed=True)
    assert states() == ["done", "done"]
    assert states(first=9) == ["to do", "waits"]


def test_the_bytes_of_files_that_settings_name_are_part_of_the_key(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = dataclasses.replace(toy.ADD, reads=("mode",))
    monkeypatch.syspath_prepend(tmp_path)

    def key(mode: str) -> str:
        return stages.content_key(Step("one", stage, toy.Add(mode=mode), {}), {}, INLINE)

    file, module = tmp_path / "data.txt", tmp_path / "a_plugin_of_mine.py"
    for path, mode in ((file, str(file)), (module, "a_plugin_of_mine:make")):
        path.write_text("x = 1")
        first = key(mode)
        path.write_text("x = 2")
        assert key(mode) != first
        path.write_text("x = 1")
        assert key(mode) == first
    # A setting that is a plug-in's name or a built-in one's is no folder that happens to be here.
    monkeypatch.chdir(tmp_path)
    named = dataclasses.replace(toy.ADD, plugins=("mode",))
    step = Step("one", named, toy.Add(mode="sppo"), {})
    first = stages.content_key(step, {}, INLINE)
    (tmp_path / "sppo").mkdir()
    assert stages.content_key(step, {}, INLINE) == first
    plain = stages.content_key(Step("one", toy.ADD, toy.Add(mode="no file"), {}), {}, INLINE)
    assert key("no file") == plain


def test_an_unknown_pipeline_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "a"\npipeline = "cooking"\n')
    with pytest.raises(UsageError, match=r"'cooking' is unknown; known are .*alignment"):
        runs.load_recipe(tmp_path / "r.toml")


def test_describe_shows_time_and_figures(toy: Any, tmp_path: Path) -> None:
    execute(toy, tmp_path / "run")
    artifact = runs.artifacts.read(tmp_path / "run" / "two")
    assert artifact is not None
    artifact = dataclasses.replace(artifact, manifest={**artifact.manifest, "seconds": 12.34})
    assert runs.describe(artifact) == "  12.3 s   total 3"
    figures = {"judge": "verifier/1 " + 90 * "x", "rows": 3}
    manifest = {**artifact.manifest, "figures": figures}
    line = runs.describe(dataclasses.replace(artifact, manifest=manifest))
    assert line == f"  12.3 s   judge verifier/1 {18 * 'x'}..., rows 3", "the line stays short"


def test_a_broken_pipeline_is_named_and_stops_no_other_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = (
        EntryPoint("toy", "toy_pipeline:Toy", "sparring.pipelines"),
        EntryPoint("broken", "no_such_module:PIPELINE", "sparring.pipelines"),
    )
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    recipe = tmp_path / "toy.toml"
    recipe.write_text('pipeline = "toy"\nfirst = 5\n')
    assert runs.load_recipe(recipe)[1].first == 5
    with pytest.raises(
        SparringError, match="'broken' cannot be loaded from no_such_module:PIPELINE"
    ):
        runs.pipelines()
    recipe.write_text('pipeline = "broken"\n')
    with pytest.raises(SparringError, match="repair or uninstall it"):
        runs.load_recipe(recipe)
