"""Training on encoded pairs: the opponent, resuming, invariances, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.diffusion.spin import pipelines, train
from sparring.diffusion.spin.process import Process, seeded
from sparring.diffusion.spin.rows import Encoded
from sparring.diffusion.spin.stages import TrainImagesStage
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.lora import adapters_off, add_lora
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context
from sparring.optimizers import OptimizerConfig

BASE: dict[str, Any] = {
    "steps": 4,
    "batch": 4,
    "micro_batch": 4,
    "lr": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "beta": 20.0,
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pairs of random latents under three captions."""
    folder = tmp_path_factory.mktemp("encoded")
    rng = np.random.default_rng(0)

    def latents(shift: float) -> bytes:
        return (rng.normal(size=(4, 8, 8)) + shift).astype("<f4").tobytes()

    rows = [
        Encoded(f"r{n}", f"caption {n % 3}", latents(0.5), latents(-0.5), (16, 16, 0, 0, 16, 16))
        for n in range(10)
    ]
    write_rows(folder / "encoded.parquet", Encoded, rows)
    captions = ["", *(f"caption {n}" for n in range(3))]
    generator = torch.Generator().manual_seed(1)
    save_file(
        {"caption": torch.randn((4, 16, 16), generator=generator)}, folder / "captions.safetensors"
    )
    (folder / "captions.json").write_text(json.dumps({"captions": captions, "cut": 0}))
    (folder / "shape.json").write_text("[4, 8, 8]")
    return folder


class Run:
    """One training run in a folder of its own, callable again to resume it."""

    def __init__(self, output: Path, model: Path, pairs: Path, **options: Any) -> None:
        self.output, self.inputs = output, {"model": model, "encoded": pairs}
        self.config = TrainImagesStage(**{**BASE, **options})
        (output / "work").mkdir(parents=True)

    def __call__(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        context = Context(World(), self.output / "work", 3, stopped, lambda **_: None)
        return train.run(self.config, self.inputs, self.output, context)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "unet" / "diffusion_pytorch_model.safetensors")

    @property
    def metrics(self) -> list[dict[str, float]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def time_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of weights by time step."""
    module = ModuleType("time_weights")
    module.two = lambda t_B, process: torch.full(t_B.shape, 2.0)  # type: ignore[attr-defined]
    module.late = (  # type: ignore[attr-defined]
        lambda t_B, process: 1 - process.alphas_cumprod[t_B]
    )
    monkeypatch.setitem(sys.modules, "time_weights", module)


@pytest.fixture
def new_run(tmp_path: Path, layout: Callable[[str], Path], pairs: Path) -> Callable[..., Run]:
    def make(name: str, **options: Any) -> Run:
        return Run(tmp_path / name, layout("sd"), pairs, **options)

    return make


def difference(one: Run, two: Run) -> float:
    a, b = one.weights, two.weights
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_micro_batches_change_nothing_but_rounding(new_run: Callable[..., Run]) -> None:
    whole, parts = new_run("whole"), new_run("parts", micro_batch=3)
    whole()
    parts()
    assert difference(whole, parts) < 1e-5


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "optimizer": OptimizerConfig(name="mars")}])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    new_run: Callable[..., Run], options: dict[str, Any]
) -> None:
    whole, stopped = new_run("whole", **options), new_run("stopped", **options)
    whole()
    asked = iter([False, True])
    with pytest.raises(Stopped):
        stopped(lambda: next(asked))
    stopped()
    assert difference(whole, stopped) == 0
    assert whole.metrics == stopped.metrics


def test_a_killed_run_goes_on_from_its_checkpoint(new_run: Callable[..., Run]) -> None:
    """kill -9 after the third of four steps, of which two are in a checkpoint."""
    whole, killed = new_run("whole", save_every=2), new_run("killed", save_every=2)
    whole()
    child = os.fork()
    if child == 0:
        asked = iter([False, False])
        killed(lambda: next(asked, None) is None and os.kill(os.getpid(), signal.SIGKILL) is None)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    work = killed.output / "work"
    assert [path.name for path in work.glob("checkpoint-*")] == ["checkpoint-0000002"]
    assert not (killed.output / "metrics.jsonl").exists()
    killed()
    assert difference(whole, killed) == 0
    assert whole.metrics == killed.metrics


def test_exact_mars_pays_its_last_update(new_run: Callable[..., Run]) -> None:
    run = new_run("exact", optimizer=OptimizerConfig(name="mars", exact=True))
    run()
    assert len(run.metrics) == 4
    other = new_run("approximate", optimizer=OptimizerConfig(name="mars"))
    other()
    assert difference(run, other) > 1e-6


def test_the_opponent_of_adapters_is_the_network_without_them(
    layout: Callable[[str], Path],
) -> None:
    """Bit for bit what made the losers, while the adapters have moved."""
    denoiser = pipelines.Denoiser.load(layout("sd"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    conditions = {"caption": torch.randn(2, 16, 16)}
    with torch.no_grad():
        before = denoiser(x, t, conditions)
        adapted = add_lora(denoiser, 2, 4.0, train._ATTENTION)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
        moved = adapted(x, t, conditions)
        with adapters_off(adapted):
            off = adapted(x, t, conditions)
        again = adapted(x, t, conditions)
    assert torch.equal(before, off)
    assert torch.equal(moved, again)
    assert float((moved - before).abs().max()) > 1e-3


def test_lora_trains_the_attention_alone_and_is_merged(
    new_run: Callable[..., Run], layout: Callable[[str], Path]
) -> None:
    run = new_run("lora", lora_rank=2, lr=1e-2)
    run()
    base = load_file(layout("sd") / "unet" / "diffusion_pytorch_model.safetensors")
    changed = {n for n, tensor in run.weights.items() if not torch.equal(tensor, base[n])}
    assert run.weights.keys() == base.keys()
    assert changed
    assert all(".to_" in name and name.endswith(".weight") for name in changed)
    assert run.metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_opponent_is_frozen_and_may_be_another_network(
    new_run: Callable[..., Run], layout: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle 18: no gradient, and the same bits after all steps, while the network moves."""
    trainers: list[train.ImageTrainer] = []

    class Kept(train.ImageTrainer):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            trainers.append(self)

    monkeypatch.setattr(train, "ImageTrainer", Kept)
    run = new_run("spin")
    run()
    base = load_file(layout("sd") / "unet" / "diffusion_pytorch_model.safetensors")
    opponent = trainers[0].opponent.model
    assert all(p.grad is None and not p.requires_grad for p in opponent.parameters())
    assert all(torch.equal(value, base[name]) for name, value in opponent.state_dict().items())
    assert max(float((run.weights[name] - base[name]).abs().max()) for name in base) > 1e-4
    own = new_run("own")
    own.inputs["opponent"] = layout("sd")  # the start, given by hand
    own()
    assert difference(run, own) == 0
    against_start = new_run("against", steps=1)
    against_start.inputs |= {"model": run.output, "opponent": layout("sd")}
    against_start()
    assert against_start.metrics[0]["accuracy"] > 0
    first, other = run.metrics[0], against_start.metrics[0]
    assert other["opponent_winner"] == pytest.approx(first["winner"], rel=1e-6)


def test_adapters_of_a_second_iteration_play_the_merged_ones_of_the_first(
    new_run: Callable[..., Run], layout: Callable[[str], Path], pairs: Path
) -> None:
    """Oracle 18: without its own adapters the network is the saved iterate, not the start."""
    first = new_run("first", lora_rank=2, lr=1e-2)
    first()
    second = new_run("second", lora_rank=2, lr=1e-2, steps=1)
    second.inputs["model"] = first.output
    second()
    start = second.metrics[0]
    assert start["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert start["winner"] == start["opponent_winner"]
    again = new_run("again", loss="sft", steps=1)  # the saved iterate's own error, the same noise
    again.inputs["model"] = first.output
    again()
    assert start["opponent_winner"] == pytest.approx(again.metrics[0]["winner"], rel=1e-6)
    assert start["opponent_winner"] != pytest.approx(first.metrics[0]["winner"], rel=1e-4)


def test_equal_images_teach_nothing_whatever_the_network(
    new_run: Callable[..., Run], layout: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    """Oracle 13 through the trainer: one time, one noise and one caption for both images."""
    moved = new_run("moved")
    moved()
    equal = tmp_path / "equal"
    shutil.copytree(pairs, equal)
    rows = read_rows(pairs / "encoded.parquet", Encoded)
    same = [replace(row, loser=row.winner) for row in rows]
    write_rows(equal / "encoded.parquet", Encoded, same)
    run = new_run("equal", steps=2)
    run.inputs |= {"model": moved.output, "opponent": layout("sd"), "encoded": equal}
    run()
    assert run.metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert run.metrics[0]["grad_norm"] < 1e-5 < moved.metrics[0]["grad_norm"]
    assert abs(run.metrics[0]["displacement"]) > 1e-5


def test_the_gradient_at_the_start_is_beta_over_four_of_winner_minus_loser(
    new_run: Callable[..., Run],
) -> None:
    """Oracle 12 through the trainer: its first gradient norm, from an independent backward pass."""
    run = new_run("one", steps=1)
    run()
    pairs = train.Pairs(run.inputs["encoded"], need_losers=True)
    rows = train.batches(10, 4, 1, 3)[0]
    network = pipelines.Denoiser.load(run.inputs["model"]).train()
    process = Process.of(train._scheduler(run.inputs["model"]))
    u, noise = seeded((4, 8, 8), [train.derive(3, "noise", 0, row) for row in rows])
    t = process.times(u)
    conditions = pairs.conditions([pairs.caption(row) for row in rows], rows)
    total = torch.zeros(())
    for sign, side in ((1, "winner"), (-1, "loser")):
        x, target = process.corrupt(pairs.latents(rows, side), noise, t)
        total = total + sign * (network(x, t, conditions) - target).square().mean()
    (20.0 / 4 * total).backward()
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    expected = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
    assert run.metrics[0]["grad_norm"] == pytest.approx(float(expected), rel=1e-4)


def test_options_change_what_they_say(new_run: Callable[..., Run]) -> None:
    plain = new_run("plain")
    plain()
    for name, options in {
        "guard": {"winner_guard": True},
        "sft": {"sft_weight": 1.0},
        "hinge": {"link": "hinge"},
        "dropout": {"caption_dropout": 1.0},
        "wrong": {"wrong_captions": 1.0},
        "weight": {"weight": "time_weights:late"},
    }.items():
        other = new_run(name, **options)
        other()
        assert difference(plain, other) > 1e-6, name


def test_a_weight_by_time_step_is_a_weight_of_the_margin(new_run: Callable[..., Run]) -> None:
    """Twice the weight everywhere is twice beta."""
    twice, weighted = new_run("twice", beta=40.0), new_run("weighted", weight="time_weights:two")
    twice()
    weighted()
    assert difference(twice, weighted) == 0
    with pytest.raises(ValueError, match="weight is none or module:function, not 'late'"):
        TrainImagesStage(weight="late")


def test_the_sft_loss_lowers_the_winners_error(new_run: Callable[..., Run]) -> None:
    run = new_run("sft", loss="sft", steps=30, lr=3e-3)
    run()
    errors = [row["winner"] for row in run.metrics]
    assert np.mean(errors[-8:]) < np.mean(errors[:8])
    assert "opponent_winner" not in run.metrics[0]


def test_it_refuses_what_it_cannot_train_on(
    new_run: Callable[..., Run], pairs: Path, tmp_path: Path
) -> None:
    grey = tmp_path / "grey"
    shutil.copytree(pairs, grey)
    (grey / "shape.json").write_text("[3, 8, 8]")
    other = new_run("channels")
    other.inputs["encoded"] = grey
    with pytest.raises(SparringError, match="takes 4 channels, and the encoded latents have 3"):
        other()
    half = tmp_path / "half"
    half.mkdir()
    for path in pairs.iterdir():
        (half / path.name).write_bytes(path.read_bytes())
    write_rows(
        half / "encoded.parquet",
        Encoded,
        [Encoded("r", "caption 0", b"\0" * 1024, b"", (16, 16, 0, 0, 16, 16))],
    )
    run = new_run("half")
    run.inputs["encoded"] = half
    with pytest.raises(SparringError, match="encoded without generated images"):
        run()
    write_rows(half / "encoded.parquet", Encoded, [])
    with pytest.raises(SparringError, match="holds no pair to train on"):
        run()


@pytest.mark.dist
@pytest.mark.parametrize(
    "settings",
    [
        ["zero 2", "zero 3, checkpointing"],
        pytest.param(
            ["one rank", "zero 2, checkpointing", "zero 3", "zero 2, adapters"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_in_bfloat16_the_opponent_computes_as_the_network_does(
    settings: list[str], layout: Callable[[str], Path], pairs: Path, tmp_path: Path
) -> None:
    """Every error of the first step is the opponent's, bit for bit: log 2, and ties alone."""
    worker = Path(__file__).with_name("half_worker.py")
    command = [sys.executable, worker, layout("sd"), pairs, tmp_path, *settings]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, start in json.loads(done.stdout.splitlines()[-1]).items():
        assert start["loss"] == pytest.approx(np.log(2), abs=1e-6), name
        assert start["accuracy"] == 0, name
        assert start["winner"] == start["opponent_winner"], name
        assert start["loser"] == start["opponent_loser"], name
        assert start["grad_norm"] > 1e-3, name
