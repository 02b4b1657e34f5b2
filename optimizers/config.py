"""The optimizer of a recipe. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Which optimizer trains, apart from its learning rate."""

    # What launch's @config sets; nothing here imports launch.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["adamw", "mars", "rmsprop"] = "adamw"
    """The papers of SPIN, SPPO and APO use RMSprop."""
    beta1: float | None = None
    """Decay of the first moment. Default: 0.9 for AdamW, 0.95 for MARS."""
    beta2: float | None = None
    """Decay of the second moment; RMSprop's smoothing. Default: 0.95 for AdamW, 0.99 for others."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled (AdamW, MARS); on all but biases and norms."""
    gamma: float = 0.025
    """MARS: strength of the correction of the gradient."""
    variant: Literal["adamw", "lion", "shampoo"] = "adamw"
    """MARS: what makes the update from the momentum."""
    exact: bool = False
    """MARS: correct by the present batch's gradient at the weights before: two gradients a step."""
    optimize_1d: bool = False
    """MARS: for vectors too; otherwise they get AdamW (0.9, 0.95)."""
    lr_1d_factor: float = 0.5
    """MARS: AdamW's learning rate on vectors, as a share of `lr`."""
    clip_c: bool = True
    """MARS: scale each parameter's corrected gradient to a norm of at most 1."""

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"train.optimizer.{name} is from 0 to below 1, not {value}")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"train.optimizer.gamma is from 0 to 1, not {self.gamma}")
        for name in ("eps", "weight_decay", "lr_1d_factor"):
            if not 0 <= getattr(self, name) < float("inf"):
                value = getattr(self, name)
                raise ValueError(f"train.optimizer.{name} is at least 0, not {value}")
        if self.exact and self.name != "mars":
            raise ValueError(f'train.optimizer.exact is for name = "mars", not "{self.name}"')
