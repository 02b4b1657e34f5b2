"""The moving average of weights against its recursion in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparring.launch.ema import EMA


def moved(ema: EMA, model: nn.Module, updates: int, seed: int) -> list[np.ndarray]:
    """Change the weights at random, average, and give all the weights that were seen."""
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(updates):
        with torch.no_grad():
            model.weight.copy_(torch.randn(model.weight.shape, generator=generator))
        ema.update()
        seen.append(model.weight.detach().double().numpy().copy())
    return seen


def test_the_average_follows_its_recursion() -> None:
    model = nn.Linear(3, 2)
    expected = model.weight.detach().double().numpy().copy()
    ema = EMA(model, 0.7)
    for n, weight in enumerate(moved(ema, model, 30, 0)):
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight
    np.testing.assert_allclose(ema.full_state()["weight"].numpy(), expected, atol=1e-6)


def test_going_on_from_a_saved_state_changes_nothing() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    whole, first = EMA(one, 0.9), EMA(two, 0.9)
    moved(whole, one, 12, 0)
    moved(whole, one, 5, 1)
    moved(first, two, 12, 0)
    second = EMA(two, 0.9)
    second.load_state_dict(first.state_dict())
    moved(second, two, 5, 1)
    assert torch.equal(whole.full_state()["weight"], second.full_state()["weight"])


def test_frozen_weights_have_no_average_and_low_precision_has_a_float32_one() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    state = EMA(model, 0.9).full_state()
    assert {name: tensor.dtype for name, tensor in state.items()} == {"weight": torch.float32}


def test_a_decay_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, not 1"):
        EMA(nn.Linear(1, 1), 1.0)
