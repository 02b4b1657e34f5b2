"""Training: schedules, batches, invariances, resuming, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from sparring.alignment import train
from sparring.alignment.rows import ReferencedPair
from sparring.alignment.stages import TrainStage
from sparring.alignment.tokens import load_tokenizer
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.metrics import read_metrics
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context
from sparring.optimizers import OptimizerConfig

BASE: dict[str, Any] = {
    "beta": 0.01,
    "lr": 1e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "batch": 8,
    "micro_batch": 4,
}


class Run:
    """One training run in a folder of its own, callable again to resume it."""

    def __init__(self, folder: Path, model: Path, pairs: list[ReferencedPair], **options: Any):
        self.output, self.model = folder, model
        self.config = TrainStage(**{**BASE, **options})
        self.events: list[dict[str, Any]] = []
        (folder / "work").mkdir(parents=True)
        (folder / "pairs").mkdir()
        write_rows(folder / "pairs" / "pairs.parquet", ReferencedPair, pairs)

    def __call__(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        def emit(**event: Any) -> None:
            self.events.append(event)

        context = Context(World(), self.output / "work", 3, stopped, emit)
        inputs = {"model": self.model, "pairs": self.output / "pairs"}
        return train.run(self.config, inputs, self.output, context)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.output / "model.safetensors")

    @property
    def metrics(self) -> list[Any]:
        return read_metrics(self.output / "metrics.jsonl")

    @property
    def notes(self) -> list[str]:
        return [event["note"] for event in self.events if "note" in event]


@pytest.fixture
def pairs(tiny_chain: dict[str, Path]) -> list[ReferencedPair]:
    return read_rows(tiny_chain["reference"] / "pairs.parquet", ReferencedPair)


@pytest.fixture
def new_run(tmp_path: Path, tiny_model: Path, pairs: list[ReferencedPair]) -> Callable[..., Run]:
    def make(name: str, rows: list[ReferencedPair] | None = None, **options: Any) -> Run:
        return Run(tmp_path / name, tiny_model, pairs if rows is None else rows, **options)

    return make


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_a_schedule_laid_out_for_more_epochs_is_stopped_early(new_run: Callable[..., Run]) -> None:
    """SPPO's paper: the schedule of 18 epochs, of which the first is run."""
    run = new_run("a", schedule="linear", warmup=0.1, schedule_epochs=18)
    figures = run()
    steps = [row["lr"] for row in run.metrics]
    warmup = math.ceil(0.1 * 18 * figures["steps"])
    np.testing.assert_allclose(steps, [1e-3 * (n + 1) / warmup for n in range(len(steps))])


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from([0.3, 1.0, 1.5, 3.0]))
def test_epochs_become_steps(count: int, batch: int, epochs: float) -> None:
    steps, total = train.planned_steps(count, TrainStage(batch=batch, epochs=epochs))
    assert steps == total == max(1, round(epochs * math.ceil(count / batch)))


# Losses and invariances


def test_the_first_loss_follows_from_the_data_alone(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    """Δ = 0 at the start, so SPPO's loss in units of β² is the mean of (P̂ − ½)²."""
    run = new_run("a", batch=len(pairs), beta=1e-3)
    run()
    wins = np.array([(p.chosen_win, p.rejected_win) for p in pairs])
    eta, beta = 1e3, 1e-3
    expected = ((eta * (wins - 0.5)) ** 2).mean() * beta**2
    first = run.metrics[0]
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["reference_gap"] == pytest.approx(0, abs=1e-4)
    assert run.notes == []


def test_training_raises_the_chosen_responses(new_run: Callable[..., Run]) -> None:
    run = new_run("a", epochs=8, beta=0.1, lr=3e-3)
    run()
    first, last = run.metrics[0], run.metrics[-1]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["accuracy"] == 1.0
    assert last["chosen"] > 0.5 > -0.5 > last["rejected"]


def test_a_start_far_from_the_reference_is_noted(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    moved = [
        dataclasses.replace(p, chosen_reference_logp=p.chosen_reference_logp - 2) for p in pairs
    ]
    run = new_run("a", moved, batch=len(pairs))
    run()
    assert run.metrics[0]["reference_gap"] == pytest.approx(2, abs=1e-3)
    assert "2.00 nats a response away from the reference" in run.notes[0]


@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"micro_batch": 3}, {"logits_chunk": 7}])
def test_how_a_batch_is_cut_changes_no_weight(
    new_run: Callable[..., Run], options: dict[str, Any]
) -> None:
    # RMSprop and Adam divide by the gradient's size, which blows up rounding where it is near 0;
    # the rate keeps that below the tolerance, and the weights' change well above it.
    common = {"lr": 1e-5, "epochs": 2}
    one, other = new_run("one", micro_batch=8, **common), new_run("other", **common, **options)
    one()
    other()
    before = load_file(one.model / "model.safetensors")
    assert largest_difference(one.weights, before) > 2e-5
    assert largest_difference(one.weights, other.weights) < 1e-6
    for a, b in zip(one.metrics, other.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_short_last_batch_is_divided_by_its_own_size(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    """Its gradient is that of a batch of the same rows, whatever train.batch is."""
    rows = pairs[:3]
    short, exact = new_run("short", rows, batch=8), new_run("exact", rows, batch=3, micro_batch=3)
    short()
    exact()
    assert short.metrics[0]["grad_norm"] == pytest.approx(exact.metrics[0]["grad_norm"], rel=1e-4)
    assert short.metrics[0]["loss"] == pytest.approx(exact.metrics[0]["loss"], rel=1e-5)


def test_clipping(new_run: Callable[..., Run]) -> None:
    """The norm is reported as it was before."""
    free, clipped = new_run("free", clip=0), new_run("clipped", clip=1e-4)
    free()
    clipped()
    assert clipped.metrics[0]["grad_norm"] == pytest.approx(free.metrics[0]["grad_norm"])
    assert clipped.metrics[0]["grad_norm"] > 1e-4
    assert largest_difference(free.weights, clipped.weights) > 0


def test_sft_looks_at_the_chosen_response_alone(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    sft = {"algorithm": "sft", "batch": len(pairs)}
    swapped = [dataclasses.replace(p, rejected_ids=(5, 2)) for p in pairs]
    one, two = new_run("one", **sft), new_run("two", swapped, **sft)
    one()
    two()
    # Rounding only: rows are sorted by length, the rejected response's too, before they are cut.
    assert largest_difference(one.weights, two.weights) < 1e-5
    expected = -np.mean([p.chosen_reference_logp for p in pairs])
    assert one.metrics[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_same_run_twice_gives_the_same_bytes(new_run: Callable[..., Run]) -> None:
    one, two = new_run("one"), new_run("two")
    one()
    two()
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        assert (one.output / name).read_bytes() == (two.output / name).read_bytes()


# LoRA


def test_experts_keep_the_names_of_the_file(
    tiny_model: Path, new_run: Callable[..., Run], tmp_path: Path
) -> None:
    """In memory transformers holds all of a layer's experts in one tensor."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = Qwen3MoeConfig(
        vocab_size=len(load_tokenizer(tiny_model)), hidden_size=16, intermediate_size=16,
        moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    start = tmp_path / "moe"
    for path in tiny_model.glob("token*"):
        (start / path.name).parent.mkdir(exist_ok=True)
        shutil.copy(path, start / path.name)
    Qwen3MoeForCausalLM(shape).save_pretrained(start)
    run = new_run("moe-run")
    run.model = start
    run()
    before = load_file(start / "model.safetensors")
    assert "model.layers.0.mlp.experts.0.down_proj.weight" in before
    assert run.weights.keys() == before.keys()
    assert all(run.weights[name].shape == tensor.shape for name, tensor in before.items())
    assert any(not torch.equal(run.weights[name], before[name]) for name in before)


def test_no_family_keeps_its_dropout() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    shape = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=16, dropout=0.5,
    )  # fmt: skip
    model = train._trainable(OPTForCausalLM(shape), TrainStage(**BASE))
    ids = torch.arange(8)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_lora_on_other_layers_than_linear_ones_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    with pytest.raises(SparringError, match=r"is a Conv1D, as in GPT-2"):
        train._trainable(GPT2LMHeadModel(shape), TrainStage(**BASE, lora_rank=2))


def test_the_algorithms_own_beta_is_the_default(new_run: Callable[..., Run]) -> None:
    loss = {}
    for beta in (None, 0.1, 1e-3):
        run = new_run(f"beta-{beta}", algorithm="dpo", beta=beta, epochs=2)
        run()
        loss[beta] = [row["loss"] for row in run.metrics]
    assert loss[None] == loss[0.1] != loss[1e-3]
    assert train.algorithm("sppo").beta == 1e-3


def test_lora_is_merged(new_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, torch.Tensor] = {}
    original = train.merge_lora

    def spy(state: Any, scaling: float) -> Any:
        seen.update({name: tensor.clone() for name, tensor in state.items()})
        assert scaling == 6.0 / 3
        return original(state, scaling)

    monkeypatch.setattr(train, "merge_lora", spy)
    run = new_run("a", lora_rank=3, lora_alpha=6.0, lr=1e-2, epochs=2)
    run()
    base, merged = load_file(run.model / "model.safetensors"), run.weights
    assert merged.keys() == base.keys()
    adapted = {
        name.replace(".lora_A.default", ""): name for name in seen if ".lora_A.default" in name
    }
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert sorted(adapted) == sorted(n for n in base if n.split(".")[-2] in layers)
    for name, weight in base.items():
        if name in adapted:
            a = seen[adapted[name]].double()
            b = seen[adapted[name].replace("lora_A", "lora_B")].double()
            assert a.shape[0] == b.shape[1] == 3
            expected = weight.double() + 6.0 / 3 * (b @ a)
            torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=1e-6)
            assert (merged[name] - weight).abs().max() > 1e-4
        else:
            assert torch.equal(merged[name], weight)


# What is refused, and what is dropped


def test_pairs_that_are_too_long_are_dropped_and_counted(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    lengths = sorted(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    limit = lengths[len(lengths) // 2]
    figures = new_run("a", max_length=limit)()
    assert figures["too_long"] == sum(length > limit for length in lengths) > 0
    assert figures["pairs"] == len(pairs) - figures["too_long"]
    with pytest.raises(SparringError, match=rf"none of the {len(pairs)} pairs fits .* = 5 .*raise"):
        new_run("b", max_length=5)()


def test_a_loss_that_is_not_a_number(
    new_run: Callable[..., Run], pairs: list[ReferencedPair]
) -> None:
    broken = [dataclasses.replace(p, chosen_win=math.nan) for p in pairs]
    run = new_run("a", broken)
    with pytest.raises(SparringError, match=r"the loss became nan; lower train\.lr"):
        run()
    assert not (run.output / "model.safetensors").exists()


# Checkpoints


def stop_after(steps: int) -> Callable[[], bool]:
    left = iter([False] * (steps - 1))
    return lambda: next(left, True)


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(name="adamw"),
        OptimizerConfig(name="rmsprop"),
        OptimizerConfig(name="mars"),
        OptimizerConfig(name="mars", variant="shampoo", exact=True),
    ],
    ids=["adamw", "rmsprop", "mars", "mars-shampoo-exact"],
)
@pytest.mark.parametrize("save_every", [0, 2])
def test_stop_and_resume_give_the_bits_of_an_uninterrupted_run(
    new_run: Callable[..., Run], optimizer: OptimizerConfig, save_every: int
) -> None:
    options = {"epochs": 3, "optimizer": optimizer, "schedule": "linear", "batch": 5}
    whole = new_run("whole", save_every=save_every, **options)
    total = whole()["steps"]
    assert total > 5
    cut = new_run("cut", save_every=save_every, **options)
    for steps in (3, 1):
        with pytest.raises(Stopped, match="run the same command again"):
            cut(stop_after(steps))
        (checkpoint,) = (cut.output / "work").glob("checkpoint-*")
        assert (checkpoint / "done").exists()
    assert checkpoint.name == "checkpoint-0000004"
    cut()
    done = [event["done"] for event in cut.events]
    assert done == list(range(1, total + 1)), "no step is repeated"
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (cut.output / name).read_bytes() == (whole.output / name).read_bytes()


def test_exact_mars_equals_approximate_mars_on_a_fixed_batch(new_run: Callable[..., Run]) -> None:
    """Every step sees all pairs: the last gradient is the present batch's at the last weights."""
    options = {"epochs": 4, "batch": 1000, "lr": 1e-2, "clip": 0.0}
    runs = {
        exact: new_run(f"{exact}", optimizer=OptimizerConfig(name="mars", exact=exact), **options)
        for exact in (False, True)
    }
    assert all(run()["steps"] == 4 for run in runs.values())
    assert largest_difference(runs[False].weights, runs[True].weights) < 1e-6
    adamw = new_run("adamw", optimizer=OptimizerConfig(beta1=0.95, beta2=0.99), **options)
    adamw()
    assert largest_difference(runs[False].weights, adamw.weights) > 1e-4


def test_a_half_written_checkpoint_is_not_loaded(new_run: Callable[..., Run]) -> None:
    whole = new_run("whole", epochs=2)
    whole()
    cut = new_run("cut", epochs=2)
    with pytest.raises(Stopped):
        cut(stop_after(2))
    (checkpoint,) = (cut.output / "work").glob("checkpoint-*")
    (checkpoint / "done").unlink()
    cut()
    assert largest_difference(whole.weights, cut.weights) == 0
    assert (cut.output / "metrics.jsonl").read_bytes() == (
        whole.output / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(
    "layout", [('"ranks": 1', '"ranks": 4'), ('"offload": false', '"offload": true')]
)
def test_a_checkpoint_of_another_layout_is_not_loaded(
    new_run: Callable[..., Run], layout: tuple[str, str]
) -> None:
    cut = new_run("cut", epochs=2)
    with pytest.raises(Stopped):
        cut(stop_after(2))
    (checkpoint,) = (cut.output / "work").glob("checkpoint-*")
    text = (checkpoint / "done").read_text()
    assert layout[0] in text
    (checkpoint / "done").write_text(text.replace(*layout))
    cut.events.clear()
    cut()
    assert cut.events[0]["done"] == 1


def test_memory_and_speed_may_change_at_a_checkpoint(new_run: Callable[..., Run]) -> None:
    common = {"epochs": 2, "batch": 5, "lr": 1e-5}  # the rate: as in how_a_batch_is_cut
    whole, cut = new_run("whole", **common), new_run("cut", **common)
    whole()
    with pytest.raises(Stopped):
        cut(stop_after(3))
    cut.config = dataclasses.replace(
        cut.config, micro_batch=1, gradient_checkpointing=True, save_every=1
    )
    cut()
    done = [event["done"] for event in cut.events]
    assert done == list(range(1, len(whole.metrics) + 1)), "no step is repeated"
    assert largest_difference(whole.weights, cut.weights) < 1e-6
    for a, b in zip(whole.metrics, cut.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_the_result_is_a_whole_model_folder(new_run: Callable[..., Run], tiny_model: Path) -> None:
    from sparring.alignment.models import load_policy
    from sparring.alignment.tokens import load_tokenizer

    run = new_run("a")
    figures = run()
    assert figures["steps"] == len(run.metrics)
    model = load_policy(run.output)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight
    assert load_tokenizer(run.output).chat_template == load_tokenizer(tiny_model).chat_template
    assert load_file(tiny_model / "model.safetensors").keys() == run.weights.keys()
