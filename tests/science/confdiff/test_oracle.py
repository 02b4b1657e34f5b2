"""The exact score of a finite set: against differences of its density, and as a sampler."""

from __future__ import annotations

import math

import pytest
import torch
from confdiff_inputs import draws, frames
from torch import Tensor

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.solvers import SampleNoise, solve
from sparring.science.confdiff.tangent import moved_along

PROCESS = Process()
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
ENERGIES = torch.tensor([2.0, 0.0, 0.5], dtype=torch.float64)


def oracle(padding: int = 0) -> FiniteSet:
    mask = torch.arange(3 + padding) < 3
    return FiniteSet(PROCESS, frames(3, 3 + padding), WEIGHTS.log() + 4, mask)


def noised(count: int, t: float | Tensor) -> Frames:
    chosen = torch.arange(count) % 3
    mask = torch.ones(count, 3, dtype=torch.bool)
    return PROCESS.noised(oracle().structures[chosen], t, mask, draws(count, 3))


@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
def test_score_is_the_gradient_of_the_density(t: float) -> None:
    exact, x, step = oracle(), noised(6, t), 1e-5
    way = draws(6, 3, seed=8).projected(torch.ones(6, 3, dtype=torch.bool))
    ends = [moved_along(x, way.times(sign * step)) for sign in (1, -1)]
    slope = (exact.log_density(ends[0], t) - exact.log_density(ends[1], t)) / (2 * step)
    torch.testing.assert_close(exact(x, t).dot(way), slope, rtol=1e-5, atol=1e-4)
    # F_t is the gradient of E_t, and the score of the tilted set is the guided one.
    energies = [exact.energy(end, t, ENERGIES) for end in ends]
    force = exact.force(x, t, ENERGIES)
    torch.testing.assert_close(
        force.dot(way), (energies[0] - energies[1]) / (2 * step), rtol=1e-5, atol=1e-4
    )
    if t > 0.1:
        assert float(force.translation.abs().max()) > 1e-3


def test_one_structure() -> None:
    only = FiniteSet(PROCESS, frames(1, 3), torch.zeros(1), torch.ones(3, dtype=torch.bool))
    x, mask = noised(4, 0.3), torch.ones(4, 3, dtype=torch.bool)
    many = Frames(*(v.expand(4, *v.shape[1:]) for v in vars(only.structures).values()))
    expected, found = PROCESS.score_given(x, many, 0.3, mask), only(x, 0.3)
    torch.testing.assert_close(found.translation, expected.translation)
    torch.testing.assert_close(found.rotation, expected.rotation)


def test_posterior() -> None:
    exact = oracle()
    share = exact.posterior(noised(3, 0.05), 0.05)
    torch.testing.assert_close(share.argmax(1), torch.arange(3))
    torch.testing.assert_close(share.sum(1), torch.ones(3).double())
    # Nothing is left of x_0 in translations at t = 1, and little in rotations: the mean is the
    # prior's weight, exactly so over q_1.
    count = 3000
    chosen = torch.cat([torch.full((round(count * w),), b) for b, w in enumerate(WEIGHTS.tolist())])
    mask = torch.ones(count, 3, dtype=torch.bool)
    x = PROCESS.noised(exact.structures[chosen], 1.0, mask, draws(count, 3))
    share = exact.posterior(x, 1.0)
    error = 4 * share.std(0) / math.sqrt(count)
    assert bool(((share.mean(0) - WEIGHTS).abs() < error).all())


def test_each_sample_has_its_time_and_padding_is_nothing() -> None:
    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    x = noised(2, t)
    together = oracle()(x, t)
    for i in range(2):
        alone = oracle()(x[i : i + 1], float(t[i]))
        torch.testing.assert_close(together.translation[i : i + 1], alone.translation)
        torch.testing.assert_close(together.rotation[i : i + 1], alone.rotation)
    structures = oracle().structures
    wide = Frames(
        torch.cat([structures.rotations, frames(3, 2, seed=3).rotations], 1),
        torch.cat([structures.translations, 9 + frames(3, 2, seed=3).translations], 1),
    )
    padded = FiniteSet(PROCESS, wide, WEIGHTS.log(), torch.arange(5) < 3)
    more = Frames(
        torch.cat([x.rotations, frames(2, 2).rotations], 1),
        torch.cat([x.translations, frames(2, 2).translations], 1),
    )
    found = padded(more, t)
    torch.testing.assert_close(found.translation[:, :3], together.translation)
    torch.testing.assert_close(found.rotation[:, :3], together.rotation)
    assert float(found.rotation[:, 3:].abs().max()) == 0


@pytest.mark.parametrize("tilted", [False, True])
def test_sampling_without_a_network(tilted: bool) -> None:
    count = 600
    exact, expected = oracle(), WEIGHTS
    if tilted:
        exact = exact.tilted(ENERGIES)
        expected = (WEIGHTS.log() - ENERGIES).softmax(0)
    noise = SampleNoise(1, range(count), [3] * count)
    # From the prior, which misses q_1 by little: uniform rotations are as far from each structure.
    end = solve(exact, PROCESS, noise.mask, noise, steps=60, grid="quadratic")
    share = exact.posterior(end.x, PROCESS.t_min)
    assert float(share.max(1).values.min()) > 0.99
    error = 4 * (expected * (1 - expected) / count).sqrt()
    assert bool(((share.mean(0) - expected).abs() < error).all())
    nearest = exact.structures[share.argmax(1)]
    centred = nearest.translations - nearest.translations.mean(1, keepdim=True)
    # Noise at t_min is 0.045 nm a direction, and steps add some: 0.08 nm.
    assert float((end.x.translations - centred).square().mean().sqrt()) < 0.08
