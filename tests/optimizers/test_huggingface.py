"""MARS in real trainers of transformers and TRL against plain loops (issue 3, part 6)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mars_reference import Reference
from torch import Tensor, nn
from trainer_worker import BATCH, STEPS, arguments, rows, tiny_gpt2, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
)

from sparring.launch.processes import free_port
from sparring.optimizers import MARS
from sparring.optimizers.huggingface import (
    MARSFactory,
    _makes_batches,
    attach_mars,
    mars_groups,
)

WORKER = Path(__file__).with_name("trainer_worker.py")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def trained(trainer: Any, **options: Any) -> dict[str, Tensor]:
    trainer.train(**options)
    return weights(trainer.model)


def mars_of(trainer: Any) -> MARS:
    return trainer.optimizer.optimizer  # type: ignore[no-any-return]


def batches() -> Iterator[list[dict[str, Tensor]]]:
    """Batches of two micro-batches, in the trainer's order."""
    listed = rows()
    for start in range(0, BATCH * STEPS, BATCH):
        batch = listed[start : start + BATCH]
        yield [
            {name: torch.stack([row[name] for row in half]) for name in batch[0]}
            for half in (batch[: BATCH // 2], batch[BATCH // 2 :])
        ]


def backward(model: Any, batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch's gradient, clipped; it is in `.grad` too."""
    model.zero_grad()
    items = sum(int(micro["labels"][:, 1:].numel()) for micro in batch)
    for micro in batch:
        model(**micro, num_items_in_batch=items).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def rate(step: int) -> float:
    """Trainer's linear schedule with two steps of warm-up."""
    return 3e-3 * (step / 2 if step < 2 else (STEPS - step) / (STEPS - 2))


def test_adapters_are_matrices_also_on_the_head(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(), config)
    groups = mars_groups(model)
    assert [group["kind"] for group in groups] == ["matrix"]
    assert len(groups[0]["params"]) == 4
    before = weights(model)
    trainer = attach_mars(Trainer(model=model, args=arguments(tmp_path), train_dataset=rows()))
    after = trained(trainer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name, _ in groups[0]["params"]}
    assert mars_of(trainer).updates == {"MARS-AdamW": 4 * STEPS}


# Trajectories.


@pytest.mark.parametrize("variant", ["adamw", "shampoo"])
def test_trainer_follows_a_plain_loop(variant: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    before = weights(model)
    optimizer = MARS(mars_groups(model, weight_decay=0.1), variant=variant)
    for step, batch in enumerate(batches()):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        backward(model, batch)
        optimizer.step()
    args = arguments(tmp_path)
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=rows())
    attached = trained(attach_mars(trainer, variant=variant))
    settings = {"lr": 3e-3, "weight_decay": 0.1, "variant": variant}
    factory = Trainer(
        model=tiny_llama(),
        args=args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(MARSFactory, settings),
    )
    assert difference(attached, weights(model)) < 1e-6
    assert difference(attached, trained(factory)) == 0
    assert difference(attached, before) > 1e-3
    assert mars_of(trainer).updates == mars_of(factory).updates == optimizer.updates
    rule = {"adamw": "MARS-AdamW", "shampoo": "MARS-Shampoo"}[variant]
    assert optimizer.updates[rule] == STEPS * (7 + 2 * (variant == "adamw"))


def test_exact_mode_follows_the_recursion_with_two_gradients(tmp_path: Path) -> None:
    """h from the weights before, kept by hand, and the recursion in float64."""
    model = tiny_llama()
    before = weights(model)
    references = {
        name: Reference(matrix=x.dim() == 2, weight_decay=0.1 * (x.dim() == 2), gamma=0.3)
        for name, x in before.items()
    }
    previous = before
    for step, batch in enumerate(batches()):
        present = weights(model)
        g = backward(model, batch)
        model.load_state_dict(previous)
        h = backward(model, batch) if step else {name: torch.zeros_like(g[name]) for name in g}
        after = {}
        for name, reference in references.items():
            reference.lr = rate(step) * (1 if reference.mars else 0.5)
            arrays = (x[name].double().numpy() for x in (present, g, h))
            after[name] = torch.from_numpy(reference.step(*arrays)).float()
        model.load_state_dict(after)
        previous = present
    args = arguments(tmp_path, include_num_input_tokens_seen="all")
    trainer = Trainer(model=tiny_llama(), args=args, train_dataset=rows())
    found = trained(attach_mars(trainer, exact=True, gamma=0.3))
    assert difference(found, weights(model)) < 1e-6
    approximate = Trainer(model=tiny_llama(), args=args, train_dataset=rows())
    assert difference(found, trained(attach_mars(approximate, gamma=0.3))) > 1e-5
    assert mars_of(trainer).updates == mars_of(approximate).updates
    # The second run of a batch counts nothing.
    assert trainer.state.num_input_tokens_seen == BATCH * STEPS * 8
    assert trainer.state.total_flos == approximate.state.total_flos


class Recorder(Trainer):  # type: ignore[misc]
    """Keeps every loss."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        self.__dict__.setdefault("losses", []).append(loss.item())
        return loss


def test_a_second_run_has_the_dropout_of_the_first(tmp_path: Path) -> None:
    class Draw(TrainerCallback):  # type: ignore[misc]
        """Takes random numbers between the two runs, as a user's callback may."""

        def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
            torch.rand(1)

    def losses(exact: bool) -> list[float]:
        args = arguments(tmp_path, learning_rate=1e-30)
        model = tiny_gpt2(dropout=0.5)
        trainer = Recorder(model=model, args=args, train_dataset=rows(), callbacks=[Draw()])
        attach_mars(trainer, exact=exact).train()
        return trainer.losses  # type: ignore[no-any-return]

    once, twice = losses(exact=False), losses(exact=True)
    assert len(once) == len(set(once)) == 2 * STEPS
    pairs = [once[i : i + 2] for i in range(0, len(once), 2)]
    assert twice == [loss for pair in pairs for loss in pair * 2]


@pytest.mark.parametrize("exact", [False, True])
def test_resuming_is_exact(exact: bool, tmp_path: Path) -> None:
    def make() -> Any:
        args = arguments(
            tmp_path, save_strategy="steps", save_steps=4, train_sampling_strategy="random"
        )
        trainer = Trainer(model=tiny_gpt2(dropout=0.3), args=args, train_dataset=rows())
        return attach_mars(trainer, exact=exact, gamma=0.3)

    whole = trained(make())
    first = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert any("pending_lr" in state for state in first["state"].values()) is exact
    assert (
        difference(whole, trained(make(), resume_from_checkpoint=f"{tmp_path}/checkpoint-4")) == 0
    )


def test_exact_mode_ends_with_the_last_update(tmp_path: Path) -> None:
    """Also when training stops early, but not on weights loaded from elsewhere."""

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def run(*callbacks: Any, **options: Any) -> Any:
        args = arguments(tmp_path, lr_scheduler_type="constant", **options)
        trainer = Trainer(
            model=tiny_llama(),
            args=args,
            train_dataset=rows(),
            eval_dataset=rows()[:2],
            callbacks=list(callbacks),
        )
        attach_mars(trainer, exact=True).train()
        pending = [state["pending_lr"] for state in mars_of(trainer).state.values()]
        assert pending == [None] * len(pending)
        return trainer

    three = weights(run(max_steps=3, save_strategy="steps", save_steps=3).model)
    assert difference(three, weights(run(Stop()).model)) == 0
    # The checkpoint of the last step has the last update.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert difference(three, weights(saved)) == 0
    # Stopped by the first evaluation that is no better, with the best checkpoint loaded.
    best = run(
        EarlyStoppingCallback(1, early_stopping_threshold=100.0),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    assert best.state.global_step < STEPS
    checkpoint = AutoModelForCausalLM.from_pretrained(best.state.best_model_checkpoint)
    assert difference(weights(checkpoint), weights(best.model)) == 0
    best.args.max_steps = 2
    best.train()  # once more, with the optimizer it has


# TRL.


def sft(model: Path, folder: Path, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [f"the cat sat on {'mat ' * n}." for n in range(1, 9)]
    route = {key: options.pop(key) for key in ("optimizer_cls_and_kwargs",) if key in options}
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(**trl_options(folder), max_length=32, **options),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        **route,
    )


def dpo(model: Path, folder: Path, optimizer: Any = None, loaded: Any = None) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    columns = {
        "prompt": [f"the {word} " for word in ("cat", "dog", "mat", "hat")] * 2,
        "chosen": [f"ran {'far ' * n}." for n in range(8)],
        "rejected": [f"sat {'on ' * n}." for n in range(8)],
    }
    return DPOTrainer(
        model=loaded or AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(**trl_options(folder), max_length=64),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(model),
        **({"optimizers": (optimizer, None)} if optimizer else {}),
    )


def trl_options(folder: Path) -> dict[str, Any]:
    """Every epoch is one and the same batch, whatever its order."""
    given = arguments(folder).to_dict()
    kept = ("output_dir", "use_cpu", "per_device_train_batch_size", "gradient_accumulation_steps",
            "max_grad_norm", "learning_rate", "weight_decay", "save_strategy", "report_to",
            "disable_tqdm", "dataloader_pin_memory", "train_sampling_strategy")  # fmt: skip
    return {
        **{name: given[name] for name in kept},
        "num_train_epochs": 4,
        "logging_steps": 4,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def counted(trainer: Any) -> float:
    return float(trainer.state.log_history[0]["num_tokens"])


def test_sft_trainer_takes_both_routes(tiny_model: Path, tmp_path: Path) -> None:
    attached = attach_mars(sft(tiny_model, tmp_path))
    settings = {"lr": 3e-3, "weight_decay": 0.1}
    factory = sft(tiny_model, tmp_path, optimizer_cls_and_kwargs=(MARSFactory, settings))
    exact = attach_mars(sft(tiny_model, tmp_path), exact=True)
    before = weights(attached.model)
    found = trained(attached)
    assert difference(found, before) > 1e-3
    assert difference(found, trained(factory)) == 0
    assert mars_of(attached).updates["MARS-AdamW"] == 4 * 15
    # On one batch for ever both forms are the same method (oracle 10).
    assert difference(found, trained(exact)) < 1e-5
    assert counted(exact) == counted(attached) > 0
    accuracy = "mean_token_accuracy"
    assert len(exact._metrics["train"][accuracy]) == len(attached._metrics["train"][accuracy])


def test_dpo_trainer_has_no_other_route(tiny_model: Path, tmp_path: Path) -> None:
    attached = attach_mars(dpo(tiny_model, tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    optimizer = MARS(mars_groups(loaded, weight_decay=0.1), lr=3e-3)
    given = dpo(tiny_model, tmp_path, optimizer, loaded)
    exact = attach_mars(dpo(tiny_model, tmp_path), exact=True)
    before = weights(attached.model)
    found = trained(attached)
    assert difference(found, before) > 1e-3
    assert difference(found, trained(given)) == 0
    assert mars_of(attached).updates == optimizer.updates
    assert difference(found, trained(exact)) < 1e-5
    assert counted(exact) == counted(attached) > 0


# Refusals.


def plain(folder: Path, **options: Any) -> Any:
    return Trainer(model=tiny_llama(), args=arguments(folder), train_dataset=rows(), **options)


def test_a_trainer_with_an_optimizer_is_refused(tmp_path: Path) -> None:
    model = tiny_llama()
    sgd = torch.optim.SGD(model.parameters())
    trainer = Trainer(model=model, args=arguments(tmp_path), optimizers=(sgd, None))
    with pytest.raises(ValueError, match="already has an optimizer, SGD: construct it without"):
        attach_mars(trainer)
    trainer = plain(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs, with SGD: use either"):
        attach_mars(trainer)
    with pytest.raises(ValueError, match="use either"):
        attach_mars(attach_mars(plain(tmp_path)))


def test_bad_arguments_are_refused_at_once(tmp_path: Path) -> None:
    trainer = plain(tmp_path)
    callbacks = list(trainer.callback_handler.callbacks)
    with pytest.raises(ValueError, match=r"gamma must be a number in \[0, 1\], not 2"):
        attach_mars(trainer, gamma=2)
    with pytest.raises(ValueError, match="weight_decay_1d must be a finite number of at least 0"):
        attach_mars(trainer, weight_decay_1d=-1)
    with pytest.raises(TypeError, match="learning_rate"):
        attach_mars(trainer, learning_rate=1.0)
    assert trainer.optimizer_cls_and_kwargs is None
    assert trainer.callback_handler.callbacks == callbacks
    with pytest.raises(ValueError, match=r"exact=True needs every batch twice.*attach_mars"):
        MARSFactory()(tiny_llama(), exact=True)


def test_given_settings_win_over_the_trainer_s(tmp_path: Path) -> None:
    trainer = attach_mars(plain(tmp_path), lr=0.02, gamma=0.5)
    trainer.args.weight_decay = 0.3  # as a search over hyper-parameters would
    matrices = trainer.create_optimizer().param_groups[0]
    assert (matrices["lr"], matrices["weight_decay"], matrices["gamma"]) == (0.02, 0.3, 0.5)
    trainer = attach_mars(plain(tmp_path))
    trainer.args.learning_rate = 0.01
    assert trainer.create_optimizer().param_groups[0]["lr"] == 0.01


def test_another_optimizer_in_mars_s_place_is_refused(tmp_path: Path) -> None:
    class Stubborn(Trainer):  # type: ignore[misc]
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters())
            return self.optimizer

    trainer = Stubborn(model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows())
    message = r"trains with SGD although MARS was attached: Stubborn.create_optimizer"
    with pytest.raises(ValueError, match=message):
        attach_mars(trainer).train()


def sharded(config: dict[str, Any] | None = None, fsdp: int = 0, n_gpu: int = 1) -> Any:
    """What attach_mars asks of a trainer under DeepSpeed or FSDP, before it changes anything."""
    plugins = {
        "deepspeed_plugin": SimpleNamespace(deepspeed_config=config),
        "fsdp_plugin": SimpleNamespace(fsdp_version=fsdp),
    }
    return type("Sharded", (), {"_prepare_inputs": Trainer._prepare_inputs})(), {
        "optimizer": None,
        "optimizer_cls_and_kwargs": None,
        "is_deepspeed_enabled": config is not None,
        "is_fsdp_enabled": fsdp > 0,
        "accelerator": SimpleNamespace(state=SimpleNamespace(**plugins)),
        "args": SimpleNamespace(n_gpu=n_gpu, learning_rate=1e-3, weight_decay=0.0),
    }


@pytest.mark.parametrize(
    ("facts", "exact", "message"),
    [
        ({"config": {"optimizer": {"type": "AdamW"}}}, False, r'"optimizer" \("AdamW"\).*remove'),
        (
            {"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
            False,
            "zero_force_ds_cpu_optimizer.*set it to false",
        ),
        (
            {"config": {"torch_autocast": {"enabled": True, "dtype": "float16"}}},
            False,
            "torch_autocast.dtype = float16.*use bfloat16",
        ),
        ({"config": {"scheduler": {"type": "WarmupLR"}}}, True, r'"WarmupLR".*lr_scheduler_type'),
        ({"fsdp": 1}, False, r"fsdp_version = 1: FSDP1 .*use FSDP2.*fsdp_config=\{'version': 2\}"),
        ({"n_gpu": 2}, True, "dropout of 2 GPUs in one process.*torchrun"),
    ],
    ids=str,
)
def test_shardings_that_would_not_run_mars_are_refused(
    facts: dict[str, Any], exact: bool, message: str
) -> None:
    trainer, attributes = sharded(**facts)
    vars(trainer).update(attributes)
    with pytest.raises(ValueError, match=message):
        attach_mars(trainer, exact=exact)
    assert trainer.optimizer_cls_and_kwargs is None


def test_exact_mode_refuses_trainers_that_make_their_batches(tmp_path: Path) -> None:
    class Online(Trainer):  # type: ignore[misc]
        def _prepare_inputs(self, inputs: Any) -> Any:
            return super()._prepare_inputs(inputs)

    class OnPolicy(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            inputs["input_ids"] = model.generate(inputs["input_ids"])
            return super().training_step(model, inputs, *rest)

    class Logged(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            self.steps_seen = getattr(self, "steps_seen", 0) + 1
            return super().training_step(model, inputs, *rest)

    def made(kind: type) -> Any:
        return kind(model=tiny_llama(), args=arguments(tmp_path), train_dataset=rows())

    for kind, where in ((Online, "_prepare_inputs"), (OnPolicy, "OnPolicy.training_step")):
        trainer = made(kind)
        name = kind.__name__
        with pytest.raises(
            ValueError, match=rf"{name} makes its batches while it trains \({where}"
        ):
            attach_mars(trainer, exact=True)
        attach_mars(trainer)
    attach_mars(made(Logged), exact=True)


@pytest.mark.filterwarnings("ignore")  # of what TRL imports
def test_trainers_of_trl_that_generate_are_known() -> None:
    from trl import DPOTrainer, SFTTrainer
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.online_dpo import OnlineDPOTrainer

    assert [_makes_batches(kind) for kind in (SFTTrainer, DPOTrainer)] == ["", ""]
    for kind in (GKDTrainer, OnlineDPOTrainer):
        assert _makes_batches(kind) == f"{kind.__name__}.training_step"


# Several processes.


def by_name() -> dict[str, Tensor]:
    """One group, as Trainer hands all parameters over when the ds_config names the optimizer."""
    model = tiny_llama()
    optimizer = MARS(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate(step)
        backward(model, batch)
        optimizer.step()
    return weights(model)


@pytest.mark.dist
@pytest.mark.parametrize(
    "cases",
    [
        [
            {"stage": None, "options": {"exact": True}},  # DistributedDataParallel
            {"stage": 2, "options": {}, "offload": True, "force_cpu_adam": True},
            {"stage": 2, "options": {}},
            {"stage": 2, "options": {}, "by_name": True},  # in the ds_config, without attach_mars
            {"stage": 3, "options": {"exact": True}, "resume": True},
        ],
        pytest.param(
            [
                {"stage": 2, "options": {"exact": True}, "resume": True},
                {"stage": 3, "options": {}, "offload": True},
                {"stage": 2, "options": {"exact": True}, "offload": True},
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["first", "second"],
)
def test_two_processes_follow_one(cases: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null"]
    launcher += ["--num_gpus", "2", "--no_local_rank", "--master_port", str(free_port())]
    done = subprocess.run(
        [*launcher, str(WORKER), str(tmp_path / "out.json"), str(tmp_path / "cases.json")],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_rank = json.loads((tmp_path / "out.json").read_text())
    start = weights(tiny_llama())

    def route(tried: dict[str, Any]) -> str:
        return "by_name" if tried.get("by_name") else str(bool(tried["options"].get("exact")))

    alone = {
        "by_name": by_name,
        "False": lambda: trained(attach_mars(plain(tmp_path))),
        "True": lambda: trained(attach_mars(plain(tmp_path), exact=True)),
    }
    one = {name: alone[name]() for name in set(map(route, cases))}
    for number, tried in enumerate(cases):
        for facts in (rank[number] for rank in by_rank):
            if tried.get("force_cpu_adam"):
                assert "accelerate replaces MARS" in facts["refused"]
                continue
            found = {name: torch.tensor(value) for name, value in facts["weights"].items()}
            assert difference(found, one[route(tried)]) < 1e-6, tried
            assert difference(found, start) > 1e-3
            assert facts["updates"]["MARS-AdamW"] > 0
            under = tried["stage"] is not None
            wrapper = "DeepSpeedEngine" if under else "DistributedDataParallel"
            assert facts["wrapper"] == wrapper
            assert facts["zero_init"] is (tried["stage"] == 3)
            assert facts.get("engine_steps", STEPS) == STEPS
            assert facts.get("resumed_diff", 0.0) == 0.0
