"""Policy gradients with recursive variance reduction: STORM-PG and its relatives on gymnasium.

Importing this imports neither torch nor gymnasium.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparring.rl.environments import ContinuousCartPole, ContinuousMountainCar
    from sparring.rl.lockstep import Lockstep, SubEnvironments
    from sparring.rl.method import PolicyGradient, TrainResult
    from sparring.rl.policies import CategoricalPolicy, GaussianPolicy, policy_for
    from sparring.rl.relatives import GPOMDP, PAGEPG, SRVRPG, SVRPG
    from sparring.rl.rollouts import Sampler, Trajectories
    from sparring.rl.storm import StormPG
    from sparring.rl.tabular import TabularMDP

__all__ = [
    "GPOMDP",
    "PAGEPG",
    "SRVRPG",
    "SVRPG",
    "CategoricalPolicy",
    "ContinuousCartPole",
    "ContinuousMountainCar",
    "GaussianPolicy",
    "Lockstep",
    "PolicyGradient",
    "Sampler",
    "StormPG",
    "SubEnvironments",
    "TabularMDP",
    "TrainResult",
    "Trajectories",
    "policy_for",
]

_HOMES = {
    "GPOMDP": "relatives",
    "PAGEPG": "relatives",
    "SRVRPG": "relatives",
    "SVRPG": "relatives",
    "CategoricalPolicy": "policies",
    "ContinuousCartPole": "environments",
    "ContinuousMountainCar": "environments",
    "GaussianPolicy": "policies",
    "Lockstep": "lockstep",
    "PolicyGradient": "method",
    "Sampler": "rollouts",
    "StormPG": "storm",
    "SubEnvironments": "lockstep",
    "TabularMDP": "tabular",
    "TrainResult": "method",
    "Trajectories": "rollouts",
    "policy_for": "policies",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
