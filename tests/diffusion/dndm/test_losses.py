"""Training losses against enumeration: bounds, weights, smoothing."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_law import (
    ABSORBING,
    ALL,
    MASK,
    UNIFORM,
    K,
    N,
    absorbing_net,
    ancestral_law,
    bayes,
    conditioned_net,
    data_law,
    uniform_net,
)

from sparring.diffusion.dndm import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    Noise,
    Schedule,
    corrupt,
    cross_entropy,
    draw_times,
    variational_term,
    weight,
)
from sparring.diffusion.dndm.losses import WEIGHTINGS

LAW = data_law(5, 1.0)
ENTROPY = float(-(LAW * np.log(LAW)).sum())
MASKS = list(itertools.product([False, True], repeat=N))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_cross_entropy(x0: torch.Tensor, t: float, alpha: float) -> torch.Tensor:
    """(B,) E over masks at time t of the cross-entropy of masked tokens."""
    total = torch.zeros(len(x0), dtype=torch.float64)
    for mask in MASKS:
        hidden = torch.tensor(mask).expand_as(x0)
        x = torch.where(hidden, MASK, x0)
        time = torch.full((len(x),), t, dtype=torch.float64)
        logits = absorbing_net(LAW)(x, time, hidden)
        chance = math.prod((1 - alpha) if h else alpha for h in mask)
        total += chance * cross_entropy(logits, x0, hidden, noise=ABSORBING)
    return total


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_the_bound_of_a_perfect_network_is_tight_for_infinitely_many_steps(
    schedule: Schedule,
) -> None:
    """Oracle 11: E_t of the reciprocal weight times the loss is the entropy of the data."""
    chance = torch.from_numpy(LAW[ALL[:, 0], ALL[:, 1]])

    def bound(t: float) -> float:
        time = torch.tensor([t], dtype=torch.float64)
        factor = weight(time, steps=math.inf, schedule=schedule, kind="reciprocal")
        ce = masked_cross_entropy(ALL, t, float(schedule.alpha(time)))
        return float(factor * (chance * ce).sum())

    # Polynomials or cosines of t: a few nodes are enough.
    nodes, weights = np.polynomial.legendre.leggauss(12)
    mean = sum(w / 2 * bound((1 + n) / 2) for n, w in zip(nodes, weights, strict=True))
    assert mean == pytest.approx(ENTROPY, abs=1e-9)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_the_bound_of_masks(schedule: Schedule, steps: int) -> None:
    """Oracle 11: above -log p for every x_0, and the weighted cross-entropy is the KL's sum."""
    alphas = schedule.grid(steps).tolist()
    net = absorbing_net(LAW)
    weighted = torch.zeros(len(ALL), dtype=torch.float64)
    kl = torch.zeros_like(weighted)
    for step in range(1, steps + 1):
        t = torch.full((1,), step / steps, dtype=torch.float64)
        factor = weight(t, steps=steps, schedule=schedule, kind="reciprocal")
        weighted += factor * masked_cross_entropy(ALL, step / steps, alphas[step]) / steps
        for mask in MASKS:
            hidden = torch.tensor(mask).expand_as(ALL)
            x = torch.where(hidden, MASK, ALL)
            chance = math.prod((1 - alphas[step]) if h else alphas[step] for h in mask)
            before, now = (
                torch.full((len(x),), alphas[s], dtype=torch.float64) for s in (step - 1, step)
            )
            logits = net(x, now, hidden)
            kl += chance * variational_term(logits, x, ALL, before, now, noise=ABSORBING)
    torch.testing.assert_close(weighted, kl, rtol=0, atol=1e-11)
    model = ancestral_law(net, ABSORBING, alphas)
    exact = -np.log(model[ALL[:, 0], ALL[:, 1]])
    assert bool((weighted.numpy() >= exact - 1e-11).all())
    if steps == 1:  # a single step has no latent that is not certain
        np.testing.assert_allclose(weighted.numpy(), exact, atol=1e-11)
    else:
        mean = float((torch.from_numpy(LAW[ALL[:, 0], ALL[:, 1]]) * weighted).sum())
        assert mean > ENTROPY - 1e-12


@pytest.mark.parametrize("steps", [2, 12])
def test_the_bound_of_uniform_noise(steps: int) -> None:
    """Oracle 11 for multinomial noise: the sum of KL terms bounds -log p, by enumeration of x_t."""
    alphas = [1 - t / steps for t in range(steps + 1)]
    net = uniform_net(LAW)
    bound = np.zeros(len(ALL))
    for step in range(1, steps + 1):
        for x_t in ALL:
            x = x_t.expand_as(ALL)
            same = (x == ALL).double()
            chance = (alphas[step] * same + (1 - alphas[step]) / K).prod(1)
            t = torch.full((len(x),), step / steps, dtype=torch.float64)
            before, now = (
                torch.full((len(x),), alphas[s], dtype=torch.float64) for s in (step - 1, step)
            )
            logits = net(x, t, torch.zeros_like(x, dtype=torch.bool))
            term = variational_term(logits, x, ALL, before, now, noise=UNIFORM)
            assert bool((term >= -1e-12).all())
            bound += (chance * term).numpy()
    exact = -np.log(ancestral_law(net, UNIFORM, alphas)[ALL[:, 0], ALL[:, 1]])
    assert (bound >= exact - 1e-10).all()
    assert (bound - exact).max() < 1


def test_kl_against_plain_numbers() -> None:
    """One token, one step, by Bayes' rule in numpy."""
    p = np.array([0.5, 0.2, 0.3])
    post = bayes(0.7, 0.4, np.full(3, 1 / 3))
    q, mean = post[1, 2], p @ post[1]
    wanted = float((q * np.log(q / mean)).sum())
    before, now = (torch.tensor([a], dtype=torch.float64) for a in (0.7, 0.4))
    logits = torch.from_numpy(np.log(p)).view(1, 1, 3).requires_grad_()
    x, x0 = torch.tensor([[1]]), torch.tensor([[2]])
    found = variational_term(logits, x, x0, before, now, noise=UNIFORM)
    assert found.tolist() == pytest.approx([wanted], abs=1e-14)
    found.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    fixed = torch.zeros(1, 1, dtype=torch.bool)
    free = variational_term(logits, x, x0, before, now, noise=UNIFORM, free_BN=fixed)
    assert free.tolist() == [0]


def test_conditioned_on_the_schedule_uniform_noise_has_the_masks_loss() -> None:
    """The network is told what is noise, and all of that is counted: x_t = x_0 by chance too."""
    t = torch.full((400,), 0.6, dtype=torch.float64)
    x0 = ALL[torch.randint(0, 9, (400,), generator=seeded())]
    settings = {"schedule": LinearSchedule(), "generator": seeded(1)}
    (made,) = corrupt(x0, t, noise=UNIFORM, **settings)
    logits = conditioned_net(LAW)(made.x_BN, t, made.noisy_BN)
    ours = cross_entropy(logits, x0, made.noisy_BN, noise=UNIFORM)
    hidden = torch.where(made.noisy_BN, MASK, x0)
    masked = cross_entropy(
        absorbing_net(LAW)(hidden, t, made.noisy_BN), x0, made.noisy_BN, noise=ABSORBING
    )
    torch.testing.assert_close(ours, masked, rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 50])
def test_weights(steps: int) -> None:
    """RDM's weights, for its index t - 1 in 0..T-1."""
    t = torch.arange(1, steps + 1) / steps
    settings = {"steps": steps, "schedule": LinearSchedule()}
    index = torch.arange(steps, dtype=torch.float64)
    ours = [weight(t, kind=kind, **settings) for kind in WEIGHTINGS]
    torch.testing.assert_close(ours[0], 1 - index / steps, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], steps / (index + 1), rtol=1e-6, atol=1e-6)
    assert ours[2].tolist() == [1] * steps


def beta_cdf(a: int, b: int, t: Fraction) -> Fraction:
    """P(Beta(a, b) <= t) for whole a and b, exactly: the tail of a binomial."""
    n = a + b - 1
    return sum((math.comb(n, j) * t**j * (1 - t) ** (n - j) for j in range(a, n + 1)), Fraction())


@pytest.mark.parametrize(("a", "b"), [(17, 4), (5, 3), (100, 4)])
def test_weights_of_a_beta(a: int, b: int) -> None:
    """Against exact fractions, where 1 - alpha is far below the last bit of 1; and for T = inf."""
    steps, schedule = 50, BetaSchedule(a, b)
    cdf = [beta_cdf(a, b, Fraction(t, steps)) for t in range(steps + 1)]
    wanted = [float(steps * (1 - before / now)) for before, now in itertools.pairwise(cdf)]
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    settings = {"schedule": schedule, "kind": "reciprocal"}
    found = weight(t, steps=steps, **settings)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9)
    # As t falls, density / cdf is a / t (1 + O(t)); below the smallest float there is no noise.
    small = torch.tensor([1e-3, 2e-3, 1e-300], dtype=torch.float64)
    found = weight(small, steps=math.inf, **settings)
    np.testing.assert_allclose(found[:2].numpy(), a / small[:2].numpy(), rtol=1e-2)
    assert float(found[2]) == 0


def test_continuous_weights_are_the_limit() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for schedule in (LinearSchedule(), CosineSchedule()):
        for kind in WEIGHTINGS:
            far = weight(t, steps=10**7, schedule=schedule, kind=kind)
            limit = weight(t, steps=math.inf, schedule=schedule, kind=kind)
            torch.testing.assert_close(far, limit, rtol=1e-5, atol=1e-6)
    linear = weight(t, steps=math.inf, schedule=LinearSchedule(), kind="reciprocal")
    torch.testing.assert_close(linear, 1 / t)


def test_monte_carlo_over_time_agrees_with_the_sum() -> None:
    """Oracle 11: t ~ U and the weight estimate the bound without bias; so do coupled times."""
    rows, steps, schedule = 20000, 6, CosineSchedule()
    chances = torch.from_numpy(LAW[ALL[:, 0], ALL[:, 1]])
    exact = 0.0
    for step in range(1, steps + 1):
        t = torch.full((1,), step / steps, dtype=torch.float64)
        ce = masked_cross_entropy(ALL, step / steps, float(schedule.alpha(t)))
        factor = weight(t, steps=steps, schedule=schedule, kind="reciprocal")
        exact += float(factor * (chances * ce).sum()) / steps
    x0 = ALL[torch.multinomial(chances, rows, replacement=True, generator=seeded())]
    net = absorbing_net(LAW)
    for times in (1, 2):
        t = draw_times(rows, steps, seeded(2), times=times)
        made = corrupt(x0, *t, schedule=schedule, noise=ABSORBING, generator=seeded(3))
        losses = torch.zeros(rows, dtype=torch.float64)
        for each in made:
            logits = net(each.x_BN, each.t_B, each.noisy_BN)
            factor = weight(each.t_B, steps=steps, schedule=schedule, kind="reciprocal")
            loss = cross_entropy(logits, x0, each.noisy_BN, noise=ABSORBING)
            losses += factor * loss / times
        error = float(losses.std()) / math.sqrt(rows)
        assert abs(float(losses.mean()) - exact) < 4 * error


def test_times_of_training() -> None:
    (t,) = draw_times(6000, 4, seeded())
    counts = np.bincount((t * 4).long().numpy(), minlength=5)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3
    late, early = draw_times(500, math.inf, seeded(), times=2)
    assert bool((late >= early).all())
    assert bool(((early > 0) & (late <= 1)).all())


@pytest.mark.parametrize("noise", [ABSORBING, UNIFORM], ids=["absorbing", "uniform"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(noise: Noise, smoothing: float) -> None:
    """Against log-sum-exp in numpy; the mask has no part in the smoothing."""
    size = noise.vocab_size
    logits = torch.randn(2, 3, size, generator=seeded(), dtype=torch.float64)
    x0 = torch.tensor([[0, 2, 1], [1, 1, 0]])
    counted = torch.tensor([[True, False, True], [False, False, False]])
    z = logits.numpy()[..., :K]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    wanted = np.zeros(2)
    for b, n in itertools.product(range(2), range(3)):
        nll = -logp[b, n, x0[b, n]]
        wanted[b] += counted[b, n] * ((1 - smoothing) * nll - smoothing * logp[b, n].mean())
    found = cross_entropy(logits, x0, counted, noise=noise, label_smoothing=smoothing)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-13)
    assert float(found[1]) == 0
    half = cross_entropy(logits.half(), x0, counted, noise=noise, label_smoothing=smoothing)
    assert half.dtype == torch.float32
    live = logits.clone().requires_grad_()
    cross_entropy(live, x0, counted, noise=noise, label_smoothing=smoothing).sum().backward()
    assert live.grad is not None
    assert bool(live.grad.isfinite().all())


LOGITS, X0, COUNTED = (
    torch.zeros(1, 2, 3),
    torch.zeros(1, 2, dtype=torch.long),
    torch.ones(1, 2, dtype=torch.bool),
)
BAD = [
    (
        lambda: cross_entropy(LOGITS, X0, COUNTED, noise=UNIFORM, label_smoothing=1.0),
        r"label_smoothing must lie in \[0, 1\), not 1.0",
    ),
    (lambda: cross_entropy(LOGITS, X0, COUNTED, noise=ABSORBING), "logits have 3 tokens"),
    (
        lambda: weight(torch.ones(1), steps=5, schedule=LinearSchedule(), kind="elbo"),  # type: ignore[arg-type]
        "weighting must be one of .*'elbo'",
    ),
    (
        lambda: weight(torch.zeros(1), steps=5, schedule=LinearSchedule(), kind="none"),
        r"times must lie in \(0, 1\]",
    ),
    (lambda: draw_times(3, 0, seeded()), "steps must be .* not 0"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
