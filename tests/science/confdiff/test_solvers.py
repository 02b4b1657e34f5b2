"""Reverse solvers against distributions whose scores are known."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from confdiff_inputs import everyone, normal
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.science.confdiff.config import ConformationSampleConfig, ConformationTrainConfig
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import Chains, NetworkScore
from sparring.science.confdiff.igso3 import exp_rotation, log_rotation, sample, score
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.sizes import SIZES
from sparring.science.confdiff.solvers import (
    Grid,
    SampleNoise,
    ScoreFunction,
    Solver,
    solve,
    times,
)
from sparring.science.confdiff.tangent import Score, Tangent

PROCESS = Process()


class Draws:
    """Noise of many samples at once, faster than a generator each."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.shape, self.stream = (*shape, 6), torch.Generator().manual_seed(seed)

    def draw(self) -> Tangent:
        drawn = torch.randn(self.shape, generator=self.stream, dtype=torch.float64)
        return Tangent(drawn[..., :3], drawn[..., 3:])


def identity(*shape: int) -> Tensor:
    return torch.eye(3, dtype=torch.float64).expand(*shape, 3, 3)


def gaussian_score(variance: float) -> ScoreFunction:
    """Of translations N(0, variance) without centre; rotations have none, to save time."""

    def score(x: Frames, t: float) -> Score:
        alpha, std = float(PROCESS.alpha(t)), float(PROCESS.std(t))
        translation = -x.translations / (alpha**2 * variance + std**2)
        return Score(translation, torch.zeros_like(translation))

    return score


@pytest.mark.parametrize(("steps", "expected"), [(100, 1.022), (500, 1.015), (1000, 0.997)])
def test_sde_has_the_variance_of_its_recursion(steps: int, expected: float) -> None:
    # A linear score keeps a Gaussian one, whose variance follows from its coefficients alone.
    variance, path = 1.0, times(PROCESS, steps, "uniform")
    for t, s in pairwise(path):
        step = float(PROCESS.beta(t)) * (t - s)
        variance = (1 - step / 2) ** 2 * variance + step
    # The expected numbers were measured on samples, with errors of about 0.01.
    assert variance == pytest.approx(expected, abs=0.02)
    if steps > 100:
        return
    count, size = 500, 5
    end = solve(
        gaussian_score(1.0), PROCESS, everyone(count, size), Draws(count, size), steps=steps,
        grid="uniform",
    )  # fmt: skip
    found = float(end.x.translations.square().sum() / (3 * count * (size - 1)))
    assert abs(found - variance) < 4 * variance * math.sqrt(2 / (3 * count * (size - 1)))
    assert float(end.x.translations.sum(1).abs().max()) < 1e-9


def test_the_default_sampler_ends_with_the_noise_of_t_min_on_stiff_data() -> None:
    # Of one point, whose score -T / std^2 is as stiff as it gets: what is left is noise of t_min,
    # and a uniform grid leaves 2.2 times as much.
    sampler, process = ConformationSampleConfig(), Process(t_min=ConformationTrainConfig().t_min)
    noise = Draws(400, 2)

    def point(x: Frames, t: float) -> Score:
        return Score(-x.translations / process.std(t) ** 2, torch.zeros_like(x.translations))

    def left(grid: Grid) -> float:
        end = solve(
            point, process, everyone(400, 2), noise, steps=sampler.steps, grid=grid,
            start=Frames(identity(400, 2), noise.draw().projected(everyone(400, 2)).translation),
        )  # fmt: skip
        # 400 x 3 differences of two residues: standard error 2 %.
        width = (end.x.translations.square().sum() / (3 * 400)).sqrt()
        return float(width / process.std(process.t_min))

    assert left(sampler.grid) == pytest.approx(1.05, abs=0.08)
    assert left("uniform") > 2


@pytest.mark.parametrize(("solver", "least"), [("ode", 1.7), ("heun", 3.4)])
def test_order_of_the_deterministic_solvers(solver: Solver, least: float) -> None:
    data, width = 0.3, 0.5

    def exact(x: Frames, t: float) -> Score:
        eps = math.sqrt(width**2 + float(PROCESS.sigma(t)) ** 2)
        linear = gaussian_score(data)(x, t)
        return Score(linear.translation, score(log_rotation(x.rotations), eps))

    start = PROCESS.prior(everyone(20, 2), Draws(20, 2).draw())

    def end(steps: int) -> Frames:
        return solve(
            exact, PROCESS, everyone(20, 2), Draws(20, 2), solver=solver, steps=steps,
            grid="quadratic", start=start,
        ).x  # fmt: skip

    ends = [end(steps) for steps in (20, 40, 320)]
    alpha, std = float(PROCESS.alpha(0.01)), float(PROCESS.std(0.01))
    exactly = start.translations * math.sqrt(
        (alpha**2 * data + std**2)
        / (float(PROCESS.alpha(1)) ** 2 * data + float(PROCESS.std(1)) ** 2)
    )
    errors = [float((x.translations - exactly).norm()) for x in ends]
    assert errors[0] / errors[1] > least
    angles = [float(log_rotation(x.rotations.mT @ ends[2].rotations).norm()) for x in ends]
    assert angles[0] / angles[1] > least


@pytest.mark.parametrize(("solver", "steps"), [("sde", 100), ("ode", 60), ("heun", 30)])
def test_rotations_come_back_to_their_distribution(solver: Solver, steps: int) -> None:
    count, width = 2500, 0.4
    target = exp_rotation(normal(1, 1, 3))

    def exact(x: Frames, t: float) -> Score:
        # By the semigroup, p_t is IGSO(3) of the root of the squares' sum.
        eps = math.sqrt(width**2 + float(PROCESS.sigma(t)) ** 2)
        rotation = score(log_rotation(target.mT @ x.rotations), eps)
        return Score(torch.zeros_like(rotation), rotation)

    clean = exp_rotation(sample(normal(count, 1, 3), torch.full((count,), width)))
    at_rest = Frames(target @ clean, torch.zeros(count, 1, 3, dtype=torch.float64))
    start = PROCESS.noised(at_rest, 1.0, everyone(count, 1), Draws(count, 1, seed=3).draw())
    end = solve(
        exact,
        PROCESS,
        everyone(count, 1),
        Draws(count, 1),
        solver=solver,
        steps=steps,
        grid="quadratic",
        start=start,
    )
    trace = (target.mT @ end.x.rotations).diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = 3 * math.exp(-(width**2 + float(PROCESS.sigma(PROCESS.t_min)) ** 2))
    # 4 standard errors of the mean, 0.03, and 0.015 for steps of finite length.
    error = 4 * float(trace.std()) / math.sqrt(count)
    assert abs(float(trace.mean()) - expected) < error + 0.015
    assert error < 0.05


@pytest.mark.parametrize(("solver", "steps"), [("sde", 60), ("ode", 40), ("heun", 20)])
def test_weights_of_two_structures(solver: Solver, steps: int) -> None:
    count = 1000
    structures = Frames(
        exp_rotation(normal(2, 2, 3)),
        torch.tensor([[[0.3, 0, 0], [-0.3, 0, 0]], [[0, 0.4, 0], [0, -0.4, 0]]]).double(),
    )
    weights = torch.tensor([0.7, 0.3], dtype=torch.float64)
    oracle = FiniteSet(PROCESS, structures, weights.log(), everyone(2))
    which = torch.arange(count) >= 700  # exactly the weights: no error of the start
    mask = everyone(count, 2)
    start = PROCESS.noised(structures[which.long()], 1.0, mask, Draws(count, 2, seed=4).draw())
    end = solve(
        oracle, PROCESS, mask, Draws(count, 2), solver=solver, steps=steps, grid="quadratic",
        start=start,
    )  # fmt: skip
    share = oracle.posterior(end.x, PROCESS.t_min)
    assert float(share.max(-1).values.min()) > 0.99  # each sample is one of the two
    error = 4 * math.sqrt(0.7 * 0.3 / count)
    assert abs(float(share[:, 0].mean()) - 0.7) < error


def network_score(mask: Tensor) -> NetworkScore:
    torch.manual_seed(0)
    size = dataclasses.replace(SIZES["tiny"], blocks=2)
    config = ConformationConfig(size=dataclasses.asdict(size), sequence=False)
    network = ConformationNetwork(config).double().eval()
    index = torch.arange(mask.shape[1]).expand(mask.shape)
    return NetworkScore(network, PROCESS, Chains(mask=mask, index=index))


@pytest.mark.parametrize("solver", ["sde", "ode", "heun"])
def test_a_sample_ignores_its_batch_and_padding(solver: Solver) -> None:
    noise = SampleNoise(7, [3, 4, 5], [9, 5, 7])
    together = solve(
        network_score(noise.mask), PROCESS, noise.mask, noise, solver=solver, steps=4, record=True
    )
    noise = SampleNoise(7, [4], [5])
    alone = solve(network_score(noise.mask), PROCESS, noise.mask, noise, solver=solver, steps=4)
    torch.testing.assert_close(together.x.translations[1:2, :5], alone.x.translations)
    torch.testing.assert_close(together.x.rotations[1:2, :5], alone.x.rotations)
    assert together.score.x0 is not None
    assert alone.score.x0 is not None
    torch.testing.assert_close(together.score.x0.translations[1:2, :5], alone.score.x0.translations)
    assert together.score.torsions is not None
    assert together.score.torsions.shape == (3, 9, 7, 2)
    assert [t for t, _ in together.history] == times(PROCESS, 4)
    assert together.history[-1][1] is together.x
    other = SampleNoise(8, [4], [5]).draw()
    assert float((other.translation - SampleNoise(7, [4], [5]).draw().translation).abs().min()) > 0


def test_noise_is_the_same_in_each_number_type() -> None:
    wide, narrow = (
        SampleNoise(1, [0, 1], [2, 3], dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    for _ in range(2):
        a, b = wide.draw(), narrow.draw()
        assert b.rotation.dtype == torch.float32
        torch.testing.assert_close(a.rotation.float(), b.rotation)
        assert float(a.translation[0, 2].abs().max()) == 0
        assert float(a.translation[1].abs().min()) > 0


def test_grids() -> None:
    path = times(PROCESS, 10, "uniform")
    assert path[0] == 1
    assert path[-1] == PROCESS.t_min
    assert len(path) == 11
    steps = torch.tensor(path).diff()
    torch.testing.assert_close(steps, steps[:1].expand(10))
    fine = torch.tensor(times(PROCESS, 10, "quadratic", start=0.5)).diff().abs()
    assert bool((fine.diff() < 0).all())


def test_bad_input() -> None:
    mask = everyone(1, 2)
    with pytest.raises(ValueError, match="'euler'"):
        solve(gaussian_score(1.0), PROCESS, mask, Draws(1, 2), solver="euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        times(PROCESS, 0)
    with pytest.raises(ValueError, match="grid"):
        times(PROCESS, 5, "log")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start"):
        times(PROCESS, 5, start=0.001)
    with pytest.raises(ValueError, match="2 samples"):
        SampleNoise(0, [1, 2], [3])
    with pytest.raises(ValueError, match="lengths"):
        SampleNoise(0, [1], [4], padded=3)

    def broken(x: Frames, t: float) -> Score:
        return Score(x.translations * math.nan, torch.zeros_like(x.translations))

    with pytest.raises(SparringError, match="1 of 1 samples are not finite"):
        solve(broken, PROCESS, mask, Draws(1, 2), steps=3)


def test_starting_from_a_structure() -> None:
    # Heat to t = 0.1 and cool again: of two structures, those near the first stay there.
    structures = Frames(identity(2, 2), normal(2, 2, 3, seed=2))
    oracle = FiniteSet(PROCESS, structures, torch.zeros(2).double(), everyone(2))
    mask, at = everyone(50, 2), 0.1
    first = structures[torch.zeros(50, dtype=torch.long)]
    warm = PROCESS.noised(first, at, mask, Draws(50, 2, seed=1).draw())
    end = solve(
        oracle, PROCESS, mask, Draws(50, 2), steps=20, start=warm, start_time=at, record=True
    )
    assert end.history[0] == (at, warm)
    assert float(oracle.posterior(end.x, PROCESS.t_min)[:, 0].mean()) > 0.9
    with pytest.raises(ValueError, match=r"start_time is 0\.1, but"):
        solve(oracle, PROCESS, mask, Draws(50, 2), steps=20, start_time=at)


def test_colder_noise() -> None:
    mask = everyone(300, 3)
    spreads = [
        float(
            solve(gaussian_score(1.0), PROCESS, mask, Draws(300, 3), steps=50, noise_scale=scale)
            .x.translations.square()
            .mean()
        )
        for scale in (1.0, 0.5)
    ]
    assert spreads[1] < 0.5 * spreads[0]


def test_heun_is_enough_at_fifty_steps() -> None:
    # 50 steps are within 1e-3 nm of four times as many.
    structures = Frames(identity(3, 2), normal(3, 2, 3, seed=2))
    oracle = FiniteSet(PROCESS, structures, torch.zeros(3).double(), everyone(2))
    start = PROCESS.prior(everyone(20, 2), Draws(20, 2).draw())
    ends = [
        solve(
            oracle, PROCESS, everyone(20, 2), Draws(20, 2), solver="heun", steps=steps,
            grid="quadratic", start=start,
        ).x.translations
        for steps in (50, 200)
    ]  # fmt: skip
    close = (ends[0] - ends[1]).norm(dim=-1).amax(-1)
    # A start between two basins may end in the other one.
    assert int((close < 1e-3).sum()) >= 19
