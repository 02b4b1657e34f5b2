"""The parameters as they were handed over, and which of them an optimizer's tensors hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparring.optimizers.layouts import (
    KINDS,
    Layout,
    Original,
    describe,
    is_dtensor,
    resolve,
    whole,
)
from sparring.optimizers.rules import Rule, rule_of


class Originals:
    """The originals of all parameter groups, and where they have gone."""

    def __init__(self) -> None:
        self.listed: list[Original] = []
        self._rules: list[Rule] = []
        self._trivial: list[Layout] = []
        self._layouts: dict[Tensor, Layout] = {}
        # By identity: DeepSpeed hands over one group at a time, and its universal checkpoints write
        # the first group's settings into all of them.
        self._spans: dict[int, range] = {}
        """The positions of a group's parameters, by the id of its dictionary."""
        self._primed = False

    def replaced(self, tensors: Iterable[Tensor]) -> bool:
        """Whether DeepSpeed's tensors stand in the places of parameters."""
        known = {id(original.parameter) for original in self.listed}
        return any(id(t) not in known and not is_dtensor(t) for t in tensors)

    def describe(self, group: dict[str, Any]) -> None:
        """Take in the parameters of a group, before anything shards them."""
        names = group.get("param_names") or [""] * len(group["params"])
        start = len(self.listed)
        self._spans[id(group)] = range(start, start + len(group["params"]))
        for parameter, name in zip(group["params"], names, strict=True):
            original = describe(parameter, name, kind=group["kind"])
            self._trivial.append(whole(len(self.listed), parameter))
            self.listed.append(original)
            self._rules.append(rule_of(original.kind, group))

    def relink(self, old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> None:
        """Loading a state puts new dictionaries in the groups' places."""
        self._spans = {id(b): self._spans[id(a)] for a, b in zip(old, new, strict=True)}

    def layout(self, tensor: Tensor, position: int, group: dict[str, Any]) -> Layout:
        """What tensor number `position` of a group holds.

        Raises:
            ValueError: the sharding is not one that is known.
        """
        span = self._spans[id(group)]
        if position < len(span):
            original = self.listed[span[position]]
            same = original.parameter is tensor and original.shape == tuple(tensor.shape)
            if same and not is_dtensor(tensor):
                return self._trivial[span[position]]
        if tensor not in self._layouts:
            candidates = [(index, self.listed[index]) for index in span]
            self._layouts[tensor] = resolve(tensor, position, candidates)
        return self._layouts[tensor]

    def is_priming(self, found: Iterable[tuple[Tensor, Layout]]) -> bool:
        """Whether a call is the one that DeepSpeed without ZeRO makes to have the state made.

        It is the first call on DeepSpeed's clones, with gradients of zeros; a batch may have those
        later (unfused_optimizer.py, initialize_optimizer_states).
        """
        gradients = [tensor.grad for tensor, layout in found if layout.cloned]
        if self._primed or not gradients:
            return False
        self._primed = True
        return not any(grad is not None and torch.any(grad) for grad in gradients)

    def summary(self) -> str:
        """What is updated how, of the parameters that are trained.

        Raises:
            ValueError: all of them by AdamW.
        """
        plural = {kind: f"{kind}s" for kind in KINDS} | {"matrix": "matrices"}
        counts = Counter(
            (original.kind, rule)
            for original, rule in zip(self.listed, self._rules, strict=True)
            if original.requires_grad
        )
        found = ", ".join(
            f"{counts[kind, rule]} {plural[kind]} {rule}"
            for kind in KINDS
            for rule in sorted({r for k, r in counts if k == kind})
        )
        if all(rule == "AdamW" for _, rule in counts):
            raise ValueError(
                f"no tensor gets MARS ({found or 'no parameter requires a gradient'}): give it "
                'two-dimensional parameters, optimize_1d=True, or kind="matrix" in a group'
            )
        return found
