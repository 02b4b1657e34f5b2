"""MARS against an independent recursion, and identities that hold for it (specification §5.1)."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mars_reference import Reference
from mars_training import SHAPES, difference, feed, gradients, parameters, train
from torch import Tensor, nn

from sparring.optimizers import MARS

SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "weight_decay_1d": 0.3, "lr_1d": 4e-3, "betas_1d": (0.8, 0.9)},
    {"optimize_1d": True, "weight_decay": 0.1},
    {"amsgrad": True},
    {"amsgrad": True, "optimize_1d": True},
    {"gamma": 0.0},
    {"gamma": 1.0},
    {"clip_c": False},
    {"betas": (0.9, 0.999), "eps": 1e-3, "lr": 0.02},
]


@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}, {"foreach": False}, {}])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
def test_fifty_steps_equal_the_numpy_recursion(
    variant: str, options: dict[str, Any], path: dict[str, Any]
) -> None:
    params, stream = parameters(), gradients(50)
    expected = [p.detach().numpy().copy() for p in params]
    references = [Reference(matrix=p.ndim == 2, variant=variant, **options) for p in params]
    train(params, stream, variant=variant, **options, **path)
    for step in stream:
        expected = [
            reference.step(x, g.numpy())
            for reference, x, g in zip(references, expected, step, strict=True)
        ]
    for parameter, x in zip(params, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=0, atol=2e-12)


def test_float32_and_the_fused_kernel_stay_near_the_recursion() -> None:
    exact, fused, plain = parameters(), parameters(torch.float32), parameters(torch.float32)
    stream = gradients(50)
    train(exact, stream)
    train(fused, stream, fused=True)
    train(plain, stream, fused=False)
    assert difference(exact, fused) < 1e-6
    assert difference(exact, plain) < 1e-6


def test_without_correction_it_is_adamw_only_while_norms_stay_below_one() -> None:
    """Oracle 1: gamma = 0 leaves the clip of c."""
    for scale, equal in ((0.01, True), (1.0, False)):
        ours, theirs = parameters(), parameters()
        stream = gradients(30, scale)
        train(ours, stream, gamma=0.0, optimize_1d=True, weight_decay=0.1)
        adamw = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.95, 0.99), weight_decay=0.1)
        for step in stream:
            feed(adamw, theirs, step)
        assert (difference(ours, theirs) < 1e-13) is equal
    ours = parameters()
    train(ours, stream, gamma=0.0, optimize_1d=True, weight_decay=0.1, clip_c=False)
    assert difference(ours, theirs) < 1e-13


def test_first_step_is_adamws_up_to_eps_with_a_larger_momentum() -> None:
    """Oracle 2: last_grad starts at zero, so c = (1 + kappa) g."""
    ours, theirs = parameters(), parameters()
    stream = gradients(1, 0.01)
    optimizer = train(ours, stream)
    feed(torch.optim.AdamW(theirs, lr=3e-3, betas=(0.95, 0.99), weight_decay=0), theirs, stream[0])
    matrices = [i for i, p in enumerate(ours) if p.ndim == 2]
    assert 0 < difference([ours[i] for i in matrices], [theirs[i] for i in matrices]) < 1e-5
    for i in matrices:
        expected = 0.05 * 1.475 * stream[0][i]
        torch.testing.assert_close(optimizer.state[ours[i]]["exp_avg"], expected)


def test_unclipped_momentum_is_quasi_hyperbolic() -> None:
    """Oracle 3: m = gamma g + u, u = beta u + (1 - gamma) (1 - beta) g."""
    params, stream = parameters(), gradients(30)
    optimizer = MARS(params, clip_c=False, gamma=0.3)
    u = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step in stream:
        feed(optimizer, params, step)
        u = [0.95 * a + 0.7 * 0.05 * g for a, g in zip(u, step, strict=True)]
        for parameter, a, g in zip(params, u, step, strict=True):
            if parameter.ndim == 2:
                m = optimizer.state[parameter]["exp_avg"]
                torch.testing.assert_close(m, 0.3 * g + a, rtol=0, atol=1e-15)


def test_lion_with_two_betas_is_a_special_case() -> None:
    """Oracle 4: MARS-Lion(beta = B2, gamma = 1 - B1 / B2, no clip) is Lion(B1, B2)."""
    b1, b2, lr, decay = 0.9, 0.99, 1e-3, 0.1
    params, stream = parameters(), gradients(50)
    lion = [p.detach().clone() for p in params]
    m = [torch.zeros_like(x) for x in lion]
    options: dict[str, Any] = {"variant": "lion", "optimize_1d": True, "weight_decay": decay}
    options |= {"lr": lr, "betas": (b2, 0.0), "gamma": 1 - b1 / b2}
    clipped = parameters()
    train(params, stream, clip_c=False, **options)
    train(clipped, stream, **options)
    for step in stream:
        for x, a, g in zip(lion, m, step, strict=True):
            x.sub_(lr * ((b1 * a + (1 - b1) * g).sign() + decay * x))
            a.mul_(b2).add_(g, alpha=1 - b2)
    assert difference(params, [nn.Parameter(x) for x in lion]) < 1e-13
    assert difference(params, clipped) > 1e-3  # with the clip it is another method


def test_shampoo_follows_muons_direction() -> None:
    """Oracle 5: MARS-Shampoo(gamma = 1 - mu, no clip) is Muon with Nesterov momentum mu."""
    mu, stream = 0.95, gradients(10)
    params = parameters()
    optimizer = MARS(params, variant="shampoo", betas=(mu, 0.99), gamma=1 - mu, clip_c=False)
    buffers = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for step in stream:
        feed(optimizer, params, step)
        for parameter, buffer, g in zip(params, buffers, step, strict=True):
            buffer.mul_(mu).add_(g, alpha=1 - mu)
            if parameter.ndim == 2:
                nesterov = mu * buffer + (1 - mu) * g
                m = optimizer.state[parameter]["exp_avg"]
                torch.testing.assert_close(m / m.norm(), nesterov / nesterov.norm())


@pytest.mark.parametrize("fused", [True, False])
def test_last_grad_is_a_copy(fused: bool) -> None:
    """Oracle 8: gradient buffers that are zeroed, changed in place or used again."""
    clean, reused = parameters(), parameters()
    stream = gradients(20)
    train(clean, stream, fused=fused)
    optimizer = MARS(reused, fused=fused)
    for parameter in reused:
        parameter.grad = torch.zeros_like(parameter)
    for step in stream:
        for parameter, gradient in zip(reused, step, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        optimizer.step()
        for parameter, gradient in zip(reused, step, strict=True):
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, gradient)  # the gradient itself is left alone
            parameter.grad.mul_(7.0)
        optimizer.zero_grad(set_to_none=False)
    assert difference(clean, reused) == 0


def test_scale_of_the_gradients_does_not_matter_while_nothing_is_clipped() -> None:
    """Oracle 12."""
    # Newton-Schulz divides by a norm plus 1e-7.
    for variant, limit in (("adamw", 1e-12), ("lion", 1e-15), ("shampoo", 1e-5)):
        large, small = parameters(), parameters()
        stream = gradients(20, 1e-2)
        options: dict[str, Any] = {"variant": variant, "eps": 1e-30}
        train(large, stream, **options)
        train(small, [[g * 0.01 for g in step] for step in stream], **options)
        assert difference(large, small) < limit


def test_global_clip_comes_first() -> None:
    """Oracle 15: with tensor norms 3 and 4 the clip of c is idle after the global one."""
    params = [nn.Parameter(torch.zeros(1, 1, dtype=torch.float64)) for _ in range(2)]
    for parameter, value in zip(params, (3.0, 4.0), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer = MARS(params, gamma=0.0)
    optimizer.step()
    m = [float(optimizer.state[p]["exp_avg"]) / 0.05 for p in params]
    np.testing.assert_allclose(m, (0.6, 0.8), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
@pytest.mark.parametrize("exact", [False, True])
def test_going_on_from_a_saved_state_is_bit_equal(
    variant: str, dtype: torch.dtype, exact: bool, tmp_path: Path
) -> None:
    """Oracle 13: N + save + load + N = 2 N, with float32 state on bfloat16 parameters too."""
    stream = gradients(12)

    def steps(optimizer: MARS, params: list[nn.Parameter], part: list[list[Tensor]]) -> None:
        for step in part:
            feed(optimizer, params, step)
            if exact:
                with optimizer.moments():
                    feed(optimizer, params, [g + 0.01 for g in step])

    whole = parameters(dtype)
    options: dict[str, Any] = {"variant": variant, "exact": exact, "amsgrad": True}
    optimizer = MARS(whole, **options)
    steps(optimizer, whole, stream)
    first = parameters(dtype)
    optimizer = MARS(first, **options)
    steps(optimizer, first, stream[:6])
    torch.save((optimizer.state_dict(), first), tmp_path / "state.pt")
    state, resumed = torch.load(tmp_path / "state.pt", weights_only=False)
    other = MARS(resumed, **options)
    other.load_state_dict(state)
    for old, new in zip(first, resumed, strict=True):
        for name, value in optimizer.state[old].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other.state[new][name])
                assert value.dtype == other.state[new][name].dtype
                assert value.dtype == (torch.float32 if dtype == torch.bfloat16 else value.dtype)
    steps(other, resumed, stream[6:])
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_loaded_state_is_a_copy() -> None:
    """Going on does not change what was loaded."""
    params, stream = parameters(), gradients(3)
    state = train(params, stream[:2]).state_dict()
    before = copy.deepcopy(state)
    other = MARS(params)
    other.load_state_dict(state)
    feed(other, params, stream[2])
    for index, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state["state"][index][name]), name


def test_a_state_without_last_grad_takes_the_gradient_as_it_is_once() -> None:
    """Universal checkpoints drop last_grad."""
    params, stream = parameters(), gradients(3)
    optimizer = train(params, stream[:2])
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in params}
    for parameter in params:
        optimizer.state[parameter].pop("last_grad", None)
    feed(optimizer, params, stream[2])
    for parameter, g in zip(params, stream[2], strict=True):
        if parameter.ndim == 2:
            c = g / max(1.0, float(g.norm()))
            expected = 0.95 * before[parameter] + 0.05 * c
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected)
            assert torch.equal(optimizer.state[parameter]["last_grad"], g)


def test_pickle_and_deepcopy_go_on() -> None:
    params, stream = parameters(), gradients(6)
    optimizer = train(params, stream[:3])
    copied = copy.deepcopy(optimizer)
    restored = pickle.load(io.BytesIO(pickle.dumps(optimizer)))
    for step in stream[3:]:
        feed(optimizer, params, step)
    for other in (copied, restored):
        mine = other.param_groups[0]["params"]
        for step in stream[3:]:
            feed(other, mine, step)
        assert difference(params, mine) == 0


def test_hyper_parameters_live_in_the_groups_and_follow_a_schedule() -> None:
    first, second = parameters()[:3], parameters()[3:]
    optimizer = MARS(
        [{"params": first}, {"params": second, "lr": 1e-3, "gamma": 0.5, "weight_decay": 0.2}],
        lr=2e-3,
        lr_1d=5e-4,
    )
    assert [group["lr"] for group in optimizer.param_groups] == [2e-3, 1e-3]
    assert [group["gamma"] for group in optimizer.param_groups] == [0.025, 0.5]
    assert [group["lr_1d_factor"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert optimizer.state_dict()["param_groups"][1]["weight_decay"] == 0.2

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    vector = first[1]
    moved = []
    for _ in range(2):
        before = vector.detach().clone()
        for parameter in (*first, *second):
            parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()
        scheduler.step()
        moved.append(float((before - vector.detach()).abs().max()))
    assert moved[0] == pytest.approx(5e-4, rel=1e-6)
    assert moved[1] == pytest.approx(2.5e-4, rel=1e-6)


def test_a_tensor_learning_rate_equals_a_number() -> None:
    for variant in ("adamw", "lion", "shampoo"):
        number, tensor = parameters(), parameters()
        stream = gradients(5)
        options: dict[str, Any] = {"variant": variant, "weight_decay": 0.1, "foreach": False}
        train(number, stream, lr=3e-3, **options)
        lr = torch.tensor(3e-3, dtype=torch.float64)
        train(tensor, stream, lr=lr, **options)
        assert difference(number, tensor) < 1e-15
        assert float(lr) == 3e-3


def test_capturable_keeps_steps_as_tensors_and_the_numbers() -> None:
    plain, capturable = parameters(), parameters()
    stream = gradients(10)
    train(plain, stream, fused=False)
    train(capturable, stream, fused=False, capturable=True)
    assert difference(plain, capturable) < 1e-7  # steps are float32 tensors


def test_maximize_is_minimize_of_the_negative() -> None:
    for fused in (True, False):
        up, down = parameters(), parameters()
        stream = gradients(8)
        train(up, stream, maximize=True, fused=fused)
        train(down, [[-g for g in step] for step in stream], fused=fused)
        assert difference(up, down) == 0


def test_parameters_without_gradient_are_left_alone() -> None:
    params, stream = parameters(), gradients(4)
    optimizer = train(params, stream[:2])
    frozen = params[0].detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
    for parameter, gradient in zip(params[1:], stream[2][1:], strict=True):
        parameter.grad = gradient
    params[0].grad = None
    optimizer.step()
    assert torch.equal(params[0], frozen)
    assert all(torch.equal(v, optimizer.state[params[0]][k]) for k, v in state.items())


def test_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    params = parameters()
    optimizer = MARS(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    first, second = optimizer.step(closure).detach(), optimizer.step(closure).detach()
    assert float(second) < float(first)


@pytest.mark.parametrize("variant", ["adamw", "lion", "shampoo"])
def test_compiles_without_a_graph_break(variant: str) -> None:
    plain, compiled = parameters(torch.float32), parameters(torch.float32)
    stream = gradients(6)
    train(plain, stream, variant=variant, fused=False)
    optimizer = MARS(compiled, variant=variant)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for gradient in stream:
        for parameter, g in zip(compiled, gradient, strict=True):
            parameter.grad = g.to(parameter.dtype)
        step()
    assert difference(plain, compiled) < 1e-6


def test_sixteen_bit_parameters_have_float32_state_and_round_once() -> None:
    exact, half = parameters(torch.bfloat16), parameters(torch.bfloat16)
    stream = [[g.bfloat16().double() for g in step] for step in gradients(5)]
    wide = [nn.Parameter(p.detach().float()) for p in exact]
    optimizer = MARS(half, lr=0.1)
    reference = MARS(wide, lr=0.1, fused=False)
    for step in stream:
        feed(optimizer, half, step)
        for parameter in half:
            assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
        feed(reference, wide, step)
        for wider in wide:
            wider.data.copy_(wider.data.bfloat16().float())
    assert all(torch.equal(a.float(), b) for a, b in zip(half, wide, strict=True))


def test_wrappers_see_that_grad_scaler_skipped_a_step() -> None:
    """What calls `step` through a scaler tells a skip by `step` not having been called."""
    assert not MARS(parameters(torch.float32))._step_supports_amp_scaling
    assert MARS(parameters(torch.float32), exact=True)._step_supports_amp_scaling


def test_complex_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="is complex; MARS is not defined for it"):
        MARS([torch.zeros(2, 2, dtype=torch.complex64, requires_grad=True)])


def test_grad_scaler_unscales_and_skips_overflows() -> None:
    """Oracle 14: a skipped step changes nothing."""
    scaled, plain = parameters(torch.float32), parameters(torch.float32)
    stream = gradients(3)
    train(plain, stream)
    optimizer = MARS(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, step in enumerate(stream):
        if number == 2:
            before = copy.deepcopy(optimizer.state_dict()["state"])
            weights = [p.detach().clone() for p in scaled]
            for parameter in scaled:
                parameter.grad = torch.full_like(parameter, float("inf"))
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update(1024.0)
            assert all(torch.equal(a, b) for a, b in zip(scaled, weights, strict=True))
            for index, state in optimizer.state_dict()["state"].items():
                assert all(torch.equal(value, before[index][k]) for k, value in state.items())
        scaler.scale(torch.ones(()))
        for parameter, gradient in zip(scaled, step, strict=True):
            parameter.grad = gradient.float() * 1024
        scaler.step(optimizer)
        scaler.update(1024.0)
    assert difference(plain, scaled) < 1e-7
