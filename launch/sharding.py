"""A trainer's distributed side: accelerate with DeepSpeed ZeRO, or plain torch on one rank."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparring.launch import artifacts
from sparring.launch.ema import EMA
from sparring.launch.processes import World, free_port
from sparring.launch.training import TrainingConfig
from sparring.optimizers.deepspeed import register_deepspeed, take_moments

# While rank 0 merges and writes the weights of a large model the others wait for it; NCCL's own
# limit is ten minutes. A rank that dies is noticed by its launcher, not by this.
_PATIENCE = timedelta(hours=2)


def zero_stage(config: TrainingConfig, world: World) -> int | None:
    """ZeRO stage to use, or None for plain torch."""
    if config.zero >= 0:
        return config.zero
    return None if world.size == 1 else 2


class Sharding:
    """Prepares model and optimizer, and saves and restores them, whatever the ZeRO stage."""

    def __init__(self, config: TrainingConfig, world: World, *, micro_batches: int) -> None:
        on_cpu = not torch.cuda.is_available()
        if on_cpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it looked
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        self.stage = zero_stage(config, world)
        self.world, self.micro_batches = world, micro_batches
        options: dict[str, Any] = {"gradient_accumulation_steps": micro_batches}
        group: dict[str, Any] = {"timeout": _PATIENCE}
        if self.stage is None:
            options["cpu"] = on_cpu
        else:
            options["deepspeed_plugin"] = _plugin(config, self.stage, micro_batches, on_cpu)
            if on_cpu:
                # accelerate takes cpu=True for "no DeepSpeed", and without an accelerator and a
                # backend's name it counts one process, however many there are (1.15).
                group["backend"] = "gloo"
            options["kwargs_handlers"] = [InitProcessGroupKwargs(**group)]
        self._half = config.precision == "bfloat16"
        if self._half and self.stage is None:
            options["mixed_precision"] = "bf16"
        # A process has one state, of its first accelerator; stages of one process may differ.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(**options)
        # It warns of tied weights at every checkpoint, which load as they were saved.
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        self._clip = config.clip
        self._offload = config.offload
        self._ema_decay = config.ema
        self._ema: EMA | None = None
        self._model: nn.Module | None = None
        self._optimizer: Any = None

    @property
    def model(self) -> nn.Module:
        """What `prepare` returned."""
        assert self._model is not None
        return self._model

    @property
    def device(self) -> torch.device:
        return torch.device(self.accelerator.device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Shard model and optimizer; returns what to call."""
        self._model, self._optimizer = self.accelerator.prepare(model, optimizer)
        if self._ema_decay:
            self._ema = EMA(self.bare(), self._ema_decay)
        return self._model

    def bare(self) -> nn.Module:
        """The model without wrappers, whose parameters have the names it was given with."""
        assert self._model is not None
        return self.accelerator.unwrap_model(self._model)  # type: ignore[no-any-return]

    def autocast(self) -> AbstractContextManager[object]:
        """The number type of the prepared model's forward pass, for other models beside it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

    def set_lr(self, lr: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        if self.stage is None:
            self.accelerator.backward(loss)
            return
        # accelerate's backward would also step, and exact MARS has two kinds of steps.
        boundary = self.accelerator.sync_gradients
        self._engine.set_gradient_accumulation_boundary(is_boundary=boundary)
        self._engine.backward(loss)

    def step(self) -> float:
        """Clip and step after the last micro-batch; returns the gradient norm before clipping."""
        if self.stage is None:
            norm = self._clip_gradients()
            self._optimizer.step()
            self._optimizer.zero_grad()
        else:
            norm = self._engine_norm(self._engine.step)
        if self._ema:
            self._ema.update()
        return norm

    def take_moments(self) -> float:
        """MARS's exact mode: clip and take the gradient in, without an update of the weights."""
        if self.stage is None:
            norm = self._clip_gradients()
            with self._optimizer.optimizer.moments():
                self._optimizer.step()
            self._optimizer.zero_grad()
            return norm
        return self._engine_norm(lambda: take_moments(self._engine))

    @property
    def _engine(self) -> Any:
        return self._model

    def _clip_gradients(self) -> float:
        assert self._model is not None
        limit = self._clip or float("inf")
        return float(self.accelerator.clip_grad_norm_(self._model.parameters(), limit))

    def _engine_norm(self, step: Callable[[], None]) -> float:
        """Make a step; returns the norm of its gradient."""
        if self.stage == 0:  # DeepSpeed keeps none, and every rank has all gradients, averaged
            gradients = [p.grad for p in self.bare().parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            step()
            return float(norm)
        step()
        kept = self._engine.get_global_grad_norm()
        return float(kept) if kept is not None else float("nan")

    def sum(self, values: list[float]) -> list[float]:
        """Sum numbers over ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()  # type: ignore[no-any-return]

    # Checkpoints. A folder without `done` is half-written and is never loaded.

    def save(self, work: Path, step: int) -> None:
        """Write a checkpoint after `step` optimizer steps, then drop the one before."""
        folder = work / f"checkpoint-{step:07d}"
        self._clear(folder)
        self.accelerator.save_state(str(folder), safe_serialization=True)
        if self._ema:
            save_file(self._ema.state_dict(), self._ema_file(folder))
        self.accelerator.wait_for_everyone()
        if self.world.rank == 0:
            artifacts.write_json(folder / "done", {"step": step, **self._layout()})
            for other in work.glob("checkpoint-*"):
                if other != folder:
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def restore(self, work: Path) -> int:
        """Load the newest whole checkpoint of the same layout; returns its step, 0 if none."""
        for folder in sorted(work.glob("checkpoint-*"), reverse=True):
            if not (folder / "done").exists():
                continue
            facts = json.loads((folder / "done").read_text())
            # ZeRO's shards are bound to ranks and device: with others, start over.
            if {k: facts.get(k) for k in self._layout()} == self._layout():
                self.accelerator.load_state(str(folder))
                # It counts forward passes to know the last one of a step; of the checkpoint's
                # there may have been another number a step.
                self.accelerator.step = 0
                if self._ema:
                    self._ema.load_state_dict(load_file(self._ema_file(folder)))
                return int(facts["step"])
        return 0

    def _clear(self, folder: Path) -> None:
        """Remove what a run that was cut short left there: of more ranks, it has files too many."""
        if self.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _ema_file(self, folder: Path) -> Path:
        return folder / f"ema-{self.world.rank:05d}.safetensors"

    def _layout(self) -> dict[str, Any]:
        return {"ranks": self.world.size, "zero": self.stage, "offload": self._offload}

    def full_state(self, work: Path) -> dict[str, Tensor]:
        """All weights in float32 on rank 0 (nothing elsewhere): their average where there is one,
        else ZeRO's masters if any."""
        assert self._model is not None
        state = self._present_state(work)
        if self._ema:
            averaged = self._ema.full_state()
            if self.world.rank == 0:
                assert averaged.keys() <= state.keys(), "the average has names of its own"
                state |= averaged
        return state

    def _present_state(self, work: Path) -> dict[str, Tensor]:
        assert self._model is not None
        if self.stage is None or self.stage == 0:
            state = self.accelerator.get_state_dict(self._model)
            return {k: v.float().cpu() for k, v in state.items()} if self.world.rank == 0 else {}
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        folder = work / "final"
        self._clear(folder)
        self._model.save_checkpoint(str(folder))  # type: ignore[operator]
        self.accelerator.wait_for_everyone()
        if self.world.rank != 0:
            return {}
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))

    def close(self) -> None:
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def _plugin(config: TrainingConfig, stage: int, micro_batches: int, on_cpu: bool) -> Any:
    from accelerate import DeepSpeedPlugin

    register_deepspeed()
    # A single rank that asks for ZeRO was not started by a launcher.
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    if on_cpu:
        import deepspeed.ops

        # Compiling it takes minutes, and leaves a stale lock when killed; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    zero: dict[str, Any] = {"stage": stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    return DeepSpeedPlugin(
        hf_ds_config={
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # RMSprop
            "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": config.micro_batch,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": config.clip,
            # Not "bf16", which rounds the weights first and makes its float32 masters from that.
            "torch_autocast": {"enabled": config.precision == "bfloat16", "dtype": "bfloat16"},
            "steps_per_print": 2**31,
        },
        zero3_init_flag=stage == 3,
    )
