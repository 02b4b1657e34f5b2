"""Weights that make guided samples exact, against the chain's own closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from confdiff_inputs import everyone
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.smc import Population, kish, systematic, twisted
from sparring.science.confdiff.solvers import times
from sparring.science.confdiff.tangent import Score, Tangent

PROCESS = Process()
COUNT = 2000
STEPS = 60


class Draws:
    """Noise of many samples at once."""

    def __init__(self, *shape: int, seed: int = 0) -> None:
        self.shape, self.stream = (*shape, 6), torch.Generator().manual_seed(seed)

    def draw(self) -> Tangent:
        drawn = torch.randn(self.shape, generator=self.stream, dtype=torch.float64)
        return Tangent(drawn[..., :3], drawn[..., 3:])


# A line as in test_guidance.py: the first coordinate of (T_1 - T_2) / sqrt 2, q_0 = N(0, 1),
# k E = (x - 1.5)^2 / 2.


def on_line(x: Frames) -> Tensor:
    return (x.translations[:, 0, 0] - x.translations[:, 1, 0]) / math.sqrt(2)


def base(x: Frames, t: float) -> Score:
    return Score(-x.translations, torch.zeros_like(x.translations))


def spread(t: float) -> tuple[float, float]:
    alpha = float(PROCESS.alpha(t))
    return alpha, 1 - alpha**2 / 2


def force(x: Frames, t: float) -> Tangent:
    alpha, variance = spread(t)
    value = -on_line(x) + (on_line(x) - 0.75 * alpha) / variance
    translation = torch.zeros_like(x.translations)
    translation[:, 0, 0], translation[:, 1, 0] = value / math.sqrt(2), -value / math.sqrt(2)
    return Tangent(translation, torch.zeros_like(translation))


def twist(x: Frames, t: float) -> Tensor:
    """E_t up to a constant: the logarithm of q_t / p_t."""
    alpha, variance = spread(t)
    return (on_line(x) - 0.75 * alpha) ** 2 / (2 * variance) - on_line(x) ** 2 / 2


def energy(x: Frames, t: float) -> Tensor:
    return (on_line(x) - 1.5) ** 2 / 2


def tilted_chain() -> tuple[float, float, float]:
    """Mean, variance and log normalizer of the base's chain of STEPS times e^(-k E)."""
    variance, path = 1.0, times(PROCESS, STEPS, "uniform")
    for t, s in pairwise(path):
        step = float(PROCESS.beta(t)) * (t - s)
        variance = (1 - step / 2) ** 2 * variance + step
    log_mean = -(1.5**2) / (2 * (1 + variance)) - math.log(1 + variance) / 2
    return 1.5 * variance / (1 + variance), variance / (1 + variance), log_mean


def sampled(eta: float, below: float = 0.0, push: bool = True) -> Population:
    return twisted(
        base,
        force if push else None,
        PROCESS,
        everyone(COUNT, 2),
        Draws(COUNT, 2),
        terminal=energy,
        twist=twist if below else None,
        generator=torch.Generator().manual_seed(0) if below else None,
        eta=eta,
        steps=STEPS,
        grid="uniform",
        resample_below=below,
    )


@pytest.mark.parametrize(
    ("eta", "below", "push"),
    [(0.5, 0.0, True), (1.0, 0.0, True), (1.5, 0.0, True), (1.0, 0.0, False), (1.5, 0.9, True)],
)
def test_weighted_means_are_the_target_s(eta: float, below: float, push: bool) -> None:
    found = sampled(eta, below, push)
    share, at = found.log_weights.softmax(0), on_line(found.x)
    mean = float(share @ at)
    variance = float(share @ (at - mean) ** 2)
    wanted, width, log_mean = tilted_chain()
    size = float(kish(found.log_weights))
    assert size > 150
    if below:
        size = min(size, 700)  # resampled particles are siblings: fewer than they look
    assert abs(mean - wanted) < 4 * math.sqrt(width / size)
    assert abs(variance - width) < 4 * width * math.sqrt(2 / size)
    estimate = float(found.log_weights.logsumexp(0)) - math.log(COUNT)
    assert abs(estimate - log_mean) < 4 / math.sqrt(size)
    if eta != 1 and not below:
        plain = float(at.mean())  # without weights it is another distribution
        assert abs(plain - wanted) > 6 * math.sqrt(width / COUNT)


def test_the_right_guidance_has_even_weights() -> None:
    # Steps are finite, so not quite; another eta is worse, none at all worse still.
    sizes = [float(kish(sampled(eta).log_weights)) / COUNT for eta in (1.0, 1.5, 0.0)]
    assert sizes[0] > 0.95
    assert sizes[1] < 0.85 * sizes[0]
    assert sizes[2] < 0.85 * sizes[1]


def test_resampling_follows_the_effective_size() -> None:
    found, never = sampled(1.5, 0.9), sampled(1.5)
    assert torch.equal(never.ancestors, torch.arange(COUNT))
    assert len(found.ancestors.unique()) < COUNT
    assert len(found.ess) == STEPS
    assert max(found.ess) <= COUNT + 1e-6
    assert float(kish(found.log_weights)) > float(kish(never.log_weights))


def test_rotations_are_weighed_too() -> None:
    count = 800
    generator = torch.Generator().manual_seed(0)
    turns = exp_rotation(1.5 * torch.randn(3, 1, 3, generator=generator, dtype=torch.float64))
    structures = Frames(turns, torch.zeros(3, 1, 3, dtype=torch.float64))
    energies = torch.tensor([1.0, 0.0, 0.4], dtype=torch.float64)
    oracle = FiniteSet(PROCESS, structures, torch.zeros(3).double(), everyone(1))
    found = twisted(
        oracle,
        lambda x, t: oracle.force(x, t, energies),
        PROCESS,
        everyone(count, 1),
        Draws(count, 1),
        terminal=lambda x, t: oracle.energy(x, t, energies),
        eta=1.6,
        steps=50,
        grid="quadratic",
    )
    share = oracle.posterior(found.x, PROCESS.t_min)
    weighted, plain = found.log_weights.softmax(0) @ share, share.mean(0)
    expected = (-energies).softmax(0)
    error = 4 * (expected * (1 - expected) / float(kish(found.log_weights))).sqrt()
    assert bool(((weighted - expected).abs() < error).all())
    assert bool(((plain - expected).abs() > 2 * (0.25 / count) ** 0.5).any())


def test_the_last_score_is_the_guided_one() -> None:
    # Denoising by the base's would undo guidance below t_min.
    found = sampled(1.5)
    expected = base(found.x, PROCESS.t_min).plus(force(found.x, PROCESS.t_min), -1.5)
    torch.testing.assert_close(found.score.translation, expected.translation)


def test_kish() -> None:
    assert float(kish(torch.full((7,), 3000.0))) == pytest.approx(7, rel=1e-3)
    assert float(kish(torch.tensor([0.0, -2000.0]))) == pytest.approx(1)
    weights = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 0.5]])
    expected = weights.sum(1) ** 2 / (weights**2).sum(1)
    torch.testing.assert_close(kish(weights.log()), expected)


@pytest.mark.parametrize("uniform", [0.0, 0.37, 0.999])
def test_systematic_resampling_is_never_off_by_one(uniform: float) -> None:
    log_weights = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = systematic(log_weights, uniform)
    counts = torch.bincount(kept, minlength=50)
    assert float((counts - 50 * log_weights.softmax(0)).abs().max()) < 1
    assert len(kept) == 50


def test_bad_input() -> None:
    def run(**options: object) -> Population:
        given = {"terminal": energy, "steps": 2} | options
        return twisted(base, None, PROCESS, everyone(3, 2), Draws(3, 2), **given)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="resampling needs a twist and a generator"):
        run(resample_below=0.5)
    with pytest.raises(SparringError, match="weights are not finite"):
        run(terminal=lambda x, t: on_line(x) * math.inf)
