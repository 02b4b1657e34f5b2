"""A rank of the rollout-worker checks: `ranks_worker.py OUT`, with RANK and so on set."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_process import process, softmax

from sparring.launch.processes import leave
from sparring.rl import GPOMDP, SRVRPG, GaussianPolicy, PolicyGradient, StormPG
from sparring.rl.ranks import together

CASES: list[dict[str, Any]] = [
    {"baseline": "loo"},
    {"baseline": "loo", "estimator": "pgt", "optimizer": "mars"},
    {"baseline": "running", "optimizer": "sgd", "defensive": 0.4},
    {"baseline": "loo", "defensive": 0.4},
    {"baseline": "loo", "estimator": "reinforce", "clip": 1.2, "optimizer": "normalised"},
    {"env": "sparring/ContinuousCartPole-v0"},
]


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Parameters and records of a short run; batches that two ranks cannot share evenly."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    settings = dict(case)
    env = settings.pop("env", None)
    policy = softmax(0) if env is None else GaussianPolicy(4, 1, hidden=(8,), dtype=torch.float64)
    method = StormPG(policy, env or process(4), alpha=0.4, init_batch=7, batch=5, lr=0.1,
                     horizon=4 if env is None else 40, gamma=0.9, **settings)  # fmt: skip
    records = method.train(max_trajectories=40, seed=3).records
    for record in records:
        del record["seconds"]
    return {
        "g": [value for tensor in method.direction for value in tensor.flatten().tolist()],
        "parameters": [value for p in policy.parameters() for value in p.flatten().tolist()],
        "records": records,
    }


TOO_FEW: list[tuple[type[PolicyGradient], dict[str, Any]]] = [
    (GPOMDP, {"batch": 1}),
    (StormPG, {"batch": 4, "init_batch": 1, "alpha": 0.5}),
    (SRVRPG, {"batch": 4, "init_batch": 1, "period": 2}),
    (StormPG, {"batch": 4, "init_batch": 4, "alpha": 0.5, "defensive": 0.25, "baseline": "none"}),
    (StormPG, {"batch": 4, "init_batch": 4, "alpha": 0.5, "defensive": 0.75, "baseline": "none"}),
]


def refused() -> list[str]:
    """What a rank is told of batches with a part that does not give every rank a trajectory."""
    told = []
    for kind, settings in TOO_FEW:
        try:
            kind(softmax(0), process(4), horizon=4, lr=0.1, **settings)
        except ValueError as error:
            told.append(str(error))
        else:
            told.append("nothing")
    return told


def lopsided() -> str:
    """What a rank is told when only rank 1 diverges."""

    def work() -> int:
        if dist.get_rank() == 1:
            raise FloatingPointError("here")
        return 1

    try:
        together(work)
    except FloatingPointError as error:
        return str(error)
    return "nothing"


def main() -> None:
    dist.init_process_group("gloo")
    results = [*(run(case) for case in CASES), {"lopsided": lopsided(), "refused": refused()}]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(gathered))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    # The folder of this script is on the path, which tiny_process needs.
    assert "RANK" in os.environ
    main()
