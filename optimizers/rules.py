"""Which rule updates which kind of parameter, with which settings."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal

from torch import Tensor

from sparring.optimizers.adamw import Settings
from sparring.optimizers.layouts import KINDS, Kind
from sparring.optimizers.orthogonal import ORTHOGONALISERS

Variant = Literal["adamw", "lion", "shampoo"]
VARIANTS: tuple[Variant, ...] = ("adamw", "lion", "shampoo")
Rule = Literal["AdamW", "MARS-AdamW", "MARS-Lion", "MARS-Shampoo"]
_SWITCHES = ("exact", "optimize_1d", "amsgrad", "clip_c", "shampoo_embeddings", "maximize",
             "capturable")  # fmt: skip


def rule_of(kind: Kind, group: dict[str, Any]) -> Rule:
    """How a parameter of a kind is updated in a group."""
    variant: Variant = group["variant"]
    if kind == "embedding" and variant == "shampoo" and not group["shampoo_embeddings"]:
        kind = "vector"  # a row an item is no linear map between spaces: its factor means little
    if kind == "stack":  # one orthogonal factor of all would mix the experts
        kind = "vector" if variant == "shampoo" else "matrix"
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
    """Refuse settings out of range; returns the ratio of the vectors' learning rate to lr.

    Raises:
        ValueError: names the setting, what it must be, and what it is.
    """

    def require(good: bool, name: str, rule: str) -> None:
        if not good:
            raise ValueError(f"MARS: {name} must {rule}, not {settings[name]!r}")

    def number(value: Any) -> float:
        """As a float; not a number for what is none, like the "auto" of a ds_config."""
        good = isinstance(value, (Real, Tensor)) and not isinstance(value, bool)
        return float(value) if good else math.nan

    def at_least_zero(name: str, otherwise: str = "") -> None:
        value = number(settings[name])
        absent = bool(otherwise) and settings[name] is None
        rule = f"be a finite number of at least 0{otherwise}"
        require(absent or (math.isfinite(value) and value >= 0), name, rule)

    lr, lr_1d = settings["lr"], settings["lr_1d"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"MARS: a tensor lr must have one element, not {lr.numel()}")
        if settings["foreach"] and not settings["capturable"]:
            raise ValueError("MARS: a tensor lr with foreach=True needs capturable=True")
    for name in ("lr", "eps", "weight_decay"):
        at_least_zero(name)
    at_least_zero("weight_decay_1d", ", or None for weight_decay")
    at_least_zero("lr_1d", ", or None for lr / 2")
    for name in ("betas", "betas_1d"):
        pair = settings[name]
        good = isinstance(pair, (tuple, list)) and len(pair) == 2
        good = good and all(0 <= number(beta) < 1 for beta in pair)
        require(good, name, "be two numbers in [0, 1)")
    require(0 <= number(settings["gamma"]) <= 1, "gamma", "be a number in [0, 1]")
    require(settings["variant"] in VARIANTS, "variant", f"be one of {', '.join(VARIANTS)}")
    require(settings["kind"] in (None, *KINDS), "kind", f"be one of {', '.join(KINDS)}, or None")
    known = tuple(ORTHOGONALISERS)
    require(settings["orthogonaliser"] in known, "orthogonaliser", f"be one of {', '.join(known)}")
    steps = settings["ns_steps"]
    require(isinstance(steps, int) and steps >= 1, "ns_steps", "be a whole number of at least 1")
    for name in _SWITCHES:
        require(settings[name] in (True, False), name, "be True or False")
    for name in ("foreach", "fused"):
        require(settings[name] in (True, False, None), name, "be True, False or None")
    if settings["foreach"] and settings["fused"]:
        raise ValueError("MARS: foreach and fused cannot both be True; leave one None")
    if settings.get("lr_1d_factor") is not None and lr_1d is None:
        return float(settings["lr_1d_factor"])
    if lr_1d is None:
        return 0.5
    require(float(lr) > 0 or lr_1d == 0, "lr", "be above 0 when lr_1d is given, which follows it")
    return float(lr_1d) / float(lr) if float(lr) else 0.5
