"""What one call of MARS's step updates, sorted into lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparring.optimizers.adamw import Settings
from sparring.optimizers.exact import ExactMode, States, is_pending
from sparring.optimizers.kernel import Kernel
from sparring.optimizers.layouts import Layout, Segment, local, reduced_gradient
from sparring.optimizers.originals import Originals
from sparring.optimizers.orthogonal import segment_view
from sparring.optimizers.rules import Rule, rule_of, settings_of


@dataclass
class Batch:
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
    kernel: Kernel | None = None
    """What makes the whole step in one pass, if anything; c then never stands in memory."""
    scales: list[float] = field(default_factory=list)
    """For the kernel: 1 / max(1, |c|) of the parameter behind each tensor, where ranks share some;
    else it is found tensor by tensor, while that is in the cache."""

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
class Part:
    """What a call updates of one parameter group."""

    group: dict[str, Any]
    layouts: list[Layout] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)


def gather(
    groups: Iterable[dict[str, Any]], states: States, originals: Originals, exact: ExactMode
) -> list[Part]:
    """Everything that a call of step updates, with steps counted and state made.

    Args:
        groups: the optimizer's.
        states: its state, with an entry made for every tensor that is asked for.

    Raises:
        RuntimeError: a sparse gradient, or exact mode without its protocol.
        ValueError: a sharding that is not known.
    """
    # First what may be refused, so that a refusal changes nothing.
    found = [(group, _present(group, states, originals, exact)) for group in groups]
    present = [entry for _, entries in found for entry in entries]
    exact.begin([tensor for tensor, _ in present], states, originals)
    for group, entries in found:
        for tensor, layout in entries:
            _prepare_state(tensor, states[tensor], layout, group, originals)
    if originals.is_priming(present):
        return []
    parts = [_part(group, entries, states, originals, exact) for group, entries in found]
    return [part for part in parts if part.layouts]


def _present(
    group: dict[str, Any], states: States, originals: Originals, exact: ExactMode
) -> list[tuple[Tensor, Layout]]:
    """The tensors of a group that have a gradient, or in exact mode an update to be made."""
    found = []
    for position, tensor in enumerate(group["params"]):
        if tensor.grad is None:
            due = group["exact"] and not exact.in_moments
            if not (due and is_pending(states.get(tensor, {}))):
                continue
        elif tensor.grad.is_sparse:
            raise RuntimeError("MARS does not support sparse gradients; use dense embeddings")
        elif (gradient := reduced_gradient(tensor)) is not tensor.grad:
            tensor.grad = gradient
        found.append((tensor, originals.layout(tensor, position, group)))
    return found


def _part(
    group: dict[str, Any],
    present: Iterable[tuple[Tensor, Layout]],
    states: States,
    originals: Originals,
    exact: ExactMode,
) -> Part:
    part = Part(group)
    batches: dict[Any, Batch] = {}
    due = group["exact"] and not exact.in_moments
    for tensor, layout in present:
        state, lr = states[tensor], group["lr"]
        if due:
            lr = exact.settle(tensor, state, maximize=group["maximize"])
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
            rule = rule_of(originals.listed[segment.index].kind, group)
            key: tuple[Any, ...] = (rule, tensor.dtype, tensor.device, tensor.grad is None)
            key += (lr if due else None,)
            if group["foreach"] is False:
                key += (len(part.layouts), number)
            if key not in batches:
                batches[key] = Batch(rule, group, settings_of(rule, group, lr))
            batches[key].add(tensor, state, layout, segment)
    part.batches = list(batches.values())
    return part


def _prepare_state(
    tensor: Tensor,
    state: dict[str, Any],
    layout: Layout,
    group: dict[str, Any],
    originals: Originals,
) -> None:
    if layout.whole:
        rules = {rule_of(originals.listed[layout.members[0]].kind, group)}
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
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(tensor, dtype=dtype)
    if rules != {"AdamW"} and "last_grad" not in state:
        # A state that others wrote (a universal checkpoint) has none: c = g once.
        state["last_grad"] = torch.zeros_like(tensor, dtype=dtype)
        if not fresh and tensor.grad is not None:
            state["last_grad"].copy_(-tensor.grad if group["maximize"] else tensor.grad)
