"""Where a process group's collectives take tensors, on machines that are not here."""

from __future__ import annotations

import pytest
import torch

from sparring.optimizers import layouts
from sparring.optimizers.layouts import collective_device


@pytest.mark.parametrize(
    ("backends", "accelerator", "expected"),
    [
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),  # init_process_group("gloo")
        ("cpu:gloo,cuda:gloo", None, "cpu"),
        ("cuda:nccl", "cuda", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda", "cuda:1"),
        ("cpu:gloo,cuda:nccl", None, "cpu"),
        ("xpu:xccl", "xpu", "xpu:1"),
        ("cuda:gloo", "cuda", "cuda:1"),
        ("cpu:mpi,cuda:mpi", "cuda", "cpu"),
    ],
)
def test_collectives_follow_the_group_s_backends(
    backends: str, accelerator: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(layouts.dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert collective_device("a group") == torch.device(expected)
