"""Which rule updates which kind of parameter, with which settings."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

from sparring.optimizers.adamw import Settings
from sparring.optimizers.layouts import KINDS, Kind
from sparring.optimizers.orthogonal import ORTHOGONALISERS

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


def settings_of(rule: Rule, group: dict[str, Any], lr: float | Tensor) -> Settings:
    """What a rule reads of a group, with the learning rate of the group now or then."""
    if rule != "AdamW":
        beta1, beta2 = group["betas"]
        return Settings(lr, beta1, beta2, group["weight_decay"], group["eps"])
    beta1, beta2 = group["betas_1d"]
    decay = group["weight_decay_1d"]
    decay = group["weight_decay"] if decay is None else decay
    return Settings(lr * group["lr_1d_factor"], beta1, beta2, decay, group["eps"])


def check_settings(settings: dict[str, Any]) -> float:
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
