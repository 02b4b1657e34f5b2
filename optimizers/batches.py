"""What one call of MARS's step updates, sorted into lists of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparring.optimizers.adamw import Settings
from sparring.optimizers.kernel import Kernel
from sparring.optimizers.layouts import Layout, Segment, local
from sparring.optimizers.orthogonal import segment_view
from sparring.optimizers.rules import Rule


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
