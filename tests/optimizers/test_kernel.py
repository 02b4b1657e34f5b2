"""The compiled kernel against library calls."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import pytest
import torch
from mars_training import SHAPES, difference, feed, gradients, parameters, train

from sparring.optimizers import MARS, kernel


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_ran_and_threads_and_known_norms_change_nothing(
    monkeypatch: Any, threads: int
) -> None:
    found = kernel.kernel(torch.float64)
    assert found is not None, "this machine has no C compiler"
    calls: list[float] = []
    step, norms = found.adamw, found.norms

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(options["scale"])
        step(*arguments, **options)

    exact: list[float] = []

    def also_counted(*arguments: Any) -> tuple[float, float]:
        found_norms = norms(*arguments)
        exact.append(found_norms[1])
        return found_norms

    monkeypatch.setattr(found, "adamw", counted)
    monkeypatch.setattr(found, "norms", also_counted)
    monkeypatch.setattr(kernel, "_WHOLE", 4)  # tensors are split over threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plain, small = parameters(), parameters()
    # The clip binds in some steps and not in others, and in the last the bound is enough.
    stream = gradients(9, 0.12) + gradients(3, 0.05)
    train(plain, stream, fused=False)
    assert not calls
    optimizer = train(small, stream[:6])
    optimizer._norm_cache = kernel.NormCache()  # as after a restart
    for gradient in stream[6:]:
        feed(optimizer, small, gradient)
    assert difference(plain, small) < 1e-12
    matrices = sum(len(shape) == 2 for shape in SHAPES)
    assert len(calls) == 12 * matrices
    assert 0 < sum(scale < 1 for scale in calls) < len(calls)
    assert len(exact) < len(calls)  # a bound was enough for some


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_s_kernel_is_the_library_calls(monkeypatch: Any, weight_decay: float) -> None:
    found = kernel.kernel(torch.float64)
    assert found is not None
    calls, lion = [], found.lion
    monkeypatch.setattr(found, "lion", lambda *a, **o: calls.append(o["scale"]) or lion(*a, **o))
    monkeypatch.setattr(kernel, "_WHOLE", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    stream = gradients(9, 0.12) + gradients(3, 0.05)
    plain, small = parameters(), parameters()
    for tensors, fused in ((plain, False), (small, None)):
        train(tensors, stream, variant="lion", weight_decay=weight_decay, fused=fused)
    assert difference(plain, small) < 1e-12
    assert 0 < sum(scale < 1 for scale in calls) < len(calls)


def test_lion_s_kernel_has_no_sign_for_zero_and_none_for_no_number() -> None:
    found = kernel.kernel(torch.float32)
    assert found is not None
    from sparring.optimizers.adamw import Settings

    x, h, m = torch.ones(3), torch.zeros(3), torch.zeros(3)
    g = torch.tensor([0.0, -2.0, float("nan")])
    found.lion(x, g, h, m, Settings(0.5, 0.9, 0.99, 0.1, 0.0), coefficient=0.4, scale=1.0)
    torch.testing.assert_close(x, torch.tensor([0.95, 1.45, float("nan")]), equal_nan=True)
    torch.testing.assert_close(h, g, equal_nan=True)


def test_norms_of_long_tensors() -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        found = kernel.kernel(dtype)
        assert found is not None
        tensors = [torch.randn(size, dtype=dtype) for size in (1, 15, 2048, 70001, 131072)]
        others = [torch.randn_like(tensor) for tensor in tensors]
        for g, h in zip(tensors, others, strict=True):
            assert found.norm(g) == pytest.approx(float(g.double().norm()), rel=tolerance)
            c = g.double() + 0.475 * (g.double() - h.double())
            got = found.norms(g, h, 0.475)
            assert got == pytest.approx((float(g.double().norm()), float(c.norm())), rel=tolerance)


def test_gradients_are_read_once_for_their_norms(monkeypatch: Any) -> None:
    """|g| alone where that will do, else |g| and |c| from one pass (specification §5.3)."""
    found = kernel.kernel(torch.float64)
    assert found is not None
    passes: list[str] = []
    for name in ("norm", "norms"):
        call = getattr(found, name)
        monkeypatch.setattr(
            found, name, lambda *a, name=name, call=call: passes.append(name) or call(*a)
        )
    matrix = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer = MARS([matrix])
    for size in (0.1, 0.1, 0.7, 0.7, 0.1, 0.1):
        matrix.grad = torch.full_like(matrix, size / 4)
        optimizer.step()
    # The first h is not known to be zero; then the bound holds, fails, cannot hold, and holds.
    assert passes == ["norms", "norm", "norm", "norms", "norms", "norms", "norm"]


def test_without_a_compiler_library_calls_take_over(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain, stream = parameters(), gradients(5)
    train(plain, stream, fused=False)
    for compiler, said in (("false", "false failed"), ("/nowhere/cc", "/nowhere/cc failed")):
        kernel.kernel.cache_clear()
        monkeypatch.setenv("CC", compiler)
        others = parameters()
        with caplog.at_level(logging.INFO, logger="sparring.optimizers"):
            train(others, stream)
        assert said in caplog.text
        assert difference(plain, others) < 1e-12
    kernel.kernel.cache_clear()
    monkeypatch.delenv("CC")
    with monkeypatch.context() as patch:  # nowhere to write
        patch.setattr(tempfile, "tempdir", "/nowhere")
        assert kernel.kernel(torch.float32) is None
    kernel.kernel.cache_clear()
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    assert kernel.kernel(torch.float32) is None
    kernel.kernel.cache_clear()
