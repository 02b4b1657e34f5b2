"""SPIN-Diffusion's losses against closed forms (specification, oracles 12 to 17; the targets'
forms of oracle 15 are in test_process.py, oracle 18 is in test_train.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparring.diffusion.spin.losses import (
    decoupled_loss,
    denoising_error,
    guard,
    margin,
    scale_gradient,
    trajectory_loss,
)


def images(seed: int, count: int = 6, shape: tuple[int, ...] = (2, 3, 3)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, *shape), generator=generator, dtype=torch.float64)


def test_at_the_start_the_loss_is_log_two_with_a_known_gradient() -> None:
    """Oracle 12: grad = beta/4 grad(winner - loser)."""
    network = nn.Linear(18, 18).double()
    x, noise = images(0).flatten(1), images(2).flatten(1)
    y, other = images(1).flatten(1), images(3).flatten(1)
    with torch.no_grad():
        ours = denoising_error(network(x), noise), denoising_error(network(y), other)
    winner = denoising_error(network(x), noise)
    loser = denoising_error(network(y), other)
    z = margin(winner, loser, *ours)
    loss = decoupled_loss(z, beta=7.0).mean()
    assert not bool((z != 0).any())
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-7)
    (found,) = torch.autograd.grad(loss, network.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(7.0 / 4 * (winner - loser).mean(), network.weight)
    assert float(expected.abs().max()) > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_equal_images_have_no_gradient_and_swapping_turns_the_margin_round() -> None:
    """Oracle 13."""
    errors = [torch.rand(5, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    w, x, rw, rx = errors
    torch.testing.assert_close(margin(w, x, rw, rx), -margin(x, w, rx, rw))
    # One image twice with one noise: whatever the network, nothing is to be learnt.
    network, opponent = nn.Linear(18, 18).double(), nn.Linear(18, 18).double()
    image, noise = images(0).flatten(1), images(1).flatten(1)
    ours = [denoising_error(network(some), noise) for some in (image, image.clone())]
    theirs = [denoising_error(opponent(some), noise) for some in (image, image.clone())]
    z = margin(*ours, *theirs)
    assert not bool(z.any())
    assert bool(((ours[0] - theirs[0]).abs() > 1e-3).all())
    loss = decoupled_loss(z, beta=3.0).sum()
    (gradient,) = torch.autograd.grad(loss, network.weight)
    assert float(gradient.abs().max()) < 1e-15
    assert float(decoupled_loss(margin(w, x, rw, rx), beta=0.0).max()) == pytest.approx(math.log(2))


def test_the_link_comes_before_the_mean() -> None:
    """Oracle 16: -log sigmoid of the mean margin is another number."""
    z = torch.tensor([-4.0, 4.0])
    expected = np.log1p(np.exp([8.0, -8.0])).mean()
    assert float(decoupled_loss(z, beta=4.0).mean()) == pytest.approx(expected, rel=1e-6)
    assert float(decoupled_loss(z, beta=4.0, link="hinge").mean()) == pytest.approx(4.5)


def test_beta_means_the_same_at_every_resolution_and_weights_scale_it() -> None:
    small, large = images(0), images(0).repeat_interleave(4, 2).repeat_interleave(4, 3)
    zero = torch.zeros(1)
    torch.testing.assert_close(denoising_error(small, zero), denoising_error(large, zero))
    z, weight = torch.tensor([0.3, -0.2]), torch.tensor([2.0, 5.0])
    torch.testing.assert_close(
        decoupled_loss(z, beta=1.0, weight_B=weight), decoupled_loss(z * weight, beta=1.0)
    )


def test_the_decoupled_loss_bounds_that_of_trajectories() -> None:
    """Oracle 15: Jensen, with beta/2 weight_t = T scale_t."""
    margins = torch.randn((40, 9), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(9, generator=torch.Generator().manual_seed(1))
    for link in ("logistic", "hinge"):
        exact = trajectory_loss(margins, scale, link=link)
        steps = [
            decoupled_loss(margins[:, t], beta=2.0, weight_B=9 * scale[t].expand(40), link=link)
            for t in range(9)
        ]
        mean = torch.stack(steps).mean(0)
        assert bool((mean >= exact - 1e-6).all())
        assert float((mean - exact).max()) > 0.1
    even = margins[:, :1].expand(40, 9)  # equal terms: no gap
    torch.testing.assert_close(
        trajectory_loss(even, torch.full((9,), 0.5)), decoupled_loss(even[:, 0], beta=9.0)
    )


def test_means_and_noise_give_one_loss_after_their_conversion() -> None:
    """Oracle 15: mu~ - mu_theta of DDPM's posterior against eps - eps_theta, at one step.

    lambda / (2 sigma^2) |mu~ - mu|^2 = beta / 2 weight mean|eps - eps_theta|^2 with beta weight =
    lambda D (1 - a)^2 / (sigma^2 a (1 - alpha_bar_t)), a = alpha_bar_t / alpha_bar_s.
    """
    bar_s, bar_t = 0.7, 0.55
    a, lam, dimensions = bar_t / bar_s, 0.9, 18
    sigma2 = (1 - bar_s) / (1 - bar_t) * (1 - a)
    noise = images(1)
    errors: dict[str, list[Tensor]] = {"mean": [], "noise": []}
    for image, guess in ((0, 2), (3, 4), (0, 5), (3, 6)):  # winner and loser, by both networks
        x0, predicted = images(image), images(guess)
        x = math.sqrt(bar_t) * x0 + math.sqrt(1 - bar_t) * noise

        def mean(clean: Tensor, x: Tensor = x) -> Tensor:  # of q(x_s | x_t, x_0), from Bayes
            over = math.sqrt(bar_s) * (1 - a) * clean + math.sqrt(a) * (1 - bar_s) * x
            return over / (1 - bar_t)

        guessed = (x - math.sqrt(1 - bar_t) * predicted) / math.sqrt(bar_t)
        errors["mean"].append((mean(x0) - mean(guessed)).square().flatten(1).sum(1))
        errors["noise"].append(denoising_error(predicted, noise))
    scale = torch.tensor([lam / (2 * sigma2)], dtype=torch.float64)
    exact = trajectory_loss(margin(*errors["mean"])[:, None], scale)
    weight = dimensions * (1 - a) ** 2 / (sigma2 * a * (1 - bar_t))
    found = decoupled_loss(
        margin(*errors["noise"]), beta=lam, weight_B=torch.full((6,), weight, dtype=torch.float64)
    )
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("like_data", [True, False])
def test_the_mean_gradient_vanishes_where_losers_are_like_data(like_data: bool) -> None:
    """Oracle 14: at the start, as 1/sqrt(n) for losers from the data's law, else not at all.

    Data N(1, 1), the opponent's network that of N(m_k, 1), m_k = 0: it made the losers, or not.
    """
    generator = torch.Generator().manual_seed(0)
    repeats, m_k = 400, 0.0

    def rms(n: int) -> float:
        """Of the gradient over n pairs, over independent repeats."""
        a = torch.rand((repeats, n), generator=generator, dtype=torch.float64)
        noise, real, fake = (
            torch.randn((repeats, n), generator=generator, dtype=torch.float64) for _ in range(3)
        )
        mu = torch.full((repeats, 1), m_k, dtype=torch.float64, requires_grad=True)

        def error(x0: Tensor, centre: Tensor | float) -> Tensor:
            x = a.sqrt() * x0 + (1 - a).sqrt() * noise
            return (noise - (1 - a).sqrt() * (x - a.sqrt() * centre)).square()

        winner, loser = real + 1, fake + (1 if like_data else m_k)
        z = margin(error(winner, mu), error(loser, mu), error(winner, m_k), error(loser, m_k))
        loss = decoupled_loss(z.flatten(), beta=20.0).view(repeats, n).mean(1).sum()
        (gradient,) = torch.autograd.grad(loss, mu)
        return float(gradient.square().mean().sqrt())

    few, many = rms(50), rms(3200)
    expected = 8.0 if like_data else 1.0
    assert few / many == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize(("beta", "alpha_bar"), [(8.0, 0.5), (20.0, 0.3), (50.0, 0.9)])
def test_one_fixed_step_moves_a_gaussian_by_the_closed_form(beta: float, alpha_bar: float) -> None:
    """Oracle 17: m_{k+1} = m_k + (m - m_k) / (beta alpha_bar (1 - alpha_bar)).

    Data N(m, 1), iterate N(m_k, 1), prediction sqrt(1-a) (x_t - sqrt(a) mu), shared noise: it
    cancels, and beta/2 margin = beta/2 * 2 a (1-a) (mu - m_k) (w - l). The minimum over mu is found
    by bisection on the gradient, on exact normal quadrature.
    """
    m, m_k = 1.5, -0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = torch.tensor(weights / weights.sum())
    # w - l ~ N(m - m_k, 2)
    gap = torch.tensor(m - m_k + math.sqrt(2) * nodes)
    noise = torch.tensor(0.37, dtype=torch.float64)
    winner_image = gap + 0.2
    loser_image = torch.full_like(gap, 0.2)

    def errors(x0: Tensor, mu: Tensor | float) -> Tensor:
        x = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise
        return (noise - math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar) * mu)).square()

    def slope(value: float) -> float:
        mu = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        z = margin(
            errors(winner_image, mu),
            errors(loser_image, mu),
            errors(winner_image, m_k),
            errors(loser_image, m_k),
        )
        loss = (weights * decoupled_loss(z, beta=beta)).sum()
        return float(torch.autograd.grad(loss, mu)[0])

    low, high = m_k, m_k + 30.0
    assert slope(low) < 0 < slope(high)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    assert low == pytest.approx(m_k + (m - m_k) / (beta * alpha_bar * (1 - alpha_bar)), rel=1e-6)


def test_the_guard_keeps_the_winners_error_from_growing() -> None:
    """A step on the predictions themselves: with the guard the winner's error does not rise."""
    target, start = images(0), images(1)
    winner = start.clone()
    for overlap in (0.5, 1.5, 4.0):  # of the loser's residual with the winner's
        loser_residual = overlap * (winner - target) + 0.3 * images(2)
        factor = guard(winner - target, loser_residual)
        step = 1e-4 * ((winner - target) - factor[:, None, None, None] * loser_residual)
        change = denoising_error(winner - step, target) - denoising_error(winner, target)
        assert float(change.max()) < 1e-6
        assert bool((factor <= 1).all())
        assert bool((factor < 1).any()) == (overlap > 1)


def test_a_scaled_gradient_leaves_the_value() -> None:
    value = torch.tensor([2.0, 3.0], requires_grad=True)
    scaled = scale_gradient(value, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(scaled, value)
    (gradient,) = torch.autograd.grad(scaled.sum(), value)
    assert gradient.tolist() == [0.25, 1.0]


def test_bad_arguments_name_their_value() -> None:
    z = torch.zeros(2)
    with pytest.raises(ValueError, match="link must be one of logistic, hinge; got 'square'"):
        decoupled_loss(z, beta=1.0, link="square")
    with pytest.raises(ValueError, match="beta must be a finite number from 0 up, got -1"):
        decoupled_loss(z, beta=-1.0)
    with pytest.raises(ValueError, match="one shape"):
        margin(z, z, z, torch.zeros(3))
