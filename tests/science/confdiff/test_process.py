"""The forward process: coefficients, draws, scores, padding."""

from __future__ import annotations

import math

import pytest
import torch
from confdiff_inputs import draws, everyone, frames
from scipy.stats import kstest

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.igso3 import exp_rotation, log_rotation
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Tangent, moved_along

PROCESS = Process()


def test_coefficients() -> None:
    assert float(PROCESS.std(0.01)) == pytest.approx(0.0446, abs=5e-5)
    assert float(PROCESS.alpha(1.0)) == pytest.approx(0.0066, abs=5e-5)
    assert float(PROCESS.sigma(0.01)) == pytest.approx(0.1301, abs=5e-5)
    assert float(PROCESS.sigma(1.0)) == pytest.approx(1.5)
    t, step = torch.linspace(0.05, 0.95, 7, dtype=torch.float64), 1e-5
    ends = PROCESS.beta_integral(t + step) - PROCESS.beta_integral(t - step)
    torch.testing.assert_close(PROCESS.beta(t), ends / (2 * step))
    squares = PROCESS.sigma(t + step) ** 2 - PROCESS.sigma(t - step) ** 2
    torch.testing.assert_close(PROCESS.rotation_rate(t), squares / (2 * step), rtol=1e-6, atol=0)
    torch.testing.assert_close(PROCESS.std(t) ** 2 + PROCESS.alpha(t) ** 2, torch.ones_like(t))


def test_noised_moments() -> None:
    count, size, t = 4000, 3, 0.3
    clean = frames(1, size)
    many = Frames(*(x.expand(count, *x.shape[1:]) for x in (clean.rotations, clean.translations)))
    noised = PROCESS.noised(many, t, everyone(count, size), draws(count, size))
    assert float(noised.translations.sum(1).abs().max()) < 1e-12
    centre = clean.translations - clean.translations.mean(1, keepdim=True)
    apart = noised.translations - PROCESS.alpha(t) * centre
    # P leaves (1 - 1/N) of the variance; 4 standard errors of a variance of 4000 x 3 numbers.
    variance = float(PROCESS.std(t) ** 2) * (1 - 1 / size)
    error = 4 * variance * math.sqrt(2 / (count * 3))
    assert bool(((apart**2).mean((0, 2)) - variance).abs().lt(error).all())
    turned = (clean.rotations.mT @ noised.rotations).diagonal(dim1=-2, dim2=-1).sum(-1)
    expected = 3 * math.exp(-(float(PROCESS.sigma(t)) ** 2))
    assert abs(float(turned.mean()) - expected) < 4 * float(turned.std()) / math.sqrt(count * size)


def test_times_of_samples() -> None:
    clean, noise, t = frames(3, 4), draws(3, 4), torch.tensor([0.1, 0.5, 1.0])
    together = PROCESS.noised(clean, t, everyone(3, 4), noise)
    for i in range(3):
        one = slice(i, i + 1)
        alone = PROCESS.noised(
            clean[one],
            float(t[i]),
            everyone(1, 4),
            Tangent(noise.translation[one], noise.rotation[one]),
        )
        torch.testing.assert_close(together.translations[one], alone.translations)
        torch.testing.assert_close(together.rotations[one], alone.rotations)


def test_padding_changes_nothing() -> None:
    padded, noise = frames(2, 9), draws(2, 9)
    mask = torch.arange(9).expand(2, 9) < 5
    short, few = padded[:, :5], Tangent(noise.translation[:, :5], noise.rotation[:, :5])
    for t in (0.2, torch.tensor([0.2, 0.9])):
        long = PROCESS.noised(padded, t, mask, noise)
        alone = PROCESS.noised(short, t, everyone(2, 5), few)
        torch.testing.assert_close(long.translations[:, :5], alone.translations)
        torch.testing.assert_close(long.rotations[:, :5], alone.rotations)
        assert float(long.translations[:, 5:].abs().max()) == 0
        torch.testing.assert_close(long.rotations[:, 5:], padded.rotations[:, 5:])
        score = PROCESS.score_given(long, padded, t, mask)
        other = PROCESS.score_given(alone, short, t, everyone(2, 5))
        torch.testing.assert_close(score.translation[:, :5], other.translation)
        torch.testing.assert_close(score.rotation[:, :5], other.rotation)
        assert float(score.translation[:, 5:].abs().max()) == 0
        assert float(score.rotation[:, 5:].abs().max()) == 0
        torch.testing.assert_close(
            PROCESS.log_prob(long, padded, t, mask),
            PROCESS.log_prob(alone, short, t, everyone(2, 5)),
        )
    prior, alone = PROCESS.prior(mask, noise), PROCESS.prior(everyone(2, 5), few)
    torch.testing.assert_close(prior.translations[:, :5], alone.translations)
    torch.testing.assert_close(prior.rotations[:, :5], alone.rotations)


def test_score_is_the_gradient_along_the_body_and_not_in_space() -> None:
    clean, t, step, mask = frames(6, 3), torch.linspace(0.05, 0.9, 6), 1e-5, everyone(6, 3)
    x = PROCESS.noised(clean, t, mask, draws(6, 3))
    score, way = PROCESS.score_given(x, clean, t, mask), draws(6, 3, seed=9).projected(mask)
    ends = [
        PROCESS.log_prob(moved_along(x, way.times(sign * step)), clean, t, mask) for sign in (1, -1)
    ]
    torch.testing.assert_close(
        score.dot(way), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-4
    )
    spun = [
        PROCESS.log_prob(
            Frames(exp_rotation(sign * step * way.rotation) @ x.rotations, x.translations),
            clean,
            t,
            mask,
        )
        for sign in (1, -1)
    ]
    in_space = (spun[0] - spun[1]) / (2 * step)
    along_body = (score.rotation * way.rotation).sum((-1, -2))
    assert float((in_space - along_body).abs().min()) > 0.05


def test_score_does_not_move_the_centre_and_knows_no_place() -> None:
    clean, mask = frames(2, 4), everyone(2, 4)
    x = PROCESS.noised(clean, 0.4, mask, draws(2, 4))
    score = PROCESS.score_given(x, clean, 0.4, mask)
    assert float(score.translation.sum(1).abs().max()) < 1e-12
    away = Frames(clean.rotations, clean.translations + 7)
    moved = PROCESS.score_given(x, away, 0.4, mask)
    torch.testing.assert_close(moved.translation, score.translation)


def test_conversions_round_trip() -> None:
    clean, mask, noise = frames(3, 4), everyone(3, 4), draws(3, 4)
    t = torch.tensor([0.02, 0.3, 1.0])
    x = PROCESS.noised(clean, t, mask, noise)
    score = PROCESS.score_given(x, clean, t, mask)
    eps = PROCESS.eps_of(score, t)
    torch.testing.assert_close(eps.translation, noise.projected(mask).translation)
    back = PROCESS.score_of(eps, t)
    torch.testing.assert_close(back.translation, score.translation)
    torch.testing.assert_close(back.rotation, score.rotation)
    found = PROCESS.denoised(x, score, t)
    centre = clean.translations - clean.translations.mean(1, keepdim=True)
    torch.testing.assert_close(found.translations, centre)
    # IGSO(3)'s score of a small angle is v (1 / sigma^2 - 1 / 12): off by v sigma^2 / 12.
    angle = log_rotation(clean.rotations.mT @ found.rotations).norm(dim=-1)[0]
    assert float(angle.max()) < 0.02 * float(PROCESS.sigma(0.02))


def test_prior_is_uniform_on_rotations() -> None:
    count = 6000
    prior = PROCESS.prior(everyone(count, 2), draws(count, 2))
    relative = log_rotation(prior.rotations[:, 0].mT @ prior.rotations[:, 1]).norm(dim=-1)
    for angle in (log_rotation(prior.rotations).norm(dim=-1).flatten(), relative):
        found = kstest(angle.numpy(), lambda w: (w - torch.as_tensor(w).sin().numpy()) / math.pi)
        assert found.pvalue > 1e-3
    # 1 nm in the one direction that is left of two residues' translations.
    apart = (prior.translations[:, 0] - prior.translations[:, 1]) / math.sqrt(2)
    assert abs(float((apart**2).mean()) - 1) < 4 * math.sqrt(2 / (3 * count))


def test_half_precision_of_inputs_is_kept() -> None:
    clean = frames(2, 3).to(torch.float32)
    noise = draws(2, 3).to(torch.float32)
    x = PROCESS.noised(clean, torch.tensor([0.1, 0.9]), everyone(2, 3), noise)
    assert x.rotations.dtype == x.translations.dtype == torch.float32
    score = PROCESS.score_given(x, clean, torch.tensor([0.1, 0.9]), everyone(2, 3))
    assert score.rotation.dtype == score.translation.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"b_min": 0.0}, "b_min"),
        ({"sigma_max": 0.05}, "sigma_min < sigma_max"),
        ({"t_min": 0.0}, "t_min must lie"),
    ],
)
def test_bad_schedules(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Process(**wrong)
