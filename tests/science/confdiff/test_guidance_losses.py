"""Estimators of E_t and F_t, against closed forms and each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from confdiff_inputs import draws, frames, normal
from torch import Tensor

from sparring.science.confdiff.config import GAS_CONSTANT
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance_losses import (
    anchor_target,
    boltzmann_weights,
    consistency_loss,
    contrastive_energy_loss,
    force_anchor_loss,
    force_loss,
    mean_weight_loss,
)
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.losses import (
    rotation_loss,
    tangent_dot,
    translation_loss,
)
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Tangent

PROCESS = Process()
T = torch.tensor([0.1, 0.6], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def along(value: Tensor) -> Tensor:
    """(B, 3) on the line -> (B, 2, 3) translations."""
    return torch.stack([value, -value], 1) / math.sqrt(2)


def analytic(t: float) -> tuple[float, float]:
    """Intercept and slope of F_t = s_q - s_p."""
    square, variance = float(PROCESS.alpha(t)) ** 2, float(PROCESS.std(t)) ** 2
    spread = square * 0.5 + variance
    return -0.75 * math.sqrt(square) / spread, 1 / spread - 1


def minimum(loss: Callable[[Tensor], Tensor], steps: int) -> Tensor:
    """Newton's method from 0; one step if the loss is quadratic."""
    at = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(at), at, create_graph=True)
        rows = [torch.autograd.grad(part, at, retain_graph=True)[0] for part in slope]
        at = (at - torch.linalg.solve(torch.stack(rows), slope)).detach().requires_grad_()
    return at.detach()


def line(t: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and noised points of the line, and weights (B, 3)."""
    clean = normal(count, 3)
    noised = float(PROCESS.alpha(t)) * clean + float(PROCESS.std(t)) * normal(count, 3, seed=1)
    return clean, noised, boltzmann_weights(((clean - 1.5) ** 2 / 2).flatten()).reshape(-1, 3)


@pytest.mark.parametrize("control", [0.0, 1.0])
@pytest.mark.parametrize("t", [0.1, 0.3])
def test_weighted_score_matching_finds_the_force(t: float, control: float) -> None:
    count = 20_000
    clean, noised, weights = line(t, count)
    still = torch.eye(3, dtype=torch.float64).expand(count, 2, 3, 3)
    mask, time = torch.ones(count, 2, dtype=torch.bool), torch.full((count,), t).double()
    x, x0 = Frames(still, along(noised)), Frames(still, along(clean))
    given = PROCESS.score_given(x, x0, time, mask)
    zero = torch.zeros(count, 2, 3, dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        # One direction a time, as each has its own weight.
        total = torch.zeros((), dtype=torch.float64)
        for i, only in enumerate(torch.eye(3, dtype=torch.float64)):
            force, base, conditional = (
                Tangent(v * only, zero)
                for v in (along(at[0] + at[1] * noised), along(-noised), given.translation)
            )
            expected = torch.full_like(time, control)
            values = force_loss(
                force, base, conditional, weights[:, i], expected, time, mask, PROCESS
            )
            total = total + values.mean()
        return total

    found, expected = minimum(loss, 1), analytic(t)
    # Whatever is subtracted from weights, as E[s_q - grad log q(x_t | x_0) | x_t] = 0.
    # Standard errors from eight other seeds: 0.019 and 0.023 at t = 0.1, less later.
    assert found.tolist() == pytest.approx(expected, abs=0.09)
    named = {0.1: (-1.2866, 0.8121), 0.3: (-0.5889, 0.2471)}[t]
    assert expected == pytest.approx(named, abs=1e-4)


@pytest.mark.parametrize("size", [2, 8])
def test_contrastive_energies_agree(size: int) -> None:
    t = 0.1
    _, noised, weights = line(t, 24_000)
    points, weight = (v.reshape(-1, size) for v in (noised, weights))

    def loss(at: Tensor, weight: Tensor = weight) -> Tensor:
        energy = at[0] * points + at[1] * points**2 / 2
        return contrastive_energy_loss(energy, weight).mean()

    expected = analytic(t)
    # Standard errors from eight other seeds: 0.004 and 0.0045.
    assert minimum(loss, 6).tolist() == pytest.approx(expected, abs=0.018)


def test_the_mean_of_weights_is_learnt() -> None:
    t = 0.1
    _, noised, weights = line(t, 24_000)
    points, weight = noised.flatten(), weights.flatten()

    def loss(at: Tensor) -> Tensor:
        # The constant follows from E_t's being that of weights with mean 1.
        free = at[0] * points + at[1] * points**2 / 2
        energy = free + (-free).exp().mean().log()
        return mean_weight_loss(energy, weight).mean()

    assert minimum(loss, 8).tolist() == pytest.approx(analytic(t), abs=0.03)


def test_weights_over_a_group_s_sum_are_wrong() -> None:
    t = 0.1
    _, noised, weights = line(t, 24_000)
    points, weight = (v.reshape(-1, 2) for v in (noised, weights))
    shares = 2 * weight / weight.sum(1, keepdim=True)

    def energy(at: Tensor) -> Tensor:
        return at[0] * points + at[1] * points**2 / 2

    right = minimum(lambda at: contrastive_energy_loss(energy(at), weight).mean(), 6)
    wrong = minimum(lambda at: contrastive_energy_loss(energy(at), shares).mean(), 6)
    # The slope's standard error, from eight other seeds, is 0.0045; theirs is off by 0.057.
    assert float(right[1]) == pytest.approx(analytic(t)[1], abs=0.018)
    assert abs(float(wrong[1]) - analytic(t)[1]) > 0.03


def test_both_losses_rest_at_the_oracle() -> None:
    # At the exact F_t and E_t the slopes are 0 up to 4 standard errors, elsewhere they are not.
    count, t = 6000, 0.25
    structures = frames(6, 2)
    chosen = torch.randint(6, (count,), generator=torch.Generator().manual_seed(0))
    energies = torch.linspace(0, 2, 6, dtype=torch.float64)
    oracle = FiniteSet(PROCESS, structures, torch.zeros(6).double(), torch.ones(2).bool())
    mask, time = torch.ones(count, 2, dtype=torch.bool), torch.full((count,), t).double()
    clean = structures[chosen]
    x = PROCESS.noised(clean, t, mask, draws(count, 2))
    weights = boltzmann_weights(energies)[chosen]
    given, base = PROCESS.score_given(x, clean, t, mask), oracle(x, t)
    force, energy = oracle.force(x, t, energies), oracle.energy(x, t, energies)

    def of_force(factor: float, at: Tangent) -> Tensor:
        control = (-energy).exp()  # E[w | x_t]
        moved = at.plus(force, factor)
        return force_loss(moved, base, given, weights, control, time, mask, PROCESS)

    def of_energy(factor: float, at: Tensor) -> Tensor:
        groups = (at + factor * energy).reshape(-1, 3)
        return contrastive_energy_loss(groups, weights.reshape(-1, 3))

    for loss, exact, wrong in (
        (of_force, force, force.times(-1)),  # the sign of the authors' labels
        (of_energy, energy, torch.zeros_like(energy)),
    ):
        step = 1e-4
        for at, rests in ((exact, True), (wrong, False)):
            slope = (loss(step, at) - loss(-step, at)) / (2 * step)  # type: ignore[operator]
            sigma = abs(float(slope.mean())) / (float(slope.std()) / math.sqrt(len(slope)))
            assert (sigma < 4) == rests


def test_the_control_takes_noise_out_of_the_force_s_gradient() -> None:
    count, t = 2000, 0.1
    structures = frames(6, 2)
    chosen = torch.randint(6, (count,), generator=torch.Generator().manual_seed(0))
    energies = torch.linspace(0, 0.6, 6, dtype=torch.float64)  # as mild as relaxed labels are
    oracle = FiniteSet(PROCESS, structures, torch.zeros(6).double(), torch.ones(2).bool())
    mask, time = torch.ones(count, 2, dtype=torch.bool), torch.full((count,), t).double()
    x = PROCESS.noised(structures[chosen], t, mask, draws(count, 2))
    weights = boltzmann_weights(energies)[chosen]
    given, base = PROCESS.score_given(x, structures[chosen], t, mask), oracle(x, t)
    probe, spread = draws(count, 2, seed=5), []
    for control in (torch.zeros(count).double(), torch.ones(count).double()):
        slope = [
            force_loss(probe.times(h), base, given, weights, control, time, mask, PROCESS)
            for h in (1e-3, -1e-3)
        ]
        spread.append(float((slope[0] - slope[1]).std()))
    assert spread[1] < 0.4 * spread[0]


def test_the_slope_of_a_learnt_energy_takes_noise_out_of_the_force() -> None:
    # Of 400 points of the line: F = h_0 + h_1 x, and E = f_0 x + f_1 x^2 / 2 learnt beside it.
    t, count = 0.1, 400
    still = torch.eye(3, dtype=torch.float64).expand(count, 2, 3, 3)
    mask, time = torch.ones(count, 2, dtype=torch.bool), torch.full((count,), t).double()
    zero, control = torch.zeros(count, 2, 3, dtype=torch.float64), torch.ones(count).double()

    def opposed(values: Tensor) -> Tensor:
        return along(torch.stack([values, *torch.zeros(2, count).double()], -1))

    def error(seed: int, weight: float) -> float:
        clean = normal(count, seed=seed)
        x = float(PROCESS.alpha(t)) * clean
        x = x + float(PROCESS.std(t)) * normal(count, seed=1000 + seed)
        weights = boltzmann_weights((clean - 1.5) ** 2 / 2)
        places = Frames(still, opposed(x)), Frames(still, opposed(clean))
        given, base = PROCESS.score_given(*places, time, mask), Tangent(opposed(-x), zero)

        def of_energy(at: Tensor) -> Tensor:
            free = at[0] * x + at[1] * x**2 / 2
            return mean_weight_loss(free + (-free).exp().mean().log(), weights).mean()

        learnt = minimum(of_energy, 8)

        def of_force(at: Tensor) -> Tensor:
            force, slope = (Tangent(opposed(v[0] + v[1] * x), zero) for v in (at, learnt))
            exact = force_loss(force, base, given, weights, control, time, mask, PROCESS)
            apart = consistency_loss(force, slope, time, mask, PROCESS)
            return (exact + weight * apart).mean()

        return float((minimum(of_force, 1) - torch.tensor(analytic(t))).square().sum())

    alone, both = (np.mean([error(seed, weight) for seed in range(10)]) for weight in (0.0, 10.0))
    assert both < 0.1 * alone


def test_the_anchor_is_the_mean_force_of_a_potential_in_two_dimensions() -> None:
    # U = a x^2 / 2 + (1 + x^2) y^2 / 2 of a frame x and a fast y. The mean force at T is that of
    # a x^2 / 2 + R T log(1 + x^2) / 2, so that F_0 = s_q - s_p = (b_target - b_data) a x.
    count, a = 200_000, 3.0
    b_data, b_target = (1 / (GAS_CONSTANT * kelvin) for kelvin in (400.0, 300.0))
    k = b_target - b_data
    x, y = 0.8 * normal(count), normal(count, seed=1)
    stiff = 1 + x**2
    y = y / (b_data * stiff).sqrt()
    force, score = -(a * x + x * y**2), -b_data * a * x - x / stiff

    def opposed(values: Tensor, width: int) -> Tensor:
        # Of two residues along the first axis, as one alone has no motion but its centre's.
        made = torch.zeros(count, 2, width, dtype=torch.float64)
        made[:, 0, 0], made[:, 1, 0] = values, -values
        return made

    still = torch.eye(3, dtype=torch.float64).expand(count, 2, 3, 3)
    base = Tangent(opposed(score, 3), torch.zeros(count, 2, 3).double())
    places = Frames(still, torch.zeros(count, 2, 3).double())
    mask = torch.ones(count, 2, dtype=torch.bool)
    found = anchor_target(base, opposed(force, 6), places, 300.0, mask).translation[:, 0, 0]

    def slope(values: Tensor, weights: Tensor) -> float:
        return float((weights * values * x).sum() / (weights * x * x).sum())

    # e^(-k U) but for a factor that depends on x alone, which moves no minimum.
    weights = (-k * stiff * y**2 / 2).exp()
    assert slope(found, weights) == pytest.approx(k * a, rel=0.05)
    assert slope(-k * force, torch.ones_like(x)) > 1.2 * k * a  # right to first order alone


def test_the_anchor_takes_torques_to_the_bodys_axes() -> None:
    turn = exp_rotation(torch.tensor([0.0, 0.0, math.pi / 2], dtype=torch.float64))
    pair = Frames(turn.expand(1, 2, 3, 3), torch.zeros(1, 2, 3).double())
    forces = torch.zeros(1, 2, 6, dtype=torch.float64)
    forces[0, 0] = torch.tensor([1.0, 0, 0, 1, 0, 0]) * GAS_CONSTANT * 300
    forces[0, 1] = torch.tensor([-1.0, 0, 0, 0, 0, 0]) * GAS_CONSTANT * 300
    zero = torch.zeros(1, 2, 3, dtype=torch.float64)
    found = anchor_target(Tangent(zero, zero), forces, pair, 300.0, torch.ones(1, 2).bool())
    # A torque about the laboratory's x is about minus y of a body turned by a quarter about z.
    expected = torch.tensor([0.0, 1.0, 0.0]).double()
    torch.testing.assert_close(found.rotation[0, 0], expected)
    torch.testing.assert_close(found.translation[0, 0], torch.tensor([-1.0, 0, 0]).double())


def test_weights() -> None:
    weights = boltzmann_weights(torch.tensor([0, math.log(3)]).double() + 1e4)
    torch.testing.assert_close(weights, torch.tensor([1.5, 0.5]).double())
    with pytest.raises(ValueError, match="1 of 2 energies"):
        boltzmann_weights(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="two samples or more"):
        contrastive_energy_loss(torch.zeros(3, 1), torch.ones(3, 1))


def test_anchor() -> None:
    force, target = draws(2, 3), draws(2, 3, seed=8)
    apart = (force.translation - target.translation) ** 2 + (force.rotation - target.rotation) ** 2
    rows = apart.sum(-1).numpy()
    found = force_anchor_loss(force, target, MASK, torch.tensor([2.0, 1.0]))
    np.testing.assert_allclose(found, [2 * rows[0].mean(), rows[1, :2].mean()])
    parts = (translation_loss, force.translation), (rotation_loss, force.rotation)
    square = sum(loss(v, torch.zeros_like(v), T, MASK, PROCESS) for loss, v in parts)
    torch.testing.assert_close(tangent_dot(force, force, T, MASK, PROCESS), square)
