"""MARS in transformers' Trainer and in the trainers of TRL, which descend from it.

trainer = attach_mars(DPOTrainer(...))  # any of them
Trainer(..., optimizer_cls_and_kwargs=(MARSFactory, {"lr": 3e-4}))  # where it is taken
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from sparring.optimizers.deepspeed import check_config, register_deepspeed, take_moments, unwrap
from sparring.optimizers.groups import mars_groups
from sparring.optimizers.layouts import FSDP1
from sparring.optimizers.mars import MARS
from sparring.optimizers.replay import Replay

__all__ = ["MARSFactory", "attach_mars", "mars_groups"]


def _build(
    model: nn.Module, *, weight_decay: float = 0.0, weight_decay_1d: float = 0.0, **settings: Any
) -> MARS:
    groups = mars_groups(model, weight_decay=weight_decay, weight_decay_1d=weight_decay_1d)
    return MARS(groups, weight_decay=weight_decay, weight_decay_1d=weight_decay_1d, **settings)


class MARSFactory:
    """For `Trainer(optimizer_cls_and_kwargs=(MARSFactory, {...}))`.

    The dictionary holds the arguments of `MARS`, with `weight_decay` and `weight_decay_1d` as in
    `mars_groups`. Trainer adds nothing to it: `lr` and `weight_decay` of `TrainingArguments` do not
    count, `lr` is MARS's 3e-3 unless it is in there. `attach_mars` takes them over, and checks
    more.
    """

    def __call__(self, model: nn.Module, **settings: Any) -> MARS:
        """Build MARS on a model's trainable parameters.

        Raises:
            ValueError: an argument out of range, or exact mode.
        """
        if settings.get("exact"):
            raise ValueError(
                "exact=True needs every batch twice, which Trainer does not do by itself: use "
                "attach_mars(trainer, exact=True)"
            )
        return _build(model, **settings)


# Trainers.


def attach_mars(trainer: Any, **settings: Any) -> Any:
    """Make a constructed Trainer, or a trainer of TRL, train with MARS.

    Call it before `train`. Under DeepSpeed MARS is registered, and accelerate's silent exchange of
    optimizers by CPUAdam is stopped (`register_deepspeed`).

    With `exact=True` every batch is run twice, so that both gradients are of one function: its
    micro-batches are kept and run again with the same dropout masks, the same clipping and the same
    accumulation, and neither losses nor tokens are counted twice. Then the weights lag one update
    behind until the last step, in evaluations and checkpoints too, where the optimizer's state has
    what is missing: training resumed from a checkpoint continues exactly. The loss and the gradient
    norm in the logs are those of the first run. Time doubles, memory does not.

    Args:
        trainer: `transformers.Trainer` or a descendant.
        settings: arguments of `MARS`, with `weight_decay` and `weight_decay_1d` as in
            `mars_groups`. Without `lr` and `weight_decay`, `learning_rate` and `weight_decay` of
            `trainer.args` hold when training begins; adam_beta1, adam_beta2 and adam_epsilon do
            not, because they are AdamW's.

    Returns:
        The trainer.

    Raises:
        ValueError: the trainer has an optimizer, a sharding or an offload under which MARS would
            not be what runs, or an argument is out of range. The trainer is as it was then.
    """
    exact = bool(settings.get("exact"))
    _refuse_other_optimizers(trainer)
    _refuse_shardings(trainer)
    if exact:
        _refuse_exact(trainer)
    args = trainer.args

    def build(model: nn.Module, **given: Any) -> MARS:
        # Read as late as this, so that a search over TrainingArguments sees its own values.
        own = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
        return _build(model, **{**own, **given})

    build(nn.Linear(1, 1), **settings)  # arguments out of range are refused here and now
    if trainer.is_deepspeed_enabled:
        register_deepspeed()
    trainer.optimizer_cls_and_kwargs = (lambda: build, settings)
    trainer.add_callback(_Exact(trainer) if exact else _Proof(trainer))
    return trainer


def _refuse_other_optimizers(trainer: Any) -> None:
    if trainer.optimizer is not None:
        raise ValueError(
            f"the trainer already has an optimizer, {type(trainer.optimizer).__name__}: construct "
            "it without `optimizers`, and call attach_mars before train()"
        )
    if trainer.optimizer_cls_and_kwargs is not None:
        chosen = trainer.optimizer_cls_and_kwargs[0]
        raise ValueError(
            "the trainer already has optimizer_cls_and_kwargs, with "
            f"{getattr(chosen, '__name__', chosen)}: use either that argument or attach_mars"
        )


def _refuse_shardings(trainer: Any) -> None:
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        check_config(state.deepspeed_plugin.deepspeed_config, client_optimizer=True)
    elif trainer.is_fsdp_enabled:
        version = getattr(state.fsdp_plugin, "fsdp_version", 1)
        if version != 2:
            raise ValueError(f"fsdp_version = {version}: {FSDP1}")


def _makes_batches(kind: type) -> str:
    """The method in which a trainer makes its batches; "" if they come from its dataset."""
    if kind._prepare_inputs is not Trainer._prepare_inputs:  # type: ignore[attr-defined]
        return "_prepare_inputs"
    for base in itertools.takewhile(lambda base: base is not Trainer, kind.__mro__):
        step = vars(base).get("training_step")
        # TRL's SFT and DPO only put a context around it; GKD and OnlineDPO generate there.
        with contextlib.suppress(OSError, TypeError):  # no source to be read
            if step and "generat" in inspect.getsource(inspect.unwrap(step)).lower():
                return f"{base.__name__}.training_step"
    return ""


def _refuse_exact(trainer: Any) -> None:
    if where := _makes_batches(type(trainer)):
        raise ValueError(
            f"exact=True needs every batch twice, but {type(trainer).__name__} makes its batches "
            f"while it trains ({where}), so that the second run would see another batch; "
            "use exact=False"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"exact=True cannot repeat the dropout of {trainer.args.n_gpu} GPUs in one process "
            "(DataParallel): start a process a GPU with torchrun, accelerate or deepspeed"
        )
    if trainer.is_deepspeed_enabled:
        config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
        if "scheduler" in config:
            kind = config["scheduler"].get("type")
            raise ValueError(
                f'"scheduler" ("{kind}") in the DeepSpeed configuration steps between the two runs '
                "of a batch in exact mode: remove it and set lr_scheduler_type"
            )


class _Proof(TrainerCallback):  # type: ignore[misc]
    """Refuses to train when something put another optimizer in MARS's place."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def unwrapped(self) -> MARS:
        """The trainer's optimizer without its wrappers.

        Raises:
            ValueError: it is not MARS.
        """
        if self.trainer.is_deepspeed_enabled:
            return unwrap(self.trainer.deepspeed)
        optimizer = self.trainer.optimizer
        while not isinstance(optimizer, MARS) and hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # accelerate's
        if not isinstance(optimizer, MARS):
            raise ValueError(
                f"the trainer trains with {type(optimizer).__name__} although MARS was attached: "
                f"{type(self.trainer).__name__}.create_optimizer must leave the choice to Trainer"
            )
        return optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.unwrapped()


class _Exact(_Proof):
    """Runs every batch a second time, at the weights that its first run has led to.

    Trainer's own step is the half that keeps h and makes the pending update, and the second run
    gives the moments (`MARS.moments`).
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._batch = Replay(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        super().on_train_begin(args, state, control)
        self._batch.clear()  # an attempt before may have ended within a batch

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The second run of a batch, and the moments from it."""
        trainer, model = self.trainer, self._batch.model
        self._batch.complete()
        if trainer.is_deepspeed_enabled:
            engine = trainer.deepspeed
            with self._engine_step(lambda: take_moments(engine)):
                self._batch.run()
            return
        model.zero_grad()
        self._batch.run()
        if args.max_grad_norm > 0:
            trainer._clip_grad_norm(model)
        with self.unwrapped().moments():
            trainer.optimizer.step()
        model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last update, in time for the last evaluation and checkpoint."""
        if state.global_step >= state.max_steps:
            self._last_update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last update of a training that stopped early, unless other weights were loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.unwrapped().drop_pending()  # it belongs to the weights that are gone
        else:
            self._last_update()
        self._batch.clear()

    def _last_update(self) -> None:
        mars = self.unwrapped()
        if not mars.pending:
            return
        if not self.trainer.is_deepspeed_enabled:
            mars.zero_grad()
            mars.step()
            return
        engine = self.trainer.deepspeed

        def update() -> None:
            engine.optimizer.step()
            engine.optimizer.zero_grad()

        # ZeRO makes no step without gradients; those of the batch before will do.
        with self._engine_step(update):
            self._batch.run()

    @contextlib.contextmanager
    def _engine_step(self, instead: Callable[[], None]) -> Iterator[None]:
        """accelerate calls `engine.step` within `backward`; let it call something else."""
        engine = self.trainer.deepspeed
        engine.step = instead
        try:
            yield
        finally:
            del engine.step
