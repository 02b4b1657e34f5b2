"""MARS: variance reduction by a scaled, clipped correction of the gradient, in front of AdamW,
Lion or Shampoo (arXiv 2411.10438, Algorithm 1).
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sparring.optimizers import updates
from sparring.optimizers.batches import Batch, Part
from sparring.optimizers.kernel import NormCache
from sparring.optimizers.layouts import (
    KINDS,
    Layout,
    Original,
    describe,
    is_dtensor,
    local,
    resolve,
    whole,
)
from sparring.optimizers.orthogonal import MatrixExchange
from sparring.optimizers.rules import Rule, Variant, check_settings, rule_of, settings_of

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
        ValueError: an argument out of range, a parameter twice, or no tensor that gets MARS.

    State of a parameter, float32 even where the parameter has 16 bits: `exp_avg`, `exp_avg_sq`
    (AdamW rules), `last_grad` (MARS rules), `max_exp_avg_sq` (amsgrad), `step`; in exact mode also
    `pending_lr`, the learning rate of an update that is still to be made.
    """

    # GradScaler then hands over `grad_scale` and `found_inf` instead of deciding by itself.
    _step_supports_amp_scaling = True

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
        if "accelerate" in sys.modules:
            from sparring.optimizers.deepspeed import guard_accelerate

            guard_accelerate()

    def _begin(self) -> None:
        """Everything that is not saved."""
        self._originals: list[Original] = []
        self._rules: list[Rule] = []
        self._trivial: list[Layout] = []
        self._spans: dict[int, range] = {}
        """The originals of a group, by the id of its dictionary."""
        self._layouts: dict[Tensor, Layout] = {}
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}
        self._norm_cache = NormCache()
        self._in_moments = False
        self._moments_entered = 0
        self._stepped_at: dict[Tensor, int] = {}
        self._announced = False
        self.updates: Counter[str] = Counter()
        """How many parameters each rule has updated on this rank, in parts or whole, since
        construction: the proof that the MARS path ran."""

    # The optimizer's contract.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; settings that it lacks are the optimizer's defaults.

        Raises:
            ValueError: an argument out of range, or a parameter that is already here or is sparse.
        """
        settings = {**self.defaults, **param_group}
        factor = check_settings(settings)
        if self.param_groups and settings["exact"] != self.param_groups[0]["exact"]:
            raise ValueError("MARS: all groups are exact, or none is")
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = given = list(param_group["params"])
            tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in given]
            twice = [t for t, count in Counter(tensors).items() if count > 1]
            if twice:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in twice)
                raise ValueError(
                    f"MARS: parameters of shape {shapes} stand in a group more than once; tied "
                    "weights are one parameter (model.parameters() gives them once)"
                )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr_1d_factor"] = factor
        del group["lr_1d"]
        self._describe(group)

    def _describe(self, group: dict[str, Any]) -> None:
        names = group.get("param_names") or [""] * len(group["params"])
        # By identity: DeepSpeed hands over one group at a time, and its universal checkpoints write
        # the first group's settings into all of them.
        start = len(self._originals)
        self._spans[id(group)] = range(start, start + len(group["params"]))
        for parameter, name in zip(group["params"], names, strict=True):
            original = describe(parameter, name, kind=group["kind"])
            self._trivial.append(whole(len(self._originals), parameter))
            self._originals.append(original)
            self._rules.append(rule_of(original.kind, group))

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = not hasattr(self, "_originals")  # unpickled or copied
        spans = [] if fresh else [self._spans[id(group)] for group in self.param_groups]
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                if name != "lr_1d":
                    group.setdefault(name, default)
            group.setdefault("lr_1d_factor", 0.5)
        if fresh:
            self._begin()
            for group in self.param_groups:
                self._describe(group)
        else:  # loading a state puts new dictionaries in the groups' places
            self._spans = {
                id(group): span for group, span in zip(self.param_groups, spans, strict=True)
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, bit for bit.

        Raises:
            ValueError: it is of another variant, or of other groups; nothing is changed then.
        """
        groups = state_dict["param_groups"]
        for mine, other in zip(self.param_groups, groups, strict=False):
            found = other.get("variant")
            if found != mine["variant"]:
                what = "of another optimizer" if found is None else f"of MARS-{found}"
                raise ValueError(
                    f"the state is {what}, this is MARS-{mine['variant']}: build the optimizer "
                    f"with variant={found!r}, or start with a new state"
                )
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
        self._stepped_at.clear()
        self._norm_cache = NormCache()  # it holds on to the tensors that were replaced

    # Exact mode.

    @contextmanager
    def moments(self) -> Iterator[None]:
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

        Raises:
            RuntimeError: the optimizer is not in exact mode.
        """
        if not all(group["exact"] for group in self.param_groups):
            raise RuntimeError("moments() is for exact mode: build MARS with exact=True")
        self._moments_entered += 1
        self._in_moments = True
        try:
            yield
        finally:
            self._in_moments = False

    @property
    def pending(self) -> bool:
        """Whether exact mode has moments whose update is still to be made."""
        return any(state.get("pending_lr") is not None for state in self.state.values())

    def drop_pending(self) -> None:
        """Forget that update, because other weights were loaded."""
        for state in self.state.values():
            state["pending_lr"] = None

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
        if not torch.compiler.is_compiling():
            self._announce()
        if self._amp_says_skip():
            return loss
        parts = self._gather()
        exact = any(part.group["exact"] for part in parts)
        taking, applying = not exact or self._in_moments, not self._in_moments
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
                updates.apply_shampoo(part, self._originals, self._exchanges)
        for batch in batches:
            if applying and not batch.kernel and batch.last_grads and batch.grads:
                torch._foreach_copy_(batch.last_grads, batch.grads)
            for parameter, copy in batch.low_precision:
                parameter.copy_(copy)
            if applying and not torch.compiler.is_compiling():
                self.updates[batch.rule] += len(batch.params)
        return loss

    def _announce(self) -> None:
        """Say once what is updated how, and refuse a MARS that would be AdamW."""
        if self._announced:
            return
        self._announced = True
        plural = {"matrix": "matrices", "vector": "vectors", "embedding": "embeddings"}
        counts = Counter(zip((o.kind for o in self._originals), self._rules, strict=True))
        found = ", ".join(
            f"{counts[kind, rule]} {plural[kind]} {rule}"
            for kind in KINDS
            for rule in sorted({r for k, r in counts if k == kind})
        )
        if all(rule == "AdamW" for rule in self._rules):
            raise ValueError(
                f"no tensor gets MARS ({found or 'no parameters'}): give it two-dimensional "
                'parameters, optimize_1d=True, or kind="matrix" in a group'
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.info("MARS: %s", found)

    def _amp_says_skip(self) -> bool:
        """Whether GradScaler found an overflow; gradients are unscaled if they were not."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            return False
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if any(not is_dtensor(t) and not self._is_original(t) for t in tensors):
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

    def _is_original(self, tensor: Tensor) -> bool:
        return any(original.parameter is tensor for original in self._originals)

    # From tensors to batches.

    def _gather(self) -> list[Part]:
        """Everything that this call updates, with steps counted and state made."""
        parts = []
        for group in self.param_groups:
            part = self._part(group)
            if part.layouts:
                parts.append(part)
        return parts

    def _part(self, group: dict[str, Any]) -> Part:
        part = Part(group)
        batches: dict[Any, Batch] = {}
        for position, tensor in enumerate(group["params"]):
            grad = tensor.grad
            state = self.state[tensor]
            due = group["exact"] and not self._in_moments
            if grad is None and not (due and state.get("pending_lr") is not None):
                continue
            if grad is not None and grad.is_sparse:
                raise RuntimeError("MARS does not support sparse gradients; use dense embeddings")
            layout = self._layout(tensor, position, group)
            if self._in_moments and state.get("pending_lr") is not None:
                # The update was skipped (an fp16 overflow): h was not taken, and memory holds c.
                state.pop("last_grad", None)
            self._prepare_state(tensor, layout, group)
            if layout.cloned and state["step"] == 0 and not torch.any(tensor.grad):
                continue  # DeepSpeed without ZeRO makes a step of zeros, to have the state made
            lr = group["lr"]
            if due:
                lr = self._settle_exact(tensor, group)
                if lr is None:
                    continue
            else:
                if group["capturable"] or torch.compiler.is_compiling():
                    state["step"] += 1  # the same memory, for graphs
                else:  # tensors may share it: DeepSpeed loads universal checkpoints so
                    state["step"] = state["step"] + 1
                if group["exact"]:
                    state["pending_lr"] = lr.clone() if isinstance(lr, Tensor) else lr
            part.layouts.append(layout)
            for number, segment in enumerate(layout.segments):
                rule = rule_of(self._originals[segment.index].kind, group)
                key: tuple[Any, ...] = (
                    rule,
                    tensor.dtype,
                    tensor.device,
                    grad is None,
                    lr if due else None,
                )
                if group["foreach"] is False:
                    key = (*key, position, number)
                if key not in batches:
                    batches[key] = Batch(rule, group, settings_of(rule, group, lr))
                batches[key].add(tensor, state, layout, segment)
        part.batches = list(batches.values())
        return part

    def _layout(self, tensor: Tensor, position: int, group: dict[str, Any]) -> Layout:
        span = self._spans[id(group)]
        if position < len(span):
            index = span[position]
            if self._originals[index].parameter is tensor and not is_dtensor(tensor):
                return self._trivial[index]
        if tensor not in self._layouts:
            candidates = [(index, self._originals[index]) for index in span]
            self._layouts[tensor] = resolve(tensor, position, candidates)
        return self._layouts[tensor]

    def _prepare_state(self, tensor: Tensor, layout: Layout, group: dict[str, Any]) -> None:
        state = self.state[tensor]
        if layout.whole:
            rules = {rule_of(self._originals[layout.members[0]].kind, group)}
        else:  # the same keys on all ranks and in all groups, whatever they hold
            rules = {rule_of("matrix", group), rule_of("vector", group)}
        names = ["exp_avg"]
        if rules & {"AdamW", "MARS-AdamW"}:
            names.append("exp_avg_sq")
            if group["amsgrad"]:
                names.append("max_exp_avg_sq")
        fresh = "exp_avg" not in state
        if "step" not in state:
            on_device = group["capturable"] or group["fused"]
            device = local(tensor).device if on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        elif not isinstance(state["step"], Tensor):
            state["step"] = torch.tensor(float(state["step"]), dtype=torch.float32)
        dtype = _state_dtype(tensor)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(tensor, dtype=dtype)
        if rules != {"AdamW"} and "last_grad" not in state:
            # A state that others wrote (a universal checkpoint) has none: c = g once.
            state["last_grad"] = torch.zeros_like(tensor, dtype=dtype)
            if not fresh and tensor.grad is not None:
                state["last_grad"].copy_(-tensor.grad if group["maximize"] else tensor.grad)

    def _settle_exact(self, tensor: Tensor, group: dict[str, Any]) -> float | Tensor | None:
        """In exact mode, outside `moments`: the learning rate of the update to make, if any."""
        state = self.state[tensor]
        if self._stepped_at.get(tensor) == self._moments_entered:
            raise RuntimeError(
                "exact mode takes two gradients a batch: between two calls of step(), call it once "
                "`with optimizer.moments():` (see MARS.moments)"
            )
        self._stepped_at[tensor] = self._moments_entered
        lr: float | Tensor | None = state.get("pending_lr")
        state["pending_lr"] = None
        if tensor.grad is None:
            state.pop("last_grad", None)  # not known for the next batch
        elif lr is None and "last_grad" in state and state["step"] > 0:
            maximize = group["maximize"]
            state["last_grad"].copy_(-tensor.grad if maximize else tensor.grad)
        return lr


def _state_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
