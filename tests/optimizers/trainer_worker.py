"""A rank of the Trainer checks: `trainer_worker.py OUT CASES` under the `deepspeed` launcher.

The same tiny trainings run in one process in test_huggingface.py, which imports the parts here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LENGTH, VOCABULARY = 8, 24
# A batch of eight rows for any number of processes up to four: rows / (processes * micro-batches).
ROWS, BATCH, STEPS = 64, 8, 6


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in drawn]


def tiny_llama() -> Any:
    """The same weights everywhere, also where TrainingArguments turn zero.Init on."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    for number, parameter in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(number)
        with whole(parameter), torch.no_grad():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * drawn if parameter.dim() == 2 else 1 + 0.2 * drawn)
    return model


def tiny_gpt2(dropout: float = 0.0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False
    )
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout
    return GPT2LMHeadModel(config)


def whole(parameter: Tensor) -> contextlib.AbstractContextManager[None]:
    """Brings the parts of a parameter together under ZeRO 3."""
    if not hasattr(parameter, "ds_shape"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)  # type: ignore[no-any-return]


def arguments(folder: Path, processes: int = 1, **options: Any) -> Any:
    """Batches of eight rows in their order, in two micro-batches, clipped, with a schedule."""
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": "deepspeed" not in options,
        "per_device_train_batch_size": BATCH // (2 * processes),
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "max_steps": STEPS,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**given, **options})


def config(case: Mapping[str, Any]) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": case["stage"]}
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0
    automatic = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    by_name = {"optimizer": {"type": "MARS", "params": automatic}} if case.get("by_name") else {}
    return {
        **by_name,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": case.get("force_cpu_adam", False),
        "steps_per_print": 2**31,
    }


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer

    from sparring.optimizers.deepspeed import register_deepspeed, unwrap
    from sparring.optimizers.huggingface import attach_mars

    def trained(**options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if case["stage"] is not None:
            # On a CPU accelerate has to be told the backend, or it counts one process.
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
            options["deepspeed"] = config(case)
            options["accelerator_config"] = {"use_configured_state": True}
        if case.get("by_name"):
            register_deepspeed()
            options |= {"adam_beta1": 0.95, "adam_beta2": 0.99}
        args = arguments(folder, dist.get_world_size(), **options)
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        resume = case.get("resume") and "save_steps" not in options
        model = tiny_llama()
        split = any(hasattr(parameter, "ds_shape") for parameter in model.parameters())
        trainer = Trainer(model=model, args=args, train_dataset=rows())
        if not case.get("by_name"):
            attach_mars(trainer, **case["options"])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        weights = {}
        for name, parameter in trainer.model.named_parameters():
            with whole(parameter):
                weights[name] = parameter.detach().clone()
        facts = {"wrapper": type(trainer.model_wrapped).__name__, "zero_init": split}
        if case["stage"] is None:
            return weights, {**facts, "updates": dict(trainer.optimizer.optimizer.updates)}
        engine = trainer.deepspeed
        facts |= {"updates": dict(unwrap(engine).updates), "engine_steps": engine.global_steps}
        engine.destroy()
        return weights, facts

    saving = {"save_strategy": "steps", "save_steps": 3} if case.get("resume") else {}
    try:
        weights, facts = trained(**saving)
    except ValueError as error:
        return {"refused": str(error)}
    if case.get("resume"):
        again, _ = trained()
        facts["resumed_diff"] = max(
            float((again[name] - weights[name]).abs().max()) for name in weights
        )
    facts["weights"] = {name: weight.tolist() for name, weight in weights.items()}
    return facts


def main() -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.INFO)
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    import deepspeed.ops

    # Compiling it takes minutes, and leaves a stale lock when killed; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    import torch.distributed as dist

    results = []
    for number, case in enumerate(cases):
        results.append(run(case, out.parent / f"case{number}"))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(gathered))
    dist.barrier()


if __name__ == "__main__":
    main()
