"""One rank of a consensus ADMM: its part of the rows, the result of rank 0 to a JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from sparring.launch.processes import leave
from sparring.science.admm import L1, LeastSquares
from sparring.science.admm_consensus import consensus_admm


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 5))
    return rows, rows @ np.array([1.0, 0, -2, 0, 0.5]) + 0.1 * rng.standard_normal(60)


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    rows, target = data()
    # Shards of different sizes: the weight makes the sum of losses the mean over all rows.
    mine = slice(0, 20) if rank == 0 else slice(20, 60)
    f = LeastSquares(rows[mine], target[mine], weight=len(rows[mine]) / 60)
    found = {}
    for name, options in {
        "standard": {"alpha": 1.6},
        "gradient-based": {"omega1": 1.0, "tau": 1.0},
    }.items():
        result = consensus_admm(f, L1(0.2), 0.3, **options, tol=1e-13, max_iter=5000)
        found[name] = {"x": result.x.tolist(), "success": result.success, "nit": result.nit}
    noisy = consensus_admm(f, L1(0.2), 20.0, batch=4, max_iter=200, seed=3)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, noisy.x.tolist())
    found["noisy"] = gathered
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()
    leave(0)


if __name__ == "__main__":
    main()
