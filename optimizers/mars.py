"""MARS: variance reduction by a scaled, clipped correction of the gradient, in front of AdamW,
Lion or Shampoo (arXiv 2411.10438, Algorithm 1).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sparring.optimizers import updates
from sparring.optimizers.batches import gather
from sparring.optimizers.exact import ExactMode, is_pending
from sparring.optimizers.kernel import NormCache
from sparring.optimizers.layouts import refuse_split
from sparring.optimizers.originals import Originals
from sparring.optimizers.orthogonal import MatrixExchange
from sparring.optimizers.rules import Variant, check_settings

logger = logging.getLogger(__name__)


class MARS(Optimizer):
    r"""MARS on AdamW, Lion or Shampoo, exact under ZeRO and FSDP2.

    With g the gradient and h `last_grad`, for every parameter on its own:

        c = g + kappa (g - h),  kappa = gamma beta1 / (1 - beta1);   c <- c / max(1, |c|_2)
        m = beta1 m + (1 - beta1) c
        adamw    v = beta2 v + (1 - beta2) c^2;  x -= lr (m^ / (sqrt(v^) + eps) + weight_decay x)
        lion     x -= lr (sign(m) + weight_decay x)
        shampoo  x -= lr (sqrt(max(1, rows / columns)) O(m) + weight_decay x), O(m) = U V^T

    h is the gradient of the step before (approximate, the default), or the gradient of the present
    batch at the previous weights (`exact=True`, two gradients a step, see `moments`). `last_grad`
    starts at zero, as in the authors' code: the first step has c = (1 + kappa) g. Clip the global
    norm to 1 before `step`, as the paper does; the clip above is a second one, a parameter a time.

    Parameters with two dimensions are matrices and get MARS; all others are vectors and get AdamW
    with the `_1d` settings, unless `optimize_1d`. Embeddings are matrices, but under "shampoo" they
    are updated like vectors. They are told by their names, so pass `model.named_parameters()`, or
    put `kind="matrix" | "vector" | "embedding"` into a parameter group to decide yourself
    (`kind="matrix"` makes a convolution MARS). Kinds come from the parameters given here, never
    from the shape of a shard.

    All arguments but `params` are defaults of parameter groups, and may differ between groups.

    Args:
        params: parameters, named parameters or groups, as of any torch optimizer.
        lr: learning rate, a float or a tensor. For pre-training ten times AdamW's, with a tenth of
            its weight decay (paper, table of settings); for fine-tuning search below that.
        betas: decay of m and of v.
        eps: added to sqrt(v^).
        weight_decay: decoupled.
        gamma: strength of the correction, 0 for none.
        variant: "adamw", "lion" or "shampoo".
        exact: previous weights' gradient on the present batch, by the protocol of `moments`.
        optimize_1d: MARS for vectors too, with the matrices' lr, betas and weight decay; under
            "shampoo" they get MARS-AdamW.
        lr_1d: learning rate of AdamW on vectors, lr / 2 if None. Kept as a ratio to lr
            (`lr_1d_factor` in the group), so that it follows whatever changes the group's lr.
        betas_1d: decays of AdamW on vectors.
        weight_decay_1d: weight decay of AdamW on vectors, the group's `weight_decay` if None.
        amsgrad: the largest v so far in the denominator (adamw).
        clip_c: scale c to a norm of at most 1, a parameter a time.
        shampoo_embeddings: orthogonalise embeddings too, as the authors' code does.
        orthogonaliser: "newton-schulz" or "svd".
        ns_steps: Newton-Schulz steps.
        maximize: go up instead of down.
        foreach: multi-tensor operations; None chooses them.
        fused: torch's fused AdamW kernel behind the correction. None takes it on a CPU; on a GPU
            it needs True.
        capturable: steps on the device, for CUDA graphs.

    Raises:
        ValueError: an argument out of range, a parameter twice, or one that FSDP1 or tensor
            parallelism has split. The first step raises it when no tensor gets MARS.

    State of a parameter, float32 even where the parameter has 16 bits: `exp_avg`, `exp_avg_sq`
    (AdamW rules), `last_grad` (MARS rules), `max_exp_avg_sq` (amsgrad), `step`; in exact mode also
    `pending_lr`, the learning rate of an update that is still to be made.
    """

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands over `grad_scale` and `found_inf` instead of skipping a step.

        Exact mode must know of a skipped update, and under ZeRO a scaler is refused. Else it is
        GradScaler's: wrappers then see that a step was skipped, and Lightning clips gradients.
        """
        groups = self.param_groups
        tensors = [tensor for group in groups for tensor in group["params"]]
        return any(group["exact"] for group in groups) or self._originals.replaced(tensors)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gamma: float = 0.025,
        variant: Variant = "adamw",
        exact: bool = False,
        optimize_1d: bool = False,
        lr_1d: float | None = None,
        betas_1d: tuple[float, float] = (0.9, 0.95),
        weight_decay_1d: float | None = None,
        amsgrad: bool = False,
        clip_c: bool = True,
        shampoo_embeddings: bool = False,
        orthogonaliser: str = "newton-schulz",
        ns_steps: int = 5,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gamma": gamma,
            "variant": variant,
            "exact": exact,
            "optimize_1d": optimize_1d,
            "lr_1d": lr_1d,
            "betas_1d": betas_1d,
            "weight_decay_1d": weight_decay_1d,
            "amsgrad": amsgrad,
            "clip_c": clip_c,
            "shampoo_embeddings": shampoo_embeddings,
            "orthogonaliser": orthogonaliser,
            "ns_steps": ns_steps,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "kind": None,
        }
        check_settings(defaults)
        self._begin()
        super().__init__(params, defaults)
        # Not only where accelerate was imported before: it may be imported later.
        from sparring.optimizers.deepspeed import guard_accelerate

        guard_accelerate()

    def _begin(self) -> None:
        """Everything that is not saved."""
        self._originals = Originals()
        self._exact = ExactMode()
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}
        self._norm_cache = NormCache()
        self._announced = False
        self.updates: Counter[str] = Counter()
        """How many parameters each rule has updated on this rank, in parts or whole, since
        construction: the proof that the MARS path ran."""

    # The optimizer's contract.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; settings that it lacks are the optimizer's defaults.

        Raises:
            ValueError: an argument out of range, or a parameter that is already here, or that FSDP1
                or tensor parallelism has split. Nothing is changed then.
        """
        settings = {**self.defaults, **param_group}
        factor = check_settings(settings)
        if self.param_groups and settings["exact"] != self.param_groups[0]["exact"]:
            raise ValueError("MARS: all groups are exact, or none is")
        given = param_group["params"]
        if not isinstance(given, set):  # torch refuses it, for it has no order
            param_group["params"] = given = [given] if isinstance(given, Tensor) else list(given)
            self._check_parameters([x[1] if isinstance(x, tuple) else x for x in given])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr_1d_factor"] = factor
        del group["lr_1d"]
        self._originals.describe(group)

    def _check_parameters(self, tensors: list[Tensor]) -> None:
        counts = Counter(tensor for group in self.param_groups for tensor in group["params"])
        counts.update(tensors)
        twice = [tensor for tensor, count in counts.items() if count > 1]
        if twice:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in twice)
            raise ValueError(
                f"MARS: parameters of shape {shapes} are given more than once, in one group or in "
                "two; tied weights are one parameter (model.parameters() gives them once)"
            )
        for tensor in tensors:
            refuse_split(tensor)

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = not hasattr(self, "_originals")  # unpickled or copied
        before = [] if fresh else self.param_groups
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "lr_1d":
                    group.setdefault(name, default)
            group.setdefault("lr_1d_factor", 0.5)
        if fresh:
            self._begin()
            for group in self.param_groups:
                self._originals.describe(group)
        else:
            self._originals.relink(before, self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, bit for bit.

        Raises:
            ValueError: it is of another variant or mode, or of other groups; nothing is changed
                then.
        """
        groups = state_dict["param_groups"]
        for mine, other in zip(self.param_groups, groups, strict=False):
            self._check_origin(mine, other)
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's type: bfloat16 would lose float32's bits.
        order = [index for group in groups for index in group["params"]]
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        for index, tensor in zip(order, tensors, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                held = self.state[tensor].get(name)
                if isinstance(value, Tensor) and isinstance(held, Tensor):
                    if held.dtype != value.dtype:
                        held = value.to(device=held.device, copy=True)
                        self.state[tensor][name] = held
                    elif held.data_ptr() == value.data_ptr():
                        self.state[tensor][name] = value.clone()
        self._exact.restart()
        self._norm_cache = NormCache()  # it holds on to the tensors that were replaced

    @staticmethod
    def _check_origin(mine: dict[str, Any], other: dict[str, Any]) -> None:
        """Refuse a group of a state that does not go on here."""
        for name, label in (("variant", "MARS-{}"), ("exact", "MARS with exact={}")):
            found, expected = other.get(name), mine[name]
            if found != expected:
                what = "another optimizer" if found is None else label.format(found)
                raise ValueError(
                    f"the state is of {what}, this is {label.format(expected)}: build the "
                    f"optimizer with {name}={found!r}, or start with a new state"
                )

    # Exact mode.

    def moments(self) -> AbstractContextManager[None]:
        """Steps inside take in the gradient and leave the weights alone: exact mode's first half.

        A batch needs two gradients, at the weights before its update and at those before the one
        before. Both belong to the present batch:

            for batch in batches:
                loss(batch).backward()        # at the previous weights
                optimizer.step()              # keeps it as last_grad; makes the pending update
                optimizer.zero_grad()
                loss(batch).backward()        # at the present weights
                with optimizer.moments():
                    optimizer.step()          # corrected gradient, m and v
                optimizer.zero_grad()
            optimizer.step()                  # the last update, without gradients

        Clip before both steps. A batch is sampled once and dropout must repeat its mask, or the
        two gradients are of two functions. With DeepSpeed the inner step is
        `engine.optimizer.step()`, which leaves the engine's counters and the schedule alone
        (`sparring.optimizers.deepspeed.take_moments`); a last update there needs a gradient of any
        batch. The update uses the learning rate that its moments saw. One buffer more than AdamW,
        as in approximate mode.

        An update that is due when moments are taken again is an error, unless a GradScaler's or
        DeepSpeed's overflow has skipped it: it is then lost, with a warning.

        Raises:
            RuntimeError: the optimizer is not in exact mode.
        """
        if not all(group["exact"] for group in self.param_groups):
            raise RuntimeError("moments() is for exact mode: build MARS with exact=True")
        return self._exact.moments()

    @property
    def pending(self) -> bool:
        """Whether exact mode has moments whose update is still to be made."""
        return any(is_pending(state) for state in self.state.values())

    def drop_pending(self) -> None:
        """Forget that update, because other weights were loaded."""
        self._exact.drop_pending(self.state)

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update, or in exact mode one half of it (`moments`).

        Args:
            closure: computes the loss again, with gradients; its value is returned.

        Raises:
            RuntimeError: a sparse gradient, or exact mode without its protocol.
            ValueError: a sharding that MARS does not know, or nothing that it could work on.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._announce()
        if self._amp_says_skip():
            self._exact.skip()
            return loss
        parts = gather(self.param_groups, self.state, self._originals, self._exact)
        exact = any(part.group["exact"] for part in parts)
        applying = not self._exact.in_moments
        taking = not (exact and applying)
        batches = [batch for part in parts for batch in part.batches]
        whole_step = taking and applying
        for batch in batches:
            batch.kernel = updates.kernel_for(batch) if whole_step else None
        if taking:
            updates.correct(parts)
        for part in parts:
            for batch in part.batches:
                if batch.kernel:
                    updates.kernel_step(batch, self._norm_cache)
                    continue
                if whole_step and updates.can_fuse(batch):
                    updates.fused_adamw(batch)
                    continue
                if taking:
                    updates.take_in(batch)
                if applying and batch.rule != "MARS-Shampoo":
                    updates.apply(batch)
            if applying:
                updates.apply_shampoo(part, self._originals.listed, self._exchanges)
        for batch in batches:
            if applying and not batch.kernel and batch.last_grads and batch.grads:
                torch._foreach_copy_(batch.last_grads, batch.grads)
            for parameter, copy in batch.low_precision:
                parameter.copy_(copy)
            if applying and not torch.compiler.is_compiling():
                self.updates[batch.rule] += len(batch.params)
        return loss

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _announce(self) -> bool:
        """Say once what is updated how, and refuse a MARS that would be AdamW.

        A compiler, which cannot trace a log, calls it as it is.
        """
        if not self._announced:
            found = self._originals.summary()
            self._announced = True
            if not dist.is_initialized() or dist.get_rank() == 0:
                logger.info("MARS: %s", found)
        return True

    def _amp_says_skip(self) -> bool:
        """Whether GradScaler found an overflow; gradients are unscaled if they were not."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if self._originals.replaced(tensors):
            raise ValueError(
                "float16 torch_autocast under ZeRO is refused: a GradScaler skips the step on the "
                "rank that overflowed only, and the others would wait for it for ever; use "
                "bfloat16, or DeepSpeed's own fp16, which agrees on overflows"
            )
        if found_inf.item():
            return True
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
            torch._foreach_div_(grads, scale)
        return False
