"""A model that vLLM splits over two processes, driven by one of two ranks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sparring.alignment.rows import Response
from sparring.alignment.stages import STAGES
from sparring.launch import stages
from sparring.launch.rows import read_rows
from sparring.launch.stages import LaunchConfig, Step


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of a width that vLLM has kernels for, and two to split."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wider")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model, hidden_size=128, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make(folder: Path, kind: str, inputs: dict[str, Path], *, ranks: int, **settings: Any) -> Path:
    stage = STAGES[kind]
    step = Step(kind, stage, stage.config(**settings), {}, seed=1)
    launch = LaunchConfig(processes=ranks)
    logs = folder / "logs"
    stages.execute(step, inputs, folder / kind, launch, logs=logs, on_event=lambda _: None)
    return folder / kind


def test_a_split_model_samples_as_the_trainer_thinks(
    model: Path, tiny_prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test before this one may have had an engine in this process.
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    prompts = make(tmp_path, "prompts", {}, ranks=1, source=str(tiny_prompts), train=8, heldout=0)
    inputs = {"model": model, "prompts": prompts}
    sampling = {"k": 2, "max_new_tokens": 12, "chunk": 4, "devices": 2}
    responses = make(tmp_path, "generate", inputs, ranks=2, **sampling)
    assert len(read_rows(responses / "responses.parquet", Response)) == 16
    assert "tensor_parallel_size=2" in (tmp_path / "logs/generate.log").read_text()
    make(tmp_path, "parity", {**inputs, "responses": responses}, ranks=1)  # raises where not
