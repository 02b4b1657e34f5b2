"""Ranks are rollout workers: two of them make the steps of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks_worker
import torch
import torch.distributed as dist
from launch_ranks import launch

from sparring.rl import ranks


@pytest.mark.dist
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Oracle 7: the same trajectories, shared, give the same g."""
    by_rank = launch(Path(ranks_worker.__file__), 2, tmp_path)
    told = [results[-1]["lopsided"] for results in by_rank]
    assert told == ["the run diverged on another rank", "here"]
    for results in by_rank:
        names = [text.split(" for 2 ranks: each needs one")[0] for text in results[-1]["refused"]]
        assert names == [
            "batch = 1 makes a part of 1 trajectories",
            "init_batch = 1 makes a part of 1 trajectories",
            "init_batch = 1 makes a part of 1 trajectories",
            "defensive = 0.25 makes a part of 1 trajectories",
            "defensive = 0.75 makes a part of 1 trajectories",
        ]
    for number, case in enumerate(ranks_worker.CASES):
        alone = ranks_worker.run(case)
        for results in by_rank:
            found = results[number]
            assert found["g"] == pytest.approx(alone["g"], abs=1e-6)
            assert found["parameters"] == pytest.approx(alone["parameters"], abs=1e-6)
            for mine, expected in zip(found["records"], alone["records"], strict=True):
                assert mine == pytest.approx(expected, abs=1e-6)


def test_collectives_go_where_the_backend_reduces(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL knows no tensors on the CPU, where a policy may well lie. The device "meta" plays the
    accelerator, since it can be told from the CPU without one."""
    sent: list[str] = []

    class Sent(Exception):
        """The collective is reached; what it would give back is of no interest."""

    def record(tensor: torch.Tensor, **_: Any) -> None:
        sent.append(tensor.device.type)
        raise Sent

    monkeypatch.setattr(ranks, "place", lambda: (0, 2))
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    assert ranks._device() == "cuda"
    monkeypatch.setattr(ranks, "_device", lambda: "meta")
    for name in ("broadcast", "all_reduce"):
        monkeypatch.setattr(dist, name, record)
    layer = torch.nn.Linear(2, 1)
    for call in (
        lambda: ranks.same_parameters(layer),
        lambda: ranks.sum_over_ranks([layer.weight]),
        lambda: ranks.max_over_ranks(1.0),
    ):
        with pytest.raises(Sent):
            call()
    assert sent == ["meta"] * 3
