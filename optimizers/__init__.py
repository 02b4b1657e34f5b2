"""Optimizers: MARS with its plugs, and others by name. Importing this does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparring.optimizers.build import build_optimizer
    from sparring.optimizers.config import OptimizerConfig
    from sparring.optimizers.deepspeed import register_deepspeed
    from sparring.optimizers.mars import MARS
    from sparring.optimizers.recursive import RecursiveEstimator

__all__ = ["MARS", "OptimizerConfig", "RecursiveEstimator", "build_optimizer", "register_deepspeed"]

_HOMES = {
    "MARS": "mars",
    "OptimizerConfig": "config",
    "RecursiveEstimator": "recursive",
    "build_optimizer": "build",
    "register_deepspeed": "deepspeed",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
