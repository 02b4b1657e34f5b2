"""Exact mode: two gradients a batch, and what happens when one is missing."""

from __future__ import annotations

import copy

import pytest
import torch
from mars_reference import Reference
from mars_training import difference, feed, gradients, parameters
from torch import Tensor, nn

from sparring.optimizers import MARS


def quadratic(params: list[nn.Parameter], batch: int) -> Tensor:
    """A loss whose gradient depends on the weights and on the batch."""
    generator = torch.Generator().manual_seed(batch)
    total = torch.zeros((), dtype=torch.float64)
    for parameter in params:
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        total = total + (0.1 * (1 + draw.abs()) * (parameter - draw) ** 2).sum()
    return total


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
def test_exact_mode_equals_the_two_gradient_recursion(variant: str) -> None:
    """Oracle 10: h is the gradient of the present batch at the previous weights."""
    params = parameters()
    optimizer = MARS(params, variant=variant, exact=True, weight_decay=0.1)
    for batch in range(20):
        quadratic(params, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        quadratic(params, batch).backward()
        before = [p.detach().clone() for p in params]
        with optimizer.moments():
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        optimizer.zero_grad()
    optimizer.step()

    x = [nn.Parameter(p.detach().clone()) for p in parameters()]
    references = [Reference(matrix=p.ndim == 2, variant=variant, weight_decay=0.1) for p in x]
    previous: list[nn.Parameter] | None = None
    for batch in range(20):
        g = torch.autograd.grad(quadratic(x, batch), x)
        if previous is None:
            h = [torch.zeros_like(a) for a in g]  # last_grad starts at zero
        else:
            h = list(torch.autograd.grad(quadratic(previous, batch), previous))
        previous = x
        x = [
            nn.Parameter(torch.from_numpy(r.step(p.detach().numpy(), a.numpy(), b.numpy())))
            for r, p, a, b in zip(references, x, g, h, strict=True)
        ]
    assert difference(params, x) < 1e-12


def test_exact_mode_equals_approximate_mode_on_a_fixed_batch() -> None:
    exact, approximate = parameters(), parameters()
    optimizer = MARS(exact, exact=True)
    other = MARS(approximate, fused=False)
    for _ in range(20):
        quadratic(exact, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        quadratic(exact, 0).backward()
        with optimizer.moments():
            optimizer.step()
        optimizer.zero_grad()
        quadratic(approximate, 0).backward()
        other.step()
        other.zero_grad()
    optimizer.step()
    assert difference(exact, approximate) < 1e-14


def test_exact_mode_uses_the_learning_rate_of_the_moments() -> None:
    early, late = parameters(), parameters()
    stream = gradients(1)
    for params, lr in ((early, 1e-3), (late, 7e-3)):
        optimizer = MARS(params, lr=1e-3, exact=True)
        with optimizer.moments():
            feed(optimizer, params, stream[0])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        optimizer.step()
    assert difference(early, late) == 0


def test_a_pending_update_can_be_dropped() -> None:
    """With it goes the memory, which holds c: the next correction is by the next gradient."""
    params, stream = parameters(), gradients(2)
    optimizer = MARS(params, exact=True)
    with optimizer.moments():
        feed(optimizer, params, stream[0])
    assert optimizer.pending
    optimizer.drop_pending()
    assert not optimizer.pending
    optimizer.zero_grad()
    optimizer.step()
    assert difference(params, parameters()) == 0
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in params}
    with optimizer.moments():
        feed(optimizer, params, stream[1])
    for parameter, g in zip(params, stream[1], strict=True):
        if parameter.ndim == 2:
            expected = 0.95 * before[parameter] + 0.05 * g / max(1.0, float(g.norm()))
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected)


def test_exact_mode_refuses_plain_steps() -> None:
    params, stream = parameters(), gradients(2)
    optimizer = MARS(params, exact=True)
    feed(optimizer, params, stream[0])
    with pytest.raises(RuntimeError, match=r"two gradients a batch.*optimizer.moments"):
        feed(optimizer, params, stream[1])
    with pytest.raises(RuntimeError, match="exact=True"), MARS(parameters()).moments():
        pass


def test_exact_mode_maximizes_after_skipped_moments() -> None:
    """Overflowed moments leave no update; the next previous-weights gradient has its sign."""
    up, down = parameters(), parameters()
    stream = gradients(3)
    for params, sign, options in ((up, 1, {"maximize": True}), (down, -1, {})):
        optimizer = MARS(params, exact=True, **options)
        with optimizer.moments():
            feed(optimizer, params, [sign * g for g in stream[0]])
        feed(optimizer, params, [sign * g for g in stream[1]])
        with optimizer.moments():
            pass  # the step was skipped
        feed(optimizer, params, [sign * g for g in stream[1]])
        with optimizer.moments():
            feed(optimizer, params, [sign * g for g in stream[2]])
        optimizer.zero_grad()
        optimizer.step()
    assert difference(up, down) == 0


def test_exact_mode_after_a_skipped_update_takes_c_as_g(caplog: pytest.LogCaptureFixture) -> None:
    """An overflow between moments and update leaves no gradient at the previous weights."""
    params, stream = parameters(), gradients(4)
    optimizer = MARS(params, exact=True)
    with optimizer.moments():
        feed(optimizer, params, stream[0])
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in params}
    optimizer.found_inf = torch.ones(())  # as GradScaler sets it for the step that it skips
    feed(optimizer, params, stream[1])
    del optimizer.found_inf
    with optimizer.moments():
        feed(optimizer, params, stream[2])
    assert ["update of a batch is lost" in line for line in caplog.messages] == [True]
    assert difference(params, parameters()) == 0
    for parameter, g in zip(params, stream[2], strict=True):
        if parameter.ndim == 2:
            c = g / max(1.0, float(g.norm()))
            expected = 0.95 * before[parameter] + 0.05 * c
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected)
    # The skip counts once.
    with pytest.raises(RuntimeError, match="taken again"), optimizer.moments():
        feed(optimizer, params, stream[3])


def test_a_forgotten_update_is_refused_and_changes_nothing() -> None:
    params, stream = parameters(), gradients(2)
    optimizer = MARS(params, exact=True)
    with optimizer.moments():
        feed(optimizer, params, stream[0])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    message = r"update is still to be made; call step\(\) outside of moments"
    with pytest.raises(RuntimeError, match=message), optimizer.moments():
        feed(optimizer, params, stream[1])
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            held = before[index][name]
            assert torch.equal(value, held) if isinstance(value, Tensor) else value == held


def test_moments_and_update_compile_without_a_graph_break() -> None:
    plain, compiled = parameters(torch.float32)[:2], parameters(torch.float32)[:2]
    torch._dynamo.reset()
    for params, wrap in ((plain, False), (compiled, True)):
        optimizer = MARS(params, exact=True)

        def take(optimizer: MARS = optimizer) -> None:
            with optimizer.moments():
                optimizer.step()

        halves = [take, optimizer.step]
        if wrap:
            halves = [torch.compile(half, fullgraph=True, backend="eager") for half in halves]
        for step in gradients(12):  # more than a compiler compiles again
            for half, shift in zip(halves, (0.0, 0.01), strict=True):
                for parameter, g in zip(params, step[:2], strict=True):
                    parameter.grad = g.to(parameter.dtype) + shift
                half()
    assert difference(plain, compiled) < 1e-6
