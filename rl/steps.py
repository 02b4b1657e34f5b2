"""From a gradient estimate to a step uphill: Adam, SGD, steps of fixed length, MARS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

StepRule = Literal["adam", "sgd", "normalised", "mars"]
STEP_RULES: tuple[StepRule, ...] = ("adam", "sgd", "normalised", "mars")


class Ascent:
    """Moves parameters up an estimate g.

        sgd          x += lr g, as in the theory
        normalised   x += lr g / |g|, |.| over all parameters: the weights between two policies
                     then have a bounded step to bridge
        adam         torch's Adam (the paper's experiments)
        mars         MARS-AdamW of `sparring.optimizers` on g; its correction comes on top

    Args:
        parameters: named, trainable.
        rule: one of these.
        lr: above 0.
        decay: factor of lr after every step, in (0, 1].

    Raises:
        ValueError: no such rule, or a number outside its range.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        rule: StepRule,
        lr: float,
        decay: float,
    ) -> None:
        if rule not in STEP_RULES:
            raise ValueError(f"optimizer must be one of {list(STEP_RULES)}, not {rule!r}")
        if not 0 < lr < float("inf"):
            raise ValueError(f"lr must be above 0 and finite, not {lr!r}")
        if not 0 < decay <= 1:
            raise ValueError(f"lr_decay must lie in (0, 1], not {decay!r}")
        named = list(parameters)
        self._parameters = [parameter for _, parameter in named]
        self.rule = rule
        self.optimizer: torch.optim.Optimizer
        if rule == "adam":
            self.optimizer = torch.optim.Adam(self._parameters, lr=lr, maximize=True)
        elif rule == "mars":
            from sparring.optimizers import MARS

            self.optimizer = MARS(named, lr=lr, maximize=True)
        else:
            self.optimizer = torch.optim.SGD(self._parameters, lr=lr, maximize=True)
        self._decay = decay

    @property
    def lr(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def step(self, direction: Sequence[Tensor]) -> None:
        """One step along `direction`, a tensor a parameter."""
        scale = 1.0
        if self.rule == "normalised":
            # A zero estimate has no direction; staying is right then.
            scale = 1 / max(float(norm(direction)), 1e-12)
        for parameter, tensor in zip(self._parameters, direction, strict=True):
            parameter.grad = tensor * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] *= self._decay

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with the present lr."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.optimizer.load_state_dict(state)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors together."""
    norms = torch._foreach_norm(list(tensors))
    length: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return length
