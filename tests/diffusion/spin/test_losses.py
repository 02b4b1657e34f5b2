"""SPIN-Diffusion's losses against closed forms (specification, oracles 12 to 17)."""

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
    mean_error_factor,
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
    same = w.clone().requires_grad_()
    loss = decoupled_loss(margin(same, same, rw, rw), beta=3.0).sum()
    (gradient,) = torch.autograd.grad(loss, same)
    assert not bool(gradient.any())
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


def test_errors_of_means_and_of_noise_differ_by_a_factor() -> None:
    """Oracle 15: mu~ - mu_theta of DDPM's posterior against eps - eps_theta."""
    bar_s, bar_t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.55, dtype=torch.float64)
    x0, noise, predicted = images(0), images(1), images(2)
    x = bar_t.sqrt() * x0 + (1 - bar_t).sqrt() * noise
    a = bar_t / bar_s

    def mean(clean: Tensor) -> Tensor:  # of q(x_s | x_t, x_0), from Bayes
        return (bar_s.sqrt() * (1 - a) * clean + a.sqrt() * (1 - bar_s) * x) / (1 - bar_t)

    guess = (x - (1 - bar_t).sqrt() * predicted) / bar_t.sqrt()
    means = (mean(x0) - mean(guess)).square().sum()
    noises = (noise - predicted).square().sum()
    torch.testing.assert_close(means / noises, mean_error_factor(bar_s, bar_t))


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
