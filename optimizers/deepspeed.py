"""MARS inside DeepSpeed: by name in a ds_config, and in exact mode.

Nothing here imports DeepSpeed before it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from sparring.optimizers.mars import MARS


def register_deepspeed() -> None:
    """Make `{"optimizer": {"type": "MARS", "params": {...}}}` work in a ds_config.

    DeepSpeed has no registry: it looks names up in `torch.optim`, and asks for
    `zero_allow_untested_optimizer` unless the class stands in its list of tested ones. This puts
    MARS into both, and has `deepspeed.initialize` refuse what `check_config` refuses. Calling it
    again changes nothing.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    try:
        from deepspeed.runtime.zero import utils
    except ImportError as error:
        raise ImportError(
            f"register_deepspeed needs DeepSpeed ({error}): pip install deepspeed, or "
            "'sparring[train]' with all that trains; without DeepSpeed there is nothing to register"
        ) from error

    torch.optim.MARS = MARS  # type: ignore[attr-defined]
    if MARS not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(MARS)
    _check_at_initialize()


def _check_at_initialize() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = getattr(DeepSpeedEngine, "_configure_optimizer", None)
    if original is None or hasattr(original, "checked_for_mars"):
        return

    @functools.wraps(original)
    def checked(self: Any, client_optimizer: Any, model_parameters: Any) -> Any:
        by_name = client_optimizer is None and self.optimizer_name() == "MARS"
        if by_name or isinstance(client_optimizer, MARS):
            check_config(self._config._param_dict, client_optimizer=not by_name)
        return original(self, client_optimizer, model_parameters)

    checked.checked_for_mars = True  # type: ignore[attr-defined]
    DeepSpeedEngine._configure_optimizer = checked


def guard_accelerate() -> None:
    """Stop accelerate from replacing MARS by DeepSpeed's CPUAdam without a word.

    With `offload_optimizer` and `zero_force_ds_cpu_optimizer` unset, `Accelerator.prepare` builds a
    DeepSpeedCPUAdam on MARS's parameter groups. From now on it raises a ValueError instead. Every
    MARS calls this when it is built, because nothing of it runs once it has been replaced.
    """
    try:
        import accelerate.accelerator as module
    except ImportError:  # what cannot be imported replaces nothing
        return

    original = getattr(module, "map_pytorch_optim_to_deepspeed", None)
    if original is None or hasattr(original, "guarded_for_mars"):
        return

    @functools.wraps(original)
    def guarded(optimizer: Any) -> Any:
        if isinstance(optimizer, MARS):
            raise ValueError(
                "accelerate would replace MARS by DeepSpeedCPUAdam, because offload_optimizer is "
                'on: put "zero_force_ds_cpu_optimizer": false into the DeepSpeed configuration'
            )
        return original(optimizer)

    guarded.guarded_for_mars = True  # type: ignore[attr-defined]
    module.map_pytorch_optim_to_deepspeed = guarded


def check_config(config: Mapping[str, Any], *, client_optimizer: bool) -> None:
    """Refuse a ds_config under which MARS would not be what runs.

    Args:
        client_optimizer: whether an optimizer is also built in code.

    Raises:
        ValueError: names the entry and the value that helps.
    """

    def refuse(entry: str, reason: str, fix: str) -> None:
        raise ValueError(f"{entry} in the DeepSpeed configuration: {reason}; {fix}")

    if client_optimizer and config.get("optimizer"):
        kind = config["optimizer"].get("type")
        refuse(f'"optimizer" ("{kind}")', "there is an optimizer in code too", "remove one of them")
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    offloaded = offload.get("device", "none") not in ("none", None)
    if offloaded and client_optimizer and config.get("zero_force_ds_cpu_optimizer", True):
        refuse(
            "zero_force_ds_cpu_optimizer",
            "with offload_optimizer only CPUAdam would be accepted, and accelerate replaces MARS "
            "by it",
            "set it to false",
        )
    if zero.get("round_robin_gradients"):
        refuse(
            "zero_optimization.round_robin_gradients",
            "under ZeRO 1 and 2 DeepSpeed then stores parameters in another order than it says "
            "which is where",
            "set it to false",
        )
    if offload.get("ratio", 1.0) != 1.0:
        refuse(
            f"offload_optimizer.ratio = {offload['ratio']}",
            "DeepSpeed updates the other part by its own AdamW",
            "set it to 1.0",
        )
    for name in ("zenflow", "super_offload"):
        if zero.get(name) or offload.get(name):
            refuse(name, "it calls DeepSpeed's CPUAdam instead of the optimizer", "remove it")
    for section in ("bf16", "fp16"):
        for name in (f"{section}_master_weights_and_grads", f"{section}_optimizer_states"):
            if config.get(section, {}).get(name):
                refuse(
                    f"{section}.{name}",
                    "it keeps 16-bit masters for CPUAdam, MARS needs float32 ones",
                    "set it to false",
                )
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", torch.float16):
        refuse(
            "torch_autocast.dtype = float16",
            "its GradScaler skips a step on the rank that overflowed only, and the others would "
            "wait for it for ever",
            "use bfloat16, or DeepSpeed's own fp16",
        )


def unwrap(engine: Any) -> MARS:
    """The MARS inside a DeepSpeed engine.

    Raises:
        ValueError: the engine trains with something else.
    """
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, MARS):
        raise ValueError(f"the engine's optimizer is {type(optimizer).__name__}, not MARS")
    return optimizer


def take_moments(engine: Any) -> None:
    """Exact mode's first half under a DeepSpeed engine (see `MARS.moments`).

    After `engine.backward` of the last micro-batch; `engine.step()` makes the other half. The
    engine's counters and schedule stay where they are.

    Raises:
        ValueError: the engine's optimizer is not MARS.
        RuntimeError: MARS is not in exact mode, or `engine.step()` has not made the update of the
            moments before. After an overflow, which skips it, that update is lost with a warning.
    """
    optimizer = unwrap(engine)
    if optimizer.pending and not getattr(engine.optimizer, "overflow", False):
        raise RuntimeError(
            "exact mode: take_moments was called again while its update is still to be made; call "
            "engine.step() in between, after the backward pass of the next batch"
        )
    with optimizer.moments():
        if engine.optimizer is optimizer and engine.gradient_clipping() > 0:
            engine.clip_fp32_gradients()  # no ZeRO, no masters: the engine clips, not a wrapper
        engine.optimizer.step()
    engine.optimizer.zero_grad()
