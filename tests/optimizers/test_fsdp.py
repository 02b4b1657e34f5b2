"""MARS on FSDP2's DTensors, sharded over three ranks or twice over two, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_ranks import launch

WORKER = Path(__file__).with_name("fsdp_worker.py")


@pytest.mark.dist
@pytest.mark.parametrize("world", [3, 4])
def test_fully_shard_equals_one_process(world: int, tmp_path: Path) -> None:
    by_rank = launch(WORKER, world, tmp_path)
    for results in zip(*by_rank, strict=True):
        assert all(result["max_abs_diff"] <= 1e-6 for result in results), results
        assert results[0]["moved"] > 1e-3
        mars = [rule for result in results for rule in result["updates"] if rule != "AdamW"]
        assert mars, results
        assert len({result["state_keys"] for result in results}) == 1
