"""Guidance on targets whose every score is known.

On a line, q_0 = N(0, 1) and k E = (x - 1.5)^2 / 2, so that p_0 = N(0.75, 0.5). Each of the three
coordinates of (T_1 - T_2) / sqrt 2 of two residues is such a line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from confdiff_inputs import everyone, normal
from torch import Tensor

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import (
    Chains,
    EnergyGradient,
    ForceGuidance,
    Mixture,
    NetworkEnergy,
    NetworkForce,
    NetworkScore,
    energy_guidance,
)
from sparring.science.confdiff.heads import EnergyNetwork, ForceNetwork
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.sizes import SIZES
from sparring.science.confdiff.solvers import ScoreFunction, solve, times
from sparring.science.confdiff.tangent import Score, Tangent, moved_along

PROCESS = Process()
Line = Callable[[Tensor, float], Tensor]


class Draws:
    """Noise of many samples at once."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.shape, self.stream = (*shape, 6), torch.Generator().manual_seed(seed)

    def draw(self) -> Tangent:
        drawn = torch.randn(self.shape, generator=self.stream, dtype=torch.float64)
        return Tangent(drawn[..., :3], drawn[..., 3:])


def on_line(x: Frames) -> Tensor:
    return (x.translations[:, 0] - x.translations[:, 1]) / math.sqrt(2)


def along(value: Tensor) -> Tangent:
    translation = torch.stack([value, -value], 1) / math.sqrt(2)
    return Tangent(translation, torch.zeros_like(translation))


def score_on(line: Line) -> ScoreFunction:
    def score(x: Frames, t: float) -> Score:
        found = along(line(on_line(x), t))
        return Score(found.translation, found.rotation)

    return score


def normal_score(mean: float, variance: float) -> Line:
    def score(x: Tensor, t: float) -> Tensor:
        alpha, std = float(PROCESS.alpha(t)), float(PROCESS.std(t))
        return -(x - alpha * mean) / (alpha**2 * variance + std**2)

    return score


def exact_force(x: Frames, t: float) -> Tangent:
    at = on_line(x)
    return along(normal_score(0, 1)(at, t) - normal_score(0.75, 0.5)(at, t))


def naive_force(x: Frames, t: float) -> Tangent:
    return along(on_line(x) - 1.5)


def recursion(eta: float, naive: bool, steps: int) -> tuple[float, float]:
    """Mean and variance after the sde's steps with a linear score, by its coefficients alone."""
    mean, variance, path = 0.0, 1.0, times(PROCESS, steps, "uniform")
    for t, s in pairwise(path):
        step, alpha = float(PROCESS.beta(t)) * (t - s), float(PROCESS.alpha(t))
        spread = 1 - alpha**2 / 2  # of p_t
        shift, slope = (1.5, -1.0) if naive else (0.75 * alpha / spread, 1 - 1 / spread)
        factor = 1 + step / 2 + step * (-1 + eta * slope)
        mean, variance = factor * mean + step * eta * shift, factor**2 * variance + step
    return mean, variance


@pytest.mark.parametrize(
    ("force", "eta", "mean", "variance"),
    [
        (exact_force, 1.0, 0.75, 0.50),
        (naive_force, 1.0, 1.006, 0.337),
        (exact_force, 2.0, 1.125, 0.298),
        (exact_force, 0.0, 0.0, 1.0),
    ],
)
def test_a_line(
    force: Callable[[Frames, float], Tangent], eta: float, mean: float, variance: float
) -> None:
    naive = force is naive_force
    fine = recursion(eta, naive, 1000)
    assert fine == pytest.approx((mean, variance), abs=0.02)
    count, steps = 1500, 100
    guided = ForceGuidance(score_on(normal_score(0, 1)), force, eta)
    noise = Draws(count, 2)
    end = solve(guided, PROCESS, everyone(count, 2), noise, steps=steps, grid="uniform")
    found, expected = on_line(end.x).flatten(), recursion(eta, naive, steps)
    # 4 standard errors of 4500 draws: 0.04 for the mean if eta = 1.
    assert abs(float(found.mean()) - expected[0]) < 4 * math.sqrt(expected[1] / len(found))
    assert abs(float(found.var()) - expected[1]) < 4 * expected[1] * math.sqrt(2 / len(found))


def test_twice_the_guidance_is_not_twice_the_energy() -> None:
    mean, variance = recursion(2.0, False, 1000)
    assert abs(mean - 1.0) > 0.1  # of q_0 e^(-2 k E): N(1, 1/3)
    assert abs(variance - 1 / 3) > 0.02


def wells(weights: tuple[float, float], shift: float) -> Line:
    """Of a mixture of N(-1.2 + shift, 0.2) and N(1.2 + shift, 0.2)."""

    def score(x: Tensor, t: float) -> Tensor:
        alpha, spread = float(PROCESS.alpha(t)), 0.2 * float(PROCESS.alpha(t)) ** 2
        spread += float(PROCESS.std(t)) ** 2
        apart = torch.stack([alpha * (c + shift) - x for c in (-1.2, 1.2)])
        share = (torch.tensor(weights).log().reshape(2, 1, 1) - apart**2 / (2 * spread)).softmax(0)
        return (share * apart).sum(0) / spread

    return score


def test_a_double_well() -> None:
    # k E = h x moves both wells by -0.2 h and changes their weights by e^(2 * 1.2 h).
    h, count = 0.4, 1200
    right = 1 / (1 + math.exp(2 * 1.2 * h))
    base, target = wells((0.5, 0.5), 0.0), wells((1 - right, right), -0.2 * h)

    def force(x: Frames, t: float) -> Tangent:
        return along(base(on_line(x), t) - target(on_line(x), t))

    def end(eta: float) -> Tensor:
        guided = ForceGuidance(score_on(base), force, eta)
        mask = everyone(count, 2)
        return on_line(solve(guided, PROCESS, mask, Draws(count, 2), steps=150).x).flatten()

    guided, free = end(1.0), end(0.0)
    error = 4 * math.sqrt(0.25 / len(guided))
    assert abs(float((guided > 0).double().mean()) - right) < error + 0.01
    assert abs(float((free > 0).double().mean()) - 0.5) < error
    for side, centre in ((guided > 0, 1.2), (guided < 0, -1.2)):
        # 4 standard errors, and some for the other well's tail across 0.
        spread = 4 * math.sqrt(0.2 / float(side.sum()))
        assert abs(float(guided[side].mean()) - (centre - 0.2 * h)) < spread + 0.02


def pairs() -> tuple[FiniteSet, Tensor]:
    """Eight structures of two residues, and k E of distance and relative orientation."""
    structures = Frames(exp_rotation(2 * normal(8, 2, 3)), 0.7 * normal(8, 2, 3, seed=1))
    return FiniteSet(PROCESS, structures, torch.zeros(8).double(), everyone(2)), pair_energy(
        structures
    )


def pair_energy(x: Frames) -> Tensor:
    """Harmonic in the distance, and - k tr(R_1^T R_2), without unit."""
    distance = (x.translations[:, 0] - x.translations[:, 1]).norm(dim=-1)
    return 2 * (distance - 1) ** 2 - 0.6 * pair_trace(x)


def pair_trace(x: Frames) -> Tensor:
    return (x.rotations[:, 0].mT @ x.rotations[:, 1]).diagonal(dim1=-2, dim2=-1).sum(-1)


def test_two_frames_with_an_energy_of_both() -> None:
    oracle, energies = pairs()
    count = 400
    guided = ForceGuidance(oracle, lambda x, t: oracle.force(x, t, energies))
    mask = everyone(count, 2)
    end = solve(guided, PROCESS, mask, Draws(count, 2), steps=50, grid="quadratic")
    share = oracle.posterior(end.x, PROCESS.t_min)
    expected = (-energies).softmax(0)
    error = 4 * (expected * (1 - expected) / count).sqrt() + 0.01
    assert bool(((share.mean(0) - expected).abs() < error).all())
    traces = pair_trace(oracle.structures)
    assert float((expected * traces).sum()) - float(traces.mean()) > 0.3  # there is much to do
    assert float(share.mean(0) @ traces) == pytest.approx(float(expected @ traces), abs=0.25)


def test_the_gradient_of_an_energy_is_its_force() -> None:
    oracle, energies = pairs()
    mask = everyone(8, 2)
    x = PROCESS.noised(oracle.structures, 0.4, mask, Draws(8, 2).draw())
    force = EnergyGradient(lambda x, t: oracle.energy(x, t, energies), mask)(x, 0.4)
    exact = oracle.force(x, 0.4, energies)
    torch.testing.assert_close(force.translation, exact.translation)
    torch.testing.assert_close(force.rotation, exact.rotation)
    guided = energy_guidance(oracle, lambda x, t: oracle.energy(x, t, energies), mask)(x, 0.4)
    target = oracle.tilted(energies)(x, 0.4)
    torch.testing.assert_close(guided.rotation, target.rotation)
    torch.testing.assert_close(guided.translation, target.translation)

    place = EnergyGradient(lambda x, t: x.translations[:, 0, 0], mask)(x, 0.4)
    assert place.translation[0].tolist() == [[0.5, 0, 0], [-0.5, 0, 0]]  # P
    assert float(place.rotation.abs().max()) == 0


def networks() -> tuple[NetworkScore, NetworkScore, NetworkEnergy, NetworkForce, Frames]:
    torch.manual_seed(0)
    size = dataclasses.asdict(dataclasses.replace(SIZES["tiny"], blocks=2))
    chains = Chains(
        mask=torch.arange(5).expand(2, 5) < torch.tensor([[5], [4]]),
        index=torch.arange(5).expand(2, 5),
        aatype=torch.arange(10).reshape(2, 5),
    )
    one, other = (
        ConformationNetwork(ConformationConfig(size=size, sequence=sequence)).double().eval()
        for sequence in (True, False)
    )
    x = PROCESS.prior(chains.mask, Draws(2, 5).draw())
    return (
        NetworkScore(one, PROCESS, chains),
        NetworkScore(other, PROCESS, chains),
        NetworkEnergy(EnergyNetwork.from_base(one).eval(), chains),
        NetworkForce(ForceNetwork.from_base(one).eval(), chains),
        x,
    )


def test_mixtures() -> None:
    one, other, _, _, x = networks()

    def never(x: Frames, t: float) -> Score:
        raise AssertionError("gamma = 1 needs no second network")

    with torch.no_grad():
        alone, mixed = one(x, 0.3), Mixture(one, never, 1.0)(x, 0.3)
        assert torch.equal(alone.translation, mixed.translation)
        assert torch.equal(alone.rotation, mixed.rotation)
        ends = [Mixture(one, other, gamma)(x, 0.3) for gamma in (0.0, 0.25, 1.0)]
    for part in ("translation", "rotation"):
        low, between, high = (getattr(end, part) for end in ends)
        torch.testing.assert_close(low, getattr(other(x, 0.3), part))
        torch.testing.assert_close(between, 0.75 * low + 0.25 * high)
        assert float((high - low).abs().max()) > 1e-3
    assert ends[1].x0 is not None
    assert torch.equal(ends[1].x0.translations, ends[2].x0.translations)


def test_a_mixture_of_normals_weighs_precisions() -> None:
    # gamma = 0.25 of N(1, 0.1) and N(-1, 0.4): precisions 10 and 2.5 give N(0.143, 0.229) if their
    # scores were those of one path; they are at t -> 0, where it is decided for narrow ones.
    gamma, count = 0.25, 800
    mixture = Mixture(score_on(normal_score(1, 0.1)), score_on(normal_score(-1, 0.4)), gamma)
    precision = gamma / 0.1 + (1 - gamma) / 0.4
    mean = (gamma / 0.1 - (1 - gamma) / 0.4) / precision
    x = Frames(torch.eye(3).double().expand(count, 2, 3, 3), normal(count, 2, 3))
    score, small = mixture(x, 1e-6), on_line(x)
    torch.testing.assert_close(
        score.translation, along(-precision * (small - mean)).translation, rtol=1e-3, atol=1e-3
    )


def test_networks_guide_both_parts() -> None:
    score, _, energy, force, x = networks()
    with torch.no_grad():
        plain, pushed = score(x, 0.3), force(x, 0.3)
        guided = ForceGuidance(score, force, 1.5)(x, 0.3)
        torch.testing.assert_close(guided.rotation, plain.rotation - 1.5 * pushed.rotation)
        torch.testing.assert_close(guided.translation, plain.translation - 1.5 * pushed.translation)
        assert guided.x0 is not None
        assert guided.torsions is not None
        by_energy = energy_guidance(score, energy, score.chains.mask)(x, 0.3)
    pull = plain.plus(by_energy, -1.0)  # grad E
    assert float(pull.rotation.abs().max()) > 1e-5
    # Downhill: a small step along the guidance lowers the energy.
    way, step = pull.times(-1.0), 1e-4
    with torch.no_grad():
        change = energy(moved_along(x, way.times(step)), 0.3) - energy(x, 0.3)
    assert bool((change < 0).all())
    torch.testing.assert_close(change, -step * pull.dot(pull), rtol=1e-2, atol=1e-12)
    for tangent in (pushed, pull):
        assert float(tangent.translation.sum(1).abs().max()) < 1e-12
        assert float(tangent.translation[1, 4].abs().max()) == 0
        assert float(tangent.rotation[1, 4].abs().max()) == 0
