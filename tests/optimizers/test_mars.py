"""MARS against an independent recursion, and identities that hold for it (specification §5.1)."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mars_reference import Reference, newton_schulz
from torch import Tensor, nn

from sparring.optimizers import MARS
from sparring.optimizers.orthogonal import newton_schulz as torch_newton_schulz

SHAPES = ((5, 7), (6,), (9, 3), (4, 2, 3, 3), (1,), (3, 8))


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(x.to(dtype)) for x in draw]


def gradients(steps: int, scale: float = 0.3, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(steps)
    ]


def feed(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: list[Tensor]) -> None:
    for parameter, gradient in zip(params, step, strict=True):
        parameter.grad = gradient.to(parameter.dtype).clone()
    optimizer.step()


def train(params: list[nn.Parameter], stream: list[list[Tensor]], **options: Any) -> MARS:
    optimizer = MARS(params, **options)
    for step in stream:
        feed(optimizer, params, step)
    return optimizer


def difference(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max(
        float((x.detach().double() - y.detach().double()).abs().max())
        for x, y in zip(a, b, strict=True)
    )


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


@pytest.mark.parametrize("threads", [1, 3])
def test_the_kernel_ran_and_threads_and_known_norms_change_nothing(
    monkeypatch: Any, threads: int
) -> None:
    from sparring.optimizers import kernel

    found = kernel.kernel(torch.float64)
    assert found is not None, "this machine has no C compiler"
    calls: list[float] = []
    step, corrected = found.step, found.corrected_norm

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(options["scale"])
        step(*arguments, **options)

    exact: list[float] = []

    def also_counted(*arguments: Any) -> float:
        exact.append(corrected(*arguments))
        return exact[-1]

    monkeypatch.setattr(found, "step", counted)
    monkeypatch.setattr(found, "corrected_norm", also_counted)
    monkeypatch.setattr(kernel, "_WHOLE", 4)  # tensors are split over threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    plain, small = parameters(), parameters()
    stream = gradients(12, 0.12)  # the clip binds in some steps and not in others
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


def test_norms_of_long_tensors() -> None:
    from sparring.optimizers.kernel import kernel

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        found = kernel(dtype)
        assert found is not None
        tensors = [torch.randn(size, dtype=dtype) for size in (1, 15, 2048, 70001, 131072)]
        others = [torch.randn_like(tensor) for tensor in tensors]
        for g, h in zip(tensors, others, strict=True):
            assert found.norm(g) == pytest.approx(float(g.double().norm()), rel=tolerance)
            c = g.double() + 0.475 * (g.double() - h.double())
            got = found.corrected_norm(g, h, 0.475)
            assert got == pytest.approx(float(c.norm()), rel=tolerance)


def test_without_a_compiler_library_calls_take_over(
    monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from sparring.optimizers import kernel

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
    monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    assert kernel.kernel(torch.float32) is None
    kernel.kernel.cache_clear()


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
    # The loaded state is a copy: going on did not change what was loaded.
    again = MARS(first, **options)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(parameters(dtype), parameters(dtype), strict=True))


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


def test_a_state_of_another_variant_is_refused_and_changes_nothing() -> None:
    params, stream = parameters(), gradients(3)
    optimizer = train(params, stream[:2])
    lion = train(parameters(), stream[:2], variant="lion")
    adamw = torch.optim.AdamW(parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of MARS-lion, this is MARS-adamw.*variant='lion'"):
        optimizer.load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="of another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][index][name])


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


# The optimizer contract.


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


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = MARS(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


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


# Exact mode.


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
    params, stream = parameters(), gradients(1)
    optimizer = MARS(params, exact=True)
    with optimizer.moments():
        feed(optimizer, params, stream[0])
    assert optimizer.pending
    optimizer.drop_pending()
    assert not optimizer.pending
    optimizer.zero_grad()
    optimizer.step()
    assert difference(params, parameters()) == 0


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


def test_exact_mode_after_a_skipped_update_takes_c_as_g() -> None:
    """An fp16 overflow between moments and update leaves no gradient at the previous weights."""
    params, stream = parameters(), gradients(3)
    optimizer = MARS(params, exact=True)
    with optimizer.moments():
        feed(optimizer, params, stream[0])
    before = {p: optimizer.state[p]["exp_avg"].clone() for p in params}
    with optimizer.moments():  # the step in between was skipped
        feed(optimizer, params, stream[1])
    for parameter, g in zip(params, stream[1], strict=True):
        if parameter.ndim == 2:
            c = g / max(1.0, float(g.norm()))
            expected = 0.95 * before[parameter] + 0.05 * c
            torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], expected)


# Which parameters get what.


def test_kinds_come_from_names_groups_and_dimensions(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(4, 3), "layer": nn.Linear(3, 3), "conv": nn.Conv2d(3, 2, 1)}
    )
    lines = {
        "adamw": "1 matrices MARS-AdamW, 3 vectors AdamW, 1 embeddings MARS-AdamW",
        "lion": "1 matrices MARS-Lion, 3 vectors AdamW, 1 embeddings MARS-Lion",
        "shampoo": "1 matrices MARS-Shampoo, 3 vectors AdamW, 1 embeddings AdamW",
    }
    for variant, line in lines.items():
        optimizer = MARS(model.named_parameters(), variant=variant)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        with caplog.at_level(logging.INFO, logger="sparring.optimizers.mars"):
            optimizer.step()
            optimizer.step()
        assert [record.message for record in caplog.records] == [f"MARS: {line}"]
        caplog.clear()
    convolution = [{"params": [model["conv"].weight], "kind": "matrix"}]
    optimizer = MARS(convolution, variant="shampoo")
    optimizer.step()
    assert optimizer.updates == {"MARS-Shampoo": 1}


def test_nothing_to_work_on_is_refused() -> None:
    vector = nn.Parameter(torch.zeros(3))
    vector.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"no tensor gets MARS \(1 vectors AdamW\).*optimize_1d"):
        MARS([vector]).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, not -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), not \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas_1d": (-0.1, 0.9)}, "betas_1d must be"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"weight_decay_1d": -0.1}, "weight_decay_1d must be at least 0"),
        ({"lr_1d": -0.1}, "lr_1d must be at least 0"),
        ({"lr": 0.0, "lr_1d": 0.1}, "lr must be above 0 when lr_1d is given"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], not 1.5"),
        ({"variant": "adam"}, "variant must be one of adamw, lion, shampoo, not 'adam'"),
        ({"orthogonaliser": "qr"}, "orthogonaliser must be one of"),
        ({"ns_steps": 0}, "ns_steps must be at least 1"),
        ({"foreach": True, "fused": True}, "foreach and fused"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "needs capturable=True"),
        ({"lr": torch.ones(2)}, "one element, not 2"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARS(parameters(), **options)
    optimizer = MARS(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], **options})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_given_twice_is_refused() -> None:
    matrix = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="more than once"):
        MARS([matrix, matrix])
    optimizer = MARS([matrix])
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [matrix]})
    with pytest.raises(ValueError, match="exact"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "exact": True})
