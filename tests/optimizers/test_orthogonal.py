"""Orthogonal factors, and the exchange of momenta that are split over ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mars_reference import newton_schulz
from mars_training import gradients, parameters, train
from torch import Tensor, nn

from sparring.optimizers import orthogonal
from sparring.optimizers.layouts import Layout, Segment, describe
from sparring.optimizers.orthogonal import MatrixExchange
from sparring.optimizers.orthogonal import newton_schulz as torch_newton_schulz


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24), (1, 5)])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Oracle 7."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = newton_schulz(matrix.numpy())
    np.testing.assert_allclose(torch_newton_schulz(matrix).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(torch_newton_schulz(matrix.float()).numpy(), expected, atol=1e-4)


def test_svd_orthogonaliser_gives_the_orthogonal_factor() -> None:
    params, stream = parameters(), gradients(1, 0.01)
    before = [p.detach().clone() for p in params]
    train(params, stream, variant="shampoo", orthogonaliser="svd", lr=1.0)
    for parameter, start in zip(params, before, strict=True):
        if parameter.ndim == 2:
            update = start - parameter.detach()
            rows, columns = update.shape
            small = update @ update.T if rows <= columns else update.T @ update
            eye = torch.eye(min(rows, columns), dtype=torch.float64) * max(1, rows / columns)
            torch.testing.assert_close(small, eye)


@pytest.mark.parametrize("holds", [True, False])
def test_parts_on_the_cpu_travel_on_the_group_s_device(
    holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under offload the shards are there, and a rank without one must take the same device."""
    used: list[str] = []

    def gather(everywhere: list[Any], mine: Any, group: Any) -> None:
        everywhere[:] = [mine, [(0, 8, 8)]] if holds else [[(0, 0, 8)], mine, [(0, 8, 8)]]

    def all_to_all(into: Tensor, given: Tensor, *sizes: Any, group: Any) -> None:
        used.extend((into.device.type, given.device.type))

    monkeypatch.setattr(orthogonal.dist, "get_rank", lambda group: 0 if holds else 1)
    monkeypatch.setattr(orthogonal.dist, "get_world_size", lambda group: 2 if holds else 3)
    monkeypatch.setattr(orthogonal.dist, "all_gather_object", gather)
    monkeypatch.setattr(orthogonal.dist, "all_to_all_single", all_to_all)
    # A device that is everywhere, and from which nothing can be copied back.
    monkeypatch.setattr(orthogonal, "collective_device", lambda group: torch.device("meta"))
    segments = (Segment(0, 0, 0, 8),) if holds else ()
    exchange = MatrixExchange(
        [Layout(segments, (0,), ("a group",))], [describe(nn.Parameter(torch.zeros(4, 4)))], [0]
    )
    if holds:
        with pytest.raises(NotImplementedError, match="copy out of meta"):
            exchange({0: torch.zeros(8)}, lambda matrix: matrix)
    else:
        assert exchange({}, lambda matrix: matrix) == {}
    assert used == ["meta"] * 4
