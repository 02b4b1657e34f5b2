"""Training: the loss, noise by row, resuming, ranks, what is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_text import TINY, TrainRun, write_data
from transformers import set_seed

from sparring.diffusion.dndm.config import (
    ProcessConfig,
    TextModelConfig,
    TextTrainConfig,
)
from sparring.diffusion.dndm.network import (
    DecoderLayer,
    EncoderLayer,
    TextDenoiser,
    TextDenoiserConfig,
)
from sparring.diffusion.dndm.rows import Text
from sparring.diffusion.dndm.train import Data, noised, rate
from sparring.launch.cli import main
from sparring.launch.config import plain
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.training import batches
from sparring.optimizers import OptimizerConfig


def difference(one: Path, two: Path) -> float:
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


CONFIG = TextDenoiserConfig(vocab_size=20, process=plain(ProcessConfig(noise="uniform", steps=8)))


def test_a_rows_noise_is_its_seeds_alone() -> None:
    rows, seeds = [[3, 4, 5], [6, 7, 8, 9, 10], [11, 12]], [1, 2, 3]
    together = noised(rows, seeds, CONFIG, times=2)
    for n, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
        alone = noised([row], [seed], CONFIG, times=2)
        for time in range(2):
            at = time * 3 + n
            assert together.x_BN[at, : len(row)].tolist() == alone.x_BN[time].tolist()
            assert float(together.t_B[at]) == float(alone.t_B[time])
            assert not together.noisy_BN[at, len(row) :].any()
    assert bool((together.t_B[:3] >= together.t_B[3:]).all())
    assert set((together.t_B * 8).tolist()) <= set(range(1, 9))


def test_as_many_tokens_are_noised_as_the_schedule_says() -> None:
    rows = [[5] * 12] * 400
    made = noised(rows, range(400), CONFIG, times=1)
    share = made.noisy_BN.double().mean(1)
    # Linear: a share t. Mean of 12 tokens: variance t (1 - t) / 12, at most 1/48.
    assert float((share - made.t_B).mean()) == pytest.approx(0, abs=4 * (1 / 48 / 400) ** 0.5)
    assert float((share - made.t_B).square().mean()) < 1 / 48
    special = made.x_BN[made.noisy_BN] < 3
    assert not bool(special.any())


@pytest.mark.parametrize(
    ("noise", "counted"), [("absorbing", "noisy"), ("uniform", "noisy"), ("uniform", "all")]
)
def test_the_first_loss_by_hand(noise: Any, counted: str, new_run: Callable[..., TrainRun]) -> None:
    """lambda (1 - e) CE + e mean CE over noised tokens, by numpy-like loops over one batch."""
    run = new_run("one", steps=1, tokens=counted, process=ProcessConfig(noise=noise, steps=10))
    run()
    rows = Data(run.inputs["data"])
    set_seed(derive(3, "start") % 2**32)
    network = TextDenoiser(rows.config(run.config)).train()
    chosen = batches(len(rows), 10, 1, 3)[0]
    tokens = sum(len(rows.targets[row]) for row in chosen)
    total, right, nats, noisy = 0.0, 0, 0.0, 0
    for row in chosen:
        target, source = rows.targets[row], torch.tensor([rows.sources[row]])
        drawn = noised([target], [derive(3, "noise", 0, row)], network.config, times=2)
        lengths = (
            network(drawn.x_BN[:1], drawn.t_B[:1].float(), source=source).length_logits[0].detach()
        )
        wanted = len(target) - len(rows.sources[row]) + 3
        total += 0.1 * -float(lengths.log_softmax(0)[wanted]) / 10
        right += int(lengths.argmax()) == wanted
        for time in range(2):
            x, t = drawn.x_BN[time : time + 1], drawn.t_B[time : time + 1]
            logits = network(x, t.float(), source=source).logits[0].detach()
            if noise == "absorbing":
                logits[:, 1] = -math.inf
            lam = 1 - (float(t) - 0.1)
            for place, token in enumerate(target):
                hit = bool(drawn.noisy_BN[time, place])
                if counted == "all" or (hit if noise == "absorbing" else int(x[0, place]) != token):
                    logp = logits[place].log_softmax(0)
                    finite = logp[logp.isfinite()]
                    ce = -0.9 * float(logp[token]) - 0.1 * float(finite.mean())
                    total += lam * ce / 2 / tokens
                    nats, noisy = nats - float(logp[token]), noisy + 1
    assert run.metrics[0]["loss"] == pytest.approx(total, rel=1e-5)
    assert run.metrics[0]["cross_entropy"] == pytest.approx(nats / noisy, rel=1e-5)
    assert run.metrics[0]["length_accuracy"] == right / 10


def test_micro_batches_change_nothing_but_rounding(new_run: Callable[..., TrainRun]) -> None:
    whole, parts = new_run("whole"), new_run("parts", micro_batch=3)
    whole()
    parts()
    assert difference(whole.output, parts.output) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"model": TextModelConfig(**{**vars(TINY), "dropout": 0.3})},
        {"ema": 0.9, "optimizer": OptimizerConfig(name="mars"), "process": ProcessConfig(steps=0)},
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    new_run: Callable[..., TrainRun], options: dict[str, Any]
) -> None:
    whole, stopped = new_run("whole", **options), new_run("stopped", **options)
    whole()
    asked = iter([False, True])
    with pytest.raises(Stopped):
        stopped(lambda: next(asked))
    stopped()
    assert difference(whole.output, stopped.output) == 0
    assert whole.metrics == stopped.metrics


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "reciprocal"},
        {"weighting": "none"},
        {"coupled": False},
        {"label_smoothing": 0.0},
        {"length_weight": 0.0},
        {"ema": 0.5},
        {"process": ProcessConfig(steps=0)},
        {"process": ProcessConfig(noise="uniform")},
        {"process": ProcessConfig(noise="unigram")},
        {"process": ProcessConfig(schedule="cosine")},
        {"optimizer": OptimizerConfig(name="mars")},
        {"optimizer": OptimizerConfig(name="mars", exact=True)},
    ],
    ids=str,
)
def test_options_change_what_they_say(
    new_run: Callable[..., TrainRun], plain_run: Path, options: dict[str, Any]
) -> None:
    other = new_run("other", steps=2, lr=1e-2, **options)
    other()
    assert difference(plain_run, other.output) > 1e-6


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    run = TrainRun(tmp_path_factory.mktemp("plain") / "run", data, steps=2, lr=1e-2)
    run()
    return run.output


def test_the_learning_rate_after_the_warm_up() -> None:
    settings = TextTrainConfig(steps=100, warmup=0.1, inverse_sqrt=True, lr=1.0)
    assert rate(settings, 4) == pytest.approx(0.5)
    assert rate(settings, 9) == pytest.approx(1.0)
    assert rate(settings, 39) == pytest.approx(0.5)
    assert rate(settings, 89) == pytest.approx(1 / 3)


@pytest.mark.dist
@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_give_the_weights_of_one(
    zero: int, new_run: Callable[..., TrainRun], data: Path, tmp_path: Path
) -> None:
    run = new_run("one", steps=3, batch=9, micro_batch=5, lr=1e-2)
    run()
    settings = ["--steps", "3", "--batch", "9", "--micro-batch", "5", "--lr", "1e-2"]
    settings += ["--schedule", "constant", "--warmup", "0", "--seed", "3"]
    settings += [
        word
        for name, value in vars(TINY).items()
        if not isinstance(value, bool)
        for word in (f"--model.{name.replace('_', '-')}", str(value))
    ]
    out = tmp_path / "two"
    words = ["train-text-diffusion", "--data", str(data), "--out", str(out), *settings]
    words += ["--zero", str(zero), "--launch.processes", "2"]
    assert main([*words, "--json"]) == 0
    assert json.loads((out / "manifest.json").read_text())["figures"]["zero"] == zero
    assert difference(run.output, out) < 1e-5


def test_texts_of_no_length_are_refused(tmp_path: Path, new_run: Callable[..., TrainRun]) -> None:
    run = new_run("none")
    run.inputs["data"] = write_data(tmp_path / "none", [Text("o", "ab", "A"), Text("e", "a", "")])
    with pytest.raises(SparringError, match="'e' has length 0"):
        run()
    write_rows(run.inputs["data"] / "train.parquet", Text, [])
    with pytest.raises(SparringError, match="no text to train on"):
        run()


def test_the_average_is_what_is_saved(new_run: Callable[..., TrainRun]) -> None:
    """Of the weights after each of three steps, by hand: s <- d s + (1 - d) p."""
    options = {"lr": 1e-2, "batch": 9, "micro_batch": 9}
    averaged = new_run("ema", steps=3, ema=0.9, **options)
    averaged()
    set_seed(derive(3, "start") % 2**32)
    network = TextDenoiser(Data(averaged.inputs["data"]).config(averaged.config))
    shadow = {name: weight.clone() for name, weight in network.state_dict().items()}
    for n in range(3):
        run = new_run(f"plain{n}", steps=n + 1, **options)
        run()
        decay = min(0.9, (1 + n) / (10 + n))
        for name, weight in load_file(run.output / "model.safetensors").items():
            shadow[name] = decay * shadow[name] + (1 - decay) * weight
    saved = load_file(averaged.output / "model.safetensors")
    assert saved.keys() == shadow.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, shadow[name], rtol=0, atol=1e-6)
    assert difference(averaged.output, run.output) > 1e-4


def test_activations_that_are_computed_again_change_nothing(
    new_run: Callable[..., TrainRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer runs once more for each backward pass, with the same dropout."""
    calls = {"plain": 0, "again": 0}
    options = {"steps": 2, "model": TextModelConfig(**{**vars(TINY), "dropout": 0.3})}
    for name, kind in (("plain", False), ("again", True)):
        for layer in (EncoderLayer, DecoderLayer):
            once = layer.__mro__[2].forward  # of torch's layer

            def counted(*args: Any, _once: Any = once, _name: str = name, **kwargs: Any) -> Any:
                calls[_name] += 1
                return _once(*args, **kwargs)

            monkeypatch.setattr(layer, "forward", counted)
        new_run(name, gradient_checkpointing=kind, **options)()
    assert calls == {"plain": 4, "again": 8}
    folder = new_run("third").output.parent
    assert difference(folder / "plain", folder / "again") == 0


def test_half_precision_keeps_whole_weights(new_run: Callable[..., TrainRun]) -> None:
    whole, half = new_run("whole", lr=1e-2), new_run("half", lr=1e-2, precision="bfloat16")
    whole()
    half()
    saved = load_file(half.output / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert half.metrics[0]["loss"] != whole.metrics[0]["loss"]
    assert half.metrics[0]["loss"] == pytest.approx(whole.metrics[0]["loss"], rel=0.02)
