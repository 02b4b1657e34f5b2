"""The loop of a trainer: MARS's exact mode takes both gradients of one function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparring.launch.optimisation import descend
from sparring.launch.processes import World
from sparring.launch.sharding import Sharding
from sparring.launch.stages import Context
from sparring.launch.training import TrainingConfig
from sparring.optimizers import OptimizerConfig, build_optimizer


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_has_one_dropout_in_exact_mode(exact: bool, tmp_path: Path) -> None:
    config = TrainingConfig(optimizer=OptimizerConfig(name="mars", exact=exact), save_every=0)
    sharding = Sharding(config, World(), micro_batches=1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    optimizer = build_optimizer(config.optimizer, network.named_parameters(), lr=1e-3)
    model = sharding.prepare(network.train(), optimizer)
    masks: dict[int, list[torch.Tensor]] = {}
    network[1].register_forward_hook(
        lambda module, given, made: masks.setdefault(current, []).append(made[0] == 0)
    )
    current = 0

    def gradients(number: int, rows: list[int]) -> dict[str, float]:
        nonlocal current
        current = number
        with sharding.accelerator.accumulate(model):
            loss = model(torch.ones(1, 4)).square().mean()
            sharding.backward(loss)
        return {"loss": float(loss.detach())}

    (tmp_path / "work").mkdir()
    descend(
        sharding,
        [[0]] * 4,
        gradients,
        lambda sums: sums,
        config=config,
        rate=lambda number: 1e-3,
        context=Context(World(), tmp_path / "work", 0),
        output=tmp_path,
    )
    # The third pass over the last batch makes the last update; nothing follows that it corrects.
    assert [len(masks[n]) for n in range(4)] == ([1, 2, 2, 3] if exact else [1] * 4)
    for first, *again in masks.values():
        assert all(torch.equal(first, other) for other in again[:1])
    assert not torch.equal(masks[1][0], masks[2][0])
