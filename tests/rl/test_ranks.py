"""Ranks are rollout workers: two of them make the steps of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks_worker
from launch_ranks import launch


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Oracle 7: the same trajectories, shared, give the same g."""
    by_rank = launch(Path(ranks_worker.__file__), 2, tmp_path)
    told = [results[-1]["lopsided"] for results in by_rank]
    assert told == ["the run diverged on another rank", "here"]
    for number, case in enumerate(ranks_worker.CASES):
        alone = ranks_worker.run(case)
        for results in by_rank:
            found = results[number]
            assert found["g"] == pytest.approx(alone["g"], abs=1e-6)
            assert found["parameters"] == pytest.approx(alone["parameters"], abs=1e-6)
            for mine, expected in zip(found["records"], alone["records"], strict=True):
                assert mine == pytest.approx(expected, abs=1e-6)
