"""Tracking: what trackers get of a run, once each, in whatever pieces it was made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparring.launch import artifacts, cli, runs, tracking
from sparring.launch.calls import run_stage
from sparring.launch.errors import SparringError
from sparring.launch.metrics import MetricsFile
from sparring.launch.progress import Reporter
from sparring.launch.stages import LaunchConfig
from sparring.launch.tracking import Tracking, numbers, placed

Logged = list[tuple[str, int, dict[str, float]]]
OWN = "trackers_of_tests:Recorder"


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    from trackers_of_tests import Recorder

    monkeypatch.setattr(Recorder, "logged", [])
    monkeypatch.setattr(Recorder, "runs", [])
    monkeypatch.setattr(Recorder, "breaks_at", -1)
    return Recorder


class Maker:
    """Makes the artifacts of a run's steps, with a tracker watching."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.names = folder, names or (OWN,)
        self.notes: list[str] = []

    def open(self) -> Any:
        # A tracker of a service is waited for as long as it takes: the machine may be busy.
        own = any(name.startswith("trackers_of_tests:") for name in self.names)
        patience = tracking._PATIENCE if own else None
        return tracking.tracking(
            self.names,
            "run",
            {"name": "run"},
            self.folder / "tracking",
            self.notes.append,
            patience=patience,
        )

    def rows(self, step: str, losses: list[float], *, key: str = "k", start: int = 0) -> Path:
        """A step at work that has written rows."""
        output = self.folder / step
        artifacts.prepare(output, key)
        file = MetricsFile(output / "work" / "metrics.jsonl", start=start)
        for number, loss in enumerate(losses, start):
            file.write(step=number, loss=loss, name="text", many=[1, 2])
        return output

    def made(self, trackers: Tracking, step: str, losses: list[float], *, key: str = "k") -> None:
        """A step from its begin to its end."""
        output = self.folder / step
        trackers.begin(step, output)
        self.rows(step, losses, key=key)
        (output / "metrics.jsonl").write_bytes((output / "work/metrics.jsonl").read_bytes())
        facts = {"figures": {"steps": len(losses), "loss": [losses[-1], 0.0, 9.0], "note": "x"}}
        trackers.end(artifacts.complete(output, key, facts))


@pytest.fixture
def maker(tmp_path: Path) -> Maker:
    return Maker(tmp_path)


def curve(logged: Logged, group: str) -> list[tuple[int, float]]:
    return [(step, values["loss"]) for name, step, values in logged if name == group]


def test_iterations_are_one_curve(maker: Maker, recorder: Any) -> None:
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [3.0, 2.0])
        maker.made(trackers, "iter1/train", [1.5])
    assert recorder.logged == [
        ("train", 0, {"loss": 3.0}),
        ("train", 1, {"loss": 2.0}),
        ("summary/train", 0, {"steps": 2, "loss": 2.0}),
        ("train", 2, {"loss": 1.5}),
        ("summary/train", 1, {"steps": 1, "loss": 1.5}),
    ]


def test_seeds_are_curves_of_their_own(maker: Maker, recorder: Any) -> None:
    with maker.open() as trackers:
        maker.made(trackers, "sgd/seed0", [3.0])
        maker.made(trackers, "sgd/seed1", [4.0])
    assert curve(recorder.logged, "sgd/seed0") == [(0, 3.0)]
    assert curve(recorder.logged, "sgd/seed1") == [(0, 4.0)]


def until(condition: Callable[[], bool]) -> None:
    end = time.time() + 120
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.01)


def test_rows_come_while_the_step_goes_on(
    maker: Maker, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_EVERY", 0.01)
    with maker.open() as trackers:
        trackers.begin("iter0/train", maker.folder / "iter0/train")
        maker.rows("iter0/train", [3.0, 2.0])
        until(lambda: curve(recorder.logged, "train") == [(0, 3.0), (1, 2.0)])
        maker.rows("iter0/train", [1.0], start=2)
        until(lambda: len(recorder.logged) == 3)
    assert curve(recorder.logged, "train") == [(0, 3.0), (1, 2.0), (2, 1.0)]


def test_a_tracker_that_hangs_holds_up_no_run(
    maker: Maker, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_PATIENCE", 0.1)
    maker.names = ("trackers_of_tests:Hanging",)
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [3.0, 2.0])
        maker.made(trackers, "iter1/train", [1.0])
    (note,) = maker.notes
    assert "Hanging did not take all in 0.1 s; `sparring track` sends the rest" in note
    assert curve(recorder.logged, "train") == [(0, 3.0)]


def test_files_that_cannot_be_read_end_no_run(maker: Maker, recorder: Any) -> None:
    with maker.open() as trackers:
        output = maker.rows("iter0/train", [3.0])
        (output / "work/metrics.jsonl").write_text("no json\n" * 3)
        trackers.begin("iter0/train", output)
        trackers.end(None)
    (note,) = maker.notes
    assert note.startswith("metrics are no longer sent, SparringError: ")


@pytest.mark.parametrize("resumed_from", [0, 1, 2])
def test_a_resumed_step_sends_what_is_new(maker: Maker, recorder: Any, resumed_from: int) -> None:
    """From a checkpoint that may be older than what was sent."""
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [9.0])
        trackers.begin("iter1/train", maker.rows("iter1/train", [3.0, 2.0]))
    with maker.open() as trackers:
        trackers.begin("iter0/train", maker.folder / "iter0/train")
        trackers.end(artifacts.read(maker.folder / "iter0/train"))
        losses = [3.0, 2.0, 1.0][resumed_from:]
        trackers.begin("iter1/train", maker.rows("iter1/train", losses, start=resumed_from))
    assert curve(recorder.logged, "train") == [(0, 9.0), (1, 3.0), (2, 2.0), (3, 1.0)]
    first, second = recorder.runs
    assert first.id == second.id


def test_a_step_made_anew_by_other_settings_is_sent_anew(maker: Maker, recorder: Any) -> None:
    for key, loss in (("k", 3.0), ("other", 5.0)):
        with maker.open() as trackers:
            maker.made(trackers, "iter0/train", [loss], key=key)
    assert curve(recorder.logged, "train") == [(0, 3.0), (0, 5.0)]
    assert curve(recorder.logged, "summary/train") == [(0, 3.0), (0, 5.0)]


@pytest.mark.parametrize("breaks_at", [0, 1, 2])
def test_a_tracker_that_fails_costs_nothing(maker: Maker, recorder: Any, breaks_at: int) -> None:
    recorder.breaks_at = breaks_at
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [3.0, 2.0])
        maker.made(trackers, "iter1/train", [1.0])
    (note,) = maker.notes
    assert note.startswith(f"{OWN} gets nothing more of this run, ConnectionError: the service")
    assert len(recorder.logged) == breaks_at
    recorder.breaks_at = -1
    with maker.open() as trackers:
        for step in ("iter0/train", "iter1/train"):
            trackers.begin(step, maker.folder / step)
            trackers.end(artifacts.read(maker.folder / step))
    assert curve(recorder.logged, "train") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert curve(recorder.logged, "summary/train") == [(0, 2.0), (1, 1.0)]


def test_two_processes_do_not_send_at_once(maker: Maker) -> None:
    with maker.open(), pytest.raises(SparringError, match="another sparring process"), maker.open():
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "unknown tracker 'tensorbord'; known are tensorboard, wandb, trackio"),
        ("nowhere:Tracker", "cannot be imported"),
        ("trackers_of_tests:Unwilling", "does not start: RuntimeError: no login"),
        ("trackers_of_tests:Missing", r"No module named .*pip install \"sparring\[track\]\""),
    ],
)
def test_a_tracker_that_does_not_start_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(SparringError, match=message), Maker(tmp_path, OWN, name).open():
        pass


def test_groups() -> None:
    assert placed("iter12/train") == ("train", 12)
    assert placed("heldout2/evaluate") == ("heldout/evaluate", 2)
    assert placed("energy/seed1/conf-sample") == ("energy/seed1/conf-sample", 0)
    assert placed("train") == ("train", 0)


def test_numbers_of_figures() -> None:
    figures = {
        "step": 4,
        "a": 1,
        "b": {"c": 0.5, "text": "x"},
        "interval": [1.0, 0.5, 1.5],
        "list": [1, 2],
        "words": ["a", "b", "c"],
        "yes": True,
        "none": None,
    }
    assert numbers(figures) == {"a": 1, "b/c": 0.5, "interval": 1.0}


# The trackers themselves.


def tensorboard_curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = str(folder / "tracking/tensorboard")
    events = EventAccumulator(place, size_guidance={"tensors": 0})  # all of them
    events.Reload()
    tensors = events.Tensors(tag)
    return [(event.step, event.tensor_proto.float_val[0]) for event in tensors]


def test_tensorboard(tmp_path: Path) -> None:
    maker = Maker(tmp_path, "tensorboard")
    for step, losses in (("iter0/train", [3.0, 2.0]), ("iter1/train", [1.5])):
        with maker.open() as trackers:  # each a process that goes on
            if step == "iter1/train":
                trackers.begin("iter0/train", tmp_path / "iter0/train")
                trackers.end(artifacts.read(tmp_path / "iter0/train"))
            maker.made(trackers, step, losses)
    assert tensorboard_curve(tmp_path, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.5)]
    assert tensorboard_curve(tmp_path, "summary/train/steps") == [(0, 2.0), (1, 1.0)]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    maker = Maker(tmp_path, "wandb")
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [3.0, 2.0])
    (file,) = tmp_path.glob("tracking/wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    told = json.loads((tmp_path / "tracking/sent.json").read_text())
    assert file.name == f"run-{told['id']}.wandb"
    assert content.count(b"train/loss") >= 3  # two rows and the summary
    assert b"summary/train/steps" in content


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "db")
    maker = Maker(tmp_path, "trackio")
    with maker.open() as trackers:
        maker.made(trackers, "iter0/train", [3.0, 2.0])
    (name,) = SQLiteStorage.get_runs("sparring")
    rows = SQLiteStorage.get_logs("sparring", name)
    assert [(row["train/step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (0, 3.0),
        (1, 2.0),
    ]


# Runs and commands.


def toy_run(folder: Path, *track: str) -> Callable[[], dict[str, Any]]:
    import toy_pipeline

    launch = LaunchConfig(inline=("add",), track=track)
    recipe = toy_pipeline.ToyRecipe(launch=launch)
    return lambda: runs.execute(toy_pipeline.Toy(), recipe, folder, Reporter(quiet=True))


def test_a_run_is_tracked(tmp_path: Path, recorder: Any) -> None:
    go = toy_run(tmp_path / "run", OWN)
    go()
    assert recorder.logged == [
        ("summary/one", 0, {"total": 1}),
        ("summary/two", 0, {"total": 3}),
    ]
    (told,) = recorder.runs
    assert (told.name, told.recipe["second"]) == ("run", 2)
    go()
    assert len(recorder.logged) == 2


def test_a_run_without_trackers_has_no_folder_for_them(tmp_path: Path) -> None:
    toy_run(tmp_path / "run")()
    assert not (tmp_path / "run/tracking").exists()


def test_a_wrong_tracker_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match="unknown tracker"):
        toy_run(tmp_path / "run", "mlflo")()
    assert not (tmp_path / "run/one").exists()


def test_the_command_sends_what_a_run_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        'name = "tiny"\npipeline = "science"\nseeds = 1\nlasso.iterations = 40\n'
        'lasso.batch = 8\nadmm = [{label = "standard"}]\nlaunch.inline = ["admm"]\n'
    )
    run = tmp_path / "run"
    assert cli.main(["run", str(recipe), "--out", str(run)]) == 0
    assert not (run / "tracking").exists()
    for _ in range(2):
        assert cli.main(["track", str(run), "--to", "tensorboard", OWN]) == 0
    assert f"{run}: sent to tensorboard, {OWN}" in capsys.readouterr().out
    lines = (run / "standard/seed0/metrics.jsonl").read_text().splitlines()
    distances = [json.loads(line)["distance"] for line in lines]
    curve = tensorboard_curve(run, "standard/seed0/distance")
    assert curve == [(n, pytest.approx(value)) for n, value in enumerate(distances)]
    assert len(distances) > 10


def test_the_command_on_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["track", str(tmp_path), "--to", "tensorboard"]) == 1
    assert "is no run" in capsys.readouterr().err


def test_a_stage_is_tracked(tmp_path: Path, recorder: Any) -> None:
    launch = LaunchConfig(inline=("text-data",), track=(OWN,))
    texts = tmp_path / "texts.txt"
    texts.write_text("some words to read\n" * 40)
    settings = {"source": "text8", "path": str(texts), "heldout": 2, "length": 16}
    run_stage("text-data", tmp_path / "data", launch=launch, **settings)
    ((group, step, figures),) = recorder.logged
    assert (group, step) == ("summary/text-data", 0)
    assert figures["train"] > 0
    assert recorder.runs[0].folder == tmp_path / "tracking/data"
