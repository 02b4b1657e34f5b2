"""MARS: variance reduction by a scaled, clipped correction of the gradient, in front of AdamW,
Lion or Shampoo (arXiv 2411.10438, Algorithm 1).
"""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sparring.optimizers.adamw import Settings, adamw_apply, adamw_moments
from sparring.optimizers.chunked import NormCache, chunked_mars_adamw
from sparring.optimizers.layouts import (
    KINDS,
    Kind,
    Layout,
    Original,
    Segment,
    describe,
    is_dtensor,
    local,
    resolve,
    whole,
)
from sparring.optimizers.orthogonal import (
    ORTHOGONALISERS,
    MatrixExchange,
    orthogonalise,
    segment_view,
)
from sparring.optimizers.recursive import correct_, correction_coefficient

logger = logging.getLogger(__name__)

Variant = Literal["adamw", "lion", "shampoo"]
VARIANTS: tuple[Variant, ...] = ("adamw", "lion", "shampoo")
Rule = Literal["AdamW", "MARS-AdamW", "MARS-Lion", "MARS-Shampoo"]


def rule_of(kind: Kind, group: dict[str, Any]) -> Rule:
    """How a parameter of a kind is updated in a group."""
    variant: Variant = group["variant"]
    if kind == "embedding" and variant == "shampoo" and not group["shampoo_embeddings"]:
        kind = "vector"  # a row an item is no linear map between spaces: its factor means little
    if kind == "vector":
        if not group["optimize_1d"]:
            return "AdamW"
        return "MARS-Lion" if variant == "lion" else "MARS-AdamW"
    rules: dict[Variant, Rule] = {
        "adamw": "MARS-AdamW",
        "lion": "MARS-Lion",
        "shampoo": "MARS-Shampoo",
    }
    return rules[variant]


@dataclass
class _Batch:
    """Tensors, or parts of tensors, that one rule updates with the same settings."""

    rule: Rule
    group: dict[str, Any]
    settings: Settings
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    last_grads: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    """The parameter behind each tensor, as a position among the originals."""
    layouts: list[Layout] = field(default_factory=list)
    low_precision: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Parameters of 16 bits with the float32 copies that stand in `params` for them."""

    def add(self, tensor: Tensor, state: dict[str, Any], layout: Layout, segment: Segment) -> None:
        """Put in what a segment of a tensor holds."""

        def part(whole: Tensor) -> Tensor:
            here = local(whole)
            return here if here.numel() == segment.numel else segment_view(here, segment)

        parameter = part(tensor)
        if state["exp_avg"].dtype != tensor.dtype:
            copy = parameter.to(state["exp_avg"].dtype)
            self.low_precision.append((parameter, copy))
            parameter = copy
        self.params.append(parameter)
        if tensor.grad is not None:
            grad = part(tensor.grad).to(state["exp_avg"].dtype)
            self.grads.append(-grad if self.group["maximize"] else grad)
        self.exp_avgs.append(part(state["exp_avg"]))
        if self.rule in ("AdamW", "MARS-AdamW"):
            self.exp_avg_sqs.append(part(state["exp_avg_sq"]))
            if self.group["amsgrad"]:
                self.max_exp_avg_sqs.append(part(state["max_exp_avg_sq"]))
        if self.rule != "AdamW" and "last_grad" in state:
            self.last_grads.append(part(state["last_grad"]))
        self.steps.append(state["step"])
        self.indices.append(segment.index)
        self.layouts.append(layout)


@dataclass
class _Part:
    """What a call updates of one parameter group."""

    group: dict[str, Any]
    layouts: list[Layout] = field(default_factory=list)
    batches: list[_Batch] = field(default_factory=list)


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
        fused: torch's fused AdamW kernel behind the correction; None takes it where it exists.
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
        _check(defaults)
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
        factor = _check(settings)
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
        if taking:
            self._correct(parts, leave_out=self._can_chunk if whole_step else None)
        for part in parts:
            for batch in part.batches:
                if whole_step and self._can_chunk(batch):
                    self._chunked(batch)
                    continue
                if whole_step and self._can_fuse(batch):
                    self._fused_adamw(batch)
                    continue
                if taking:
                    self._take_in(batch)
                if applying and batch.rule != "MARS-Shampoo":
                    self._apply(batch)
            if applying:
                self._apply_shampoo(part)
        for batch in batches:
            chunked = whole_step and self._can_chunk(batch)  # did this chunk by chunk
            if applying and not chunked and batch.last_grads and batch.grads:
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

    def _gather(self) -> list[_Part]:
        """Everything that this call updates, with steps counted and state made."""
        parts = []
        for group in self.param_groups:
            part = self._part(group)
            if part.layouts:
                parts.append(part)
        return parts

    def _part(self, group: dict[str, Any]) -> _Part:
        part = _Part(group)
        batches: dict[Any, _Batch] = {}
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
                lr = self._settle_exact(tensor)
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
                    batches[key] = _Batch(rule, group, _settings(rule, group, lr))
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

    def _settle_exact(self, tensor: Tensor) -> float | Tensor | None:
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
            state["last_grad"].copy_(tensor.grad)
        return lr

    # Correction, moments, update.

    def _correct(self, parts: Sequence[_Part], leave_out: Callable[[_Batch], bool] | None) -> None:
        """c, in the memory of `last_grad`, scaled to a norm of at most 1 a parameter."""
        clipped: list[_Batch] = []
        for part in parts:
            for batch in part.batches:
                if batch.rule == "AdamW" or (leave_out is not None and leave_out(batch)):
                    continue
                kappa = correction_coefficient(part.group["gamma"], batch.settings.beta1)
                correct_(batch.last_grads, batch.grads, kappa)
                if part.group["clip_c"]:
                    clipped.append(batch)
        layouts = [x for part in parts if part.group["clip_c"] for x in part.layouts]
        norms = self._norms(clipped, layouts)
        for batch in clipped:
            own = [norms[id(c)] for c in batch.last_grads]
            if batch.last_grads[0].device.type == "cpu" and not torch.compiler.is_compiling():
                for c, norm in zip(batch.last_grads, own, strict=True):
                    if norm > 1:  # rare after the first steps, and a pass over memory
                        c.div_(norm)
            else:
                torch._foreach_maximum_(own, 1.0)
                torch._foreach_div_(batch.last_grads, own)

    def _norms(self, batches: Sequence[_Batch], layouts: Sequence[Layout]) -> dict[int, Tensor]:
        """Euclidean norm of the parameter behind every c, by the id of c."""
        norms: dict[int, Tensor] = {}
        split: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
        for batch in batches:
            for c, norm, layout, index in zip(
                batch.last_grads,
                torch._foreach_norm(batch.last_grads),
                batch.layouts,
                batch.indices,
                strict=True,
            ):
                norms[id(c)] = norm
                if layout.groups:
                    split.setdefault(layout.groups, []).append((index, norm))
        # Ranks that hold nothing of a parameter still take part in the sum.
        for groups in dict.fromkeys(x.groups for x in layouts if x.groups):
            members = sorted({i for x in layouts if x.groups == groups for i in x.members})
            place = {index: number for number, index in enumerate(members)}
            device = _collective_device(groups[0])
            squares = torch.zeros(len(members), dtype=torch.float32, device=device)
            mine = split.get(groups, [])
            if mine:
                squares = squares.to(mine[0][1].dtype)
                where = torch.tensor([place[index] for index, _ in mine], device=device)
                values = torch.stack([norm for _, norm in mine]).to(device) ** 2
                squares.index_add_(0, where, values)
            for group in groups:
                dist.all_reduce(squares, group=group)
            for index, norm in mine:
                norm.copy_(squares[place[index]].sqrt())
        return norms

    def _take_in(self, batch: _Batch) -> None:
        corrected = batch.grads if batch.rule == "AdamW" else batch.last_grads
        if batch.rule in ("AdamW", "MARS-AdamW"):
            adamw_moments(
                corrected,
                batch.exp_avgs,
                batch.exp_avg_sqs,
                batch.max_exp_avg_sqs,
                batch.settings,
            )
        else:
            torch._foreach_lerp_(batch.exp_avgs, corrected, 1 - batch.settings.beta1)

    def _apply(self, batch: _Batch) -> None:
        if batch.rule == "MARS-Lion":
            lr, decay = batch.settings.lr, batch.settings.weight_decay
            updates = torch._foreach_sign(batch.exp_avgs)
            torch._foreach_mul_(updates, -lr)
            if decay:
                torch._foreach_mul_(batch.params, 1 - lr * decay)
            torch._foreach_add_(batch.params, updates)
            return
        on_device = batch.group["capturable"] or torch.compiler.is_compiling()
        steps = batch.steps if on_device else [step.item() for step in batch.steps]
        denominators = batch.max_exp_avg_sqs or batch.exp_avg_sqs
        adamw_apply(batch.params, batch.exp_avgs, denominators, steps, batch.settings)

    def _apply_shampoo(self, part: _Part) -> None:
        group = part.group
        batches = [batch for batch in part.batches if batch.rule == "MARS-Shampoo"]

        def factor(momentum: Tensor) -> Tensor:
            # The authors' code divides by 1 - beta1: a matter of the norm's epsilon alone.
            scaled = momentum / (1 - group["betas"][0])
            return orthogonalise(scaled, group["orthogonaliser"], group["ns_steps"])

        pieces = {
            index: exp_avg
            for batch in batches
            for index, exp_avg in zip(batch.indices, batch.exp_avgs, strict=True)
        }
        split = [layout for layout in part.layouts if layout.groups]
        members = tuple(
            sorted(
                index
                for layout in split
                for index in layout.members
                if rule_of(self._originals[index].kind, group) == "MARS-Shampoo"
            )
        )
        if members:
            if members not in self._exchanges:
                self._exchanges[members] = MatrixExchange(split, self._originals, members)
            flat = {i: piece.reshape(-1) for i, piece in pieces.items()}
            factors = self._exchanges[members](flat, factor)
        else:
            factors = {index: factor(piece) for index, piece in pieces.items()}
        for batch in batches:
            lr, decay = batch.settings.lr, batch.settings.weight_decay
            for index, parameter in zip(batch.indices, batch.params, strict=True):
                if decay:
                    parameter.mul_(1 - lr * decay)
                parameter.sub_(factors[index].view_as(parameter) * lr)

    def _can_fuse(self, batch: _Batch) -> bool:
        """Whether torch's fused AdamW can make this update."""
        fused = batch.group["fused"]
        if fused is False or batch.rule not in ("AdamW", "MARS-AdamW"):
            return False
        if torch.compiler.is_compiling():
            return False  # the compiler fuses the plain operations itself
        if fused is None and batch.group["foreach"] is not None:
            return False
        # The kernel wants steps on the tensors' device, and one type of 32 or 64 bits.
        tensors = (*batch.params, *batch.grads)
        return batch.steps[0].device == batch.params[0].device and all(
            t.dtype in (torch.float32, torch.float64) and t.dtype == batch.exp_avgs[0].dtype
            for t in tensors
        )

    def _can_chunk(self, batch: _Batch) -> bool:
        """Whether the correction can go through the cache together with the fused update."""
        return (
            batch.rule == "MARS-AdamW"
            and not torch.compiler.is_compiling()
            and batch.params[0].device.type == "cpu"
            and self._can_fuse(batch)
            and all(layout.whole for layout in batch.layouts)
            and all(t.is_contiguous() for t in (*batch.params, *batch.grads, *batch.exp_avgs))
        )

    def _chunked(self, batch: _Batch) -> None:
        group = batch.group
        chunked_mars_adamw(
            batch.params,
            batch.grads,
            batch.last_grads,
            batch.exp_avgs,
            batch.exp_avg_sqs,
            batch.max_exp_avg_sqs,
            batch.steps,
            batch.settings,
            coefficient=correction_coefficient(group["gamma"], batch.settings.beta1),
            clip=group["clip_c"],
            norms=self._norm_cache,
        )

    def _fused_adamw(self, batch: _Batch) -> None:
        lr, beta1, beta2, weight_decay, eps = batch.settings
        torch._fused_adamw_(
            batch.params,
            batch.grads if batch.rule == "AdamW" else batch.last_grads,
            batch.exp_avgs,
            batch.exp_avg_sqs,
            batch.max_exp_avg_sqs,
            batch.steps,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=batch.group["amsgrad"],
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )


def _settings(rule: Rule, group: dict[str, Any], lr: float | Tensor) -> Settings:
    if rule != "AdamW":
        beta1, beta2 = group["betas"]
        return Settings(lr, beta1, beta2, group["weight_decay"], group["eps"])
    beta1, beta2 = group["betas_1d"]
    decay = group["weight_decay_1d"]
    decay = group["weight_decay"] if decay is None else decay
    return Settings(lr * group["lr_1d_factor"], beta1, beta2, decay, group["eps"])


def _state_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _collective_device(group: Any) -> torch.device:
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check(settings: dict[str, Any]) -> float:
    """Refuse settings out of range; returns the ratio of the vectors' learning rate to lr."""

    def require(good: bool, name: str, rule: str) -> None:
        if not good:
            raise ValueError(f"MARS: {name} must {rule}, not {settings[name]!r}")

    def finite(value: Any) -> bool:
        return math.isfinite(float(value))

    lr = settings["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"MARS: a tensor lr must have one element, not {lr.numel()}")
        if settings["foreach"] and not settings["capturable"]:
            raise ValueError("MARS: a tensor lr with foreach=True needs capturable=True")
    require(finite(lr) and float(lr) >= 0, "lr", "be a finite number of at least 0")
    for name in ("betas", "betas_1d"):
        good = len(settings[name]) == 2 and all(0 <= float(b) < 1 for b in settings[name])
        require(good, name, "be two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        require(finite(settings[name]) and settings[name] >= 0, name, "be at least 0")
    require(0 <= settings["gamma"] <= 1, "gamma", "lie in [0, 1]")
    require(settings["variant"] in VARIANTS, "variant", f"be one of {', '.join(VARIANTS)}")
    require(settings["kind"] in (None, *KINDS), "kind", f"be one of {', '.join(KINDS)}, or None")
    known = tuple(ORTHOGONALISERS)
    require(settings["orthogonaliser"] in known, "orthogonaliser", f"be one of {', '.join(known)}")
    require(settings["ns_steps"] >= 1, "ns_steps", "be at least 1")
    decay_1d, lr_1d = settings["weight_decay_1d"], settings["lr_1d"]
    require(decay_1d is None or (finite(decay_1d) and decay_1d >= 0), "weight_decay_1d",
            "be at least 0, or None for weight_decay")  # fmt: skip
    require(lr_1d is None or (finite(lr_1d) and lr_1d >= 0), "lr_1d",
            "be at least 0, or None for lr / 2")  # fmt: skip
    if settings["foreach"] and settings["fused"]:
        raise ValueError("MARS: foreach and fused cannot both be True; leave one None")
    if settings.get("lr_1d_factor") is not None and lr_1d is None:
        return float(settings["lr_1d_factor"])
    if lr_1d is None:
        return 0.5
    require(float(lr) > 0 or lr_1d == 0, "lr", "be above 0 when lr_1d is given, which follows it")
    return float(lr_1d) / float(lr) if float(lr) else 0.5
