"""What all trainers share: learning rates, order of data, settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.launch.training import TrainingConfig, batches, learning_rate


def rates(total: int, **options: Any) -> list[float]:
    config = TrainingConfig(lr=2.0, **options)
    return [learning_rate(config, step, total) for step in range(total)]


def test_constant_rate() -> None:
    assert rates(5, schedule="constant", warmup=0.0) == [2.0] * 5


def test_linear_rate_falls_to_zero_after_the_last_step() -> None:
    np.testing.assert_allclose(rates(4, schedule="linear", warmup=0.0), [2.0, 1.5, 1.0, 0.5])


def test_cosine_rate() -> None:
    expected = [1 + math.cos(math.pi * n / 8) for n in range(8)]
    np.testing.assert_allclose(rates(8, schedule="cosine", warmup=0.0), expected)


def test_warmup_rises_to_the_peak() -> None:
    found = rates(10, schedule="linear", warmup=0.3)
    np.testing.assert_allclose(found[:4], [2 / 3, 4 / 3, 2.0, 2.0])
    np.testing.assert_allclose(np.diff(found[3:]), -2 / 7)


@given(
    st.integers(1, 200),
    st.floats(0, 0.99),
    st.sampled_from(["constant", "linear", "cosine"]),
)
@settings(deadline=None)
def test_rates_are_positive_and_peak_once(total: int, warmup: float, schedule: str) -> None:
    found = rates(total, schedule=schedule, warmup=warmup)
    assert all(0 < rate <= 2.0 for rate in found)
    top = found.index(max(found))
    assert max(found) == pytest.approx(2.0)
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 60), st.integers(0, 5))
def test_batches_cover_each_epoch_once(count: int, size: int, steps: int, seed: int) -> None:
    found = batches(count, size, steps, seed)
    assert found == batches(count, size, steps, seed)
    assert len(found) == steps
    per_epoch = math.ceil(count / size)
    for epoch in range(steps // per_epoch):
        rows = [n for b in found[epoch * per_epoch : (epoch + 1) * per_epoch] for n in b]
        assert sorted(rows) == list(range(count))
    assert all(1 <= len(b) <= size for b in found)


def test_epochs_and_seeds_have_their_own_order() -> None:
    first, second = batches(64, 64, 2, 0)
    assert first != second
    assert batches(64, 64, 1, 1)[0] not in (first, second)
    assert batches(64, 64, 3, 0)[:2] == [first, second]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "train.batch must be positive, not 0"),
        ({"lr": ()}, "train.lr is an empty list"),
        ({"lr": (1e-3, -1.0)}, "train.lr must be positive, not -1.0"),
        ({"clip": -1.0}, "train.clip must be from 0 to inf, not -1.0"),
        ({"ema": 1.0}, "train.ema is a decay"),
        ({"warmup": 1.0}, "train.warmup is a share"),
        ({"zero": 4}, "train.zero is a ZeRO stage"),
        ({"offload": True}, "train.offload needs train.zero 2 or 3"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)
