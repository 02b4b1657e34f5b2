"""Plugging MARS into DeepSpeed, and the configurations under which it would not be what runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparring.launch.processes import free_port
from sparring.optimizers import MARS, register_deepspeed
from sparring.optimizers.deepspeed import check_config, take_moments, unwrap

OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": {"type": "AdamW"}}, r'"optimizer" \("AdamW"\).*in code too; remove one'),
    ({"zero_optimization": OFFLOAD}, "zero_force_ds_cpu_optimizer.*set it to false"),
    (
        {
            "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            "zero_force_ds_cpu_optimizer": False,
        },
        "ratio = 0.5.*own AdamW; set it to 1.0",
    ),
    (
        {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
        "round_robin_gradients.*set it to false",
    ),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow.*remove it"),
    ({"bf16": {"bf16_master_weights_and_grads": True}}, "16-bit masters.*set it to false"),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "GradScaler.*use bfloat16"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_configurations_without_mars_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(config, client_optimizer=True)


def test_configurations_with_mars_are_let_through() -> None:
    check_config({"zero_optimization": OFFLOAD}, client_optimizer=False)
    check_config(
        {"zero_optimization": OFFLOAD, "zero_force_ds_cpu_optimizer": False}, client_optimizer=True
    )
    check_config({"optimizer": {"type": "MARS"}}, client_optimizer=False)
    check_config({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, client_optimizer=True)


def test_another_optimizer_is_not_taken_for_mars() -> None:
    class Engine:
        basic_optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, 2))])

    with pytest.raises(ValueError, match="is AdamW, not MARS"):
        unwrap(Engine())


IN_A_PROCESS = """
import json, sys, torch
import deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from deepspeed.runtime.zero import utils
from accelerate import Accelerator, DeepSpeedPlugin
from sparring.optimizers import MARS, register_deepspeed
before = list(utils.ZERO_SUPPORTED_OPTIMIZERS)
register_deepspeed(); register_deepspeed()
assert [c for c in utils.ZERO_SUPPORTED_OPTIMIZERS if c not in before] == [MARS]
model = torch.nn.Linear(4, 4)
found = {}

def attempt(name, call):
    try:
        call()
        found[name] = "let through"
    except ValueError as error:
        found[name] = str(error)

base = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
both = {**base, "optimizer": {"type": "MARS", "params": {"lr": 0.1}}}
path = sys.argv[1] + ".config"
json.dump(both, open(path, "w"))
for name, config in (("both", both), ("both in a file", path)):
    attempt(name, lambda: deepspeed.initialize(
        model=model, optimizer=MARS(model.parameters()), config=config))
offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
plugin = DeepSpeedPlugin(hf_ds_config={**base, "zero_optimization": offload})
from accelerate.utils import InitProcessGroupKwargs
accelerator = Accelerator(
    deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
attempt("swap", lambda: accelerator.prepare(model, MARS(model.parameters())))
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.mark.dist
def test_deepspeed_and_accelerate_refuse_by_themselves(tmp_path: Any) -> None:
    """`deepspeed.initialize` with two optimizers, accelerate's silent exchange for CPUAdam."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "found.json")],
        env={**os.environ, **place},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert "remove one of them" in found["both"]
    assert "remove one of them" in found["both in a file"]
    assert "would replace MARS by DeepSpeedCPUAdam" in found["swap"]


def test_registering_without_deepspeed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero", None)
    with pytest.raises(ImportError, match=r"needs DeepSpeed \(.*pip install deepspeed"):
        register_deepspeed()


LATE = """
import sys
import torch
from sparring.optimizers import MARS
optimizer = MARS([torch.nn.Parameter(torch.zeros(2, 2))])
import accelerate.accelerator
try:
    accelerate.accelerator.map_pytorch_optim_to_deepspeed(optimizer)
except ValueError as error:
    print(error)
"""


def test_accelerate_is_guarded_if_imported_after_mars() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert "would replace MARS by DeepSpeedCPUAdam" in done.stdout


def test_moments_without_an_update_in_between_are_refused_before_the_step() -> None:
    matrix = torch.nn.Parameter(torch.zeros(2, 2))
    mars = MARS([matrix], exact=True)
    matrix.grad = torch.ones(2, 2)
    calls: list[str] = []

    def take() -> None:
        calls.append("step")
        mars.step()

    inner = SimpleNamespace(step=take, zero_grad=lambda: None, overflow=False)
    engine = SimpleNamespace(basic_optimizer=mars, optimizer=inner)
    take_moments(engine)
    assert mars.pending
    with pytest.raises(RuntimeError, match=r"take_moments was called again.*engine.step\(\)"):
        take_moments(engine)
    assert calls == ["step"]
    inner.overflow = True  # it has skipped the update
    mars.found_inf = torch.ones(())
    mars.step()
    del mars.found_inf
    take_moments(engine)
    assert calls == ["step"] * 2
