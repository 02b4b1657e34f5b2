"""Gradient estimators against sums over all trajectories of a tiny process with termination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_process import (
    GAMMA,
    HORIZON,
    Everything,
    chances,
    enumerate_all,
    estimates,
    exact_gradient,
    exact_objective,
    mean_and_variance,
    process,
    softmax,
)

from sparring.optimizers import RecursiveEstimator
from sparring.rl.baselines import Baseline
from sparring.rl.estimators import ESTIMATORS, baseline_signal, coefficients, importance_weights

BASELINE = torch.tensor([[0.7, -1.3, 2.1, 0.4]], dtype=torch.float64)


@pytest.fixture(scope="module")
def everything() -> Everything:
    return enumerate_all()


def test_the_enumeration_is_complete_and_agrees_with_dynamic_programming(
    everything: Everything,
) -> None:
    policy = softmax(0)
    assert len(everything.batch) == 1554
    assert float(chances(everything, policy).detach().sum()) == pytest.approx(1, abs=1e-12)
    lengths = everything.batch.alive_NH.sum(1)
    assert set(lengths.tolist()) == {1, 2, 3, 4}
    value = process().objective(policy, horizon=HORIZON, gamma=GAMMA).detach()
    expected = float(exact_objective(everything, policy).detach())
    assert float(value) == pytest.approx(expected, abs=1e-12)
    (found,) = process().gradient(policy, horizon=HORIZON, gamma=GAMMA)
    torch.testing.assert_close(found, exact_gradient(everything, policy), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_unbiased_on_and_off_policy(everything: Everything, estimator: str) -> None:
    """Oracle 1: to 1e-8, with a baseline, from one policy, another, and a mixture of both."""
    policy, other = softmax(0), softmax(1)
    true = exact_gradient(everything, policy)
    for behaviour in ([(1.0, policy)], [(1.0, other)], [(0.3, policy), (0.7, other)]):
        chance = sum(share * chances(everything, p).detach() for share, p in behaviour)
        rows = estimates(everything, policy, behaviour, estimator=estimator, baseline=BASELINE)
        mean, _ = mean_and_variance(chance, rows)
        torch.testing.assert_close(mean, true, rtol=0, atol=1e-8)


def test_the_masked_baseline_is_biased(everything: Everything) -> None:
    """Subtracting b_h only while an episode lives: wrong by far more than rounding."""
    policy, other = softmax(0), softmax(1)
    true = exact_gradient(everything, policy)
    masked = BASELINE * everything.batch.alive_NH
    for behaviour in (policy, other):
        chance = chances(everything, behaviour).detach()
        rows = estimates(everything, policy, [(1.0, behaviour)], baseline=masked)
        mean, _ = mean_and_variance(chance, rows)
        assert float((mean - true).abs().max()) > 0.02
    # Indexed by actions, the mask is right: steps that were not taken have no score.
    rows = estimates(everything, policy, [(1.0, policy)], estimator="pgt", baseline=masked)
    mean, _ = mean_and_variance(chances(everything, policy).detach(), rows)
    torch.testing.assert_close(mean, true, rtol=0, atol=1e-8)


def test_clipping_is_biased(everything: Everything) -> None:
    policy, other = softmax(0), softmax(1)
    rows = estimates(everything, policy, [(1.0, other)], clip=1.2)
    mean, _ = mean_and_variance(chances(everything, other).detach(), rows)
    assert float((mean - exact_gradient(everything, policy)).abs().max()) > 0.02


def test_weights_have_mean_one_and_a_mixture_bounds_them(everything: Everything) -> None:
    from sparring.rl.rollouts import log_probabilities

    with torch.no_grad():
        old, new = (log_probabilities(softmax(n, 2.0), everything.batch) for n in (0, 1))
        chance = chances(everything, softmax(1, 2.0))
        weights = importance_weights(old, [(1.0, new)])
        torch.testing.assert_close(
            chance @ weights, torch.ones(HORIZON, dtype=torch.float64), rtol=0, atol=1e-12
        )
        ratio = (old - new).exp().cumprod(1)
        torch.testing.assert_close(weights, ratio)
        mixed = importance_weights(old, [(0.75, new), (0.25, old)])
        torch.testing.assert_close(mixed, ratio / (0.75 + 0.25 * ratio))
        assert float(weights.max()) > 8
        assert float(mixed.max()) <= 4
        assert float(importance_weights(old, [(1.0, new)], clip=1.5).max()) == pytest.approx(1.5)
        assert torch.equal(importance_weights(new, [(1.0, new)]), torch.ones_like(new))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_bias_identity(everything: Everything, alpha: float) -> None:
    """Oracle 2: E[g_{t+1} | g_t] - grad J(new) = (1 - alpha) (g_t - grad J(old)), exactly."""
    old, new = softmax(0), softmax(1)
    chance = chances(everything, new).detach()
    here, there = (
        mean_and_variance(chance, estimates(everything, p, [(1.0, new)], baseline=BASELINE))[0]
        for p in (new, old)
    )
    before = torch.randn(
        here.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    recursion = RecursiveEstimator(1 - alpha)
    recursion.update([before])
    (after,) = recursion.update([here], [there])
    expected = (1 - alpha) * (before - exact_gradient(everything, old))
    torch.testing.assert_close(after - exact_gradient(everything, new), expected, rtol=0, atol=1e-8)


def test_variance_of_the_correction_is_quadratic_in_the_step(everything: Everything) -> None:
    """Oracle 3: the slope of log Var(d(new) - d^new(old)) against log |new - old|."""
    sizes, spread = (0.03, 0.1, 0.3), []
    direction = softmax(7).network[0].weight.detach()
    direction /= direction.norm()
    for size in sizes:
        old, new = softmax(0), softmax(0)
        with torch.no_grad():
            new.network[0].weight += size * direction
        difference = estimates(everything, new, [(1.0, new)]) - estimates(
            everything, old, [(1.0, new)]
        )
        spread.append(mean_and_variance(chances(everything, new).detach(), difference)[1])
    slope = np.polyfit(np.log(sizes), np.log(spread), 1)[0]
    assert 1.8 <= slope <= 2.2


def test_weights_by_step_vary_less_than_those_of_whole_trajectories(
    everything: Everything,
) -> None:
    old, new = softmax(0), softmax(1)
    chance = chances(everything, new).detach()
    by_step, whole = (
        mean_and_variance(chance, estimates(everything, old, [(1.0, new)], whole=w))[1]
        for w in (False, True)
    )
    assert by_step < whole


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 10_000))
def test_coefficients_by_loops(count: int, horizon: int, seed: int) -> None:
    """The equations written out, entry by entry."""
    rng = np.random.default_rng(seed)
    x, b, w = rng.normal(size=(3, count, horizon))
    w = np.abs(w)
    found = {
        name: coefficients(name, *(torch.from_numpy(v) for v in (x, b, w))).numpy()
        for name in ESTIMATORS
    }
    for i in range(count):
        for t in range(horizon):
            later = range(t, horizon)
            expected = {
                "gpomdp": sum(w[i, h] * (x[i, h] - b[i, h]) for h in later),
                "pgt": sum(w[i, h] * x[i, h] for h in later) - w[i, t] * b[i, t],
                "reinforce": w[i, -1] * (sum(x[i]) - b[i, t]),
            }
            for name in ESTIMATORS:
                assert found[name][i, t] == pytest.approx(expected[name], abs=1e-10)


def test_baselines() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 0.0], [5.0, 4.0]], dtype=torch.float64)
    alive = torch.tensor([[True, True], [True, False], [True, True]])
    every = torch.ones_like(alive)
    # The ended episode counts with its reward 0.
    expected = torch.tensor([[4.0, 2.0], [3.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    assert torch.equal(Baseline("loo").values(rewards, every), expected)
    # By actions, only living ones count.
    signal = baseline_signal("pgt", rewards)
    expected = torch.tensor([[6.0, 4.0], [6.0, 3.0], [3.0, 2.0]], dtype=torch.float64)
    assert torch.equal(Baseline("loo").values(signal, alive), expected)
    # Of two policies: a third and two thirds of what the others of each have.
    four = torch.tensor([[1.0], [3.0], [5.0], [7.0], [0.0], [6.0]], dtype=torch.float64)
    found = Baseline("loo").values(
        four, torch.ones(6, 1, dtype=torch.bool), [slice(2), slice(2, 6)]
    )
    assert found[0].item() == pytest.approx(3 / 3 + 2 / 3 * 18 / 4)
    assert found[2].item() == pytest.approx(2 / 3 + 2 / 3 * 13 / 3)
    total = torch.tensor([3.0, 3.0, 9.0], dtype=torch.float64)
    assert torch.equal(baseline_signal("reinforce", rewards), total[:, None].expand(3, 2))
    running = Baseline("running")
    assert torch.equal(running.values(rewards, every), torch.zeros(3, 2, dtype=torch.float64))
    assert torch.equal(running.values(rewards, every), torch.zeros(3, 2, dtype=torch.float64))
    running.advance()
    first = running.values(rewards + 1, every)
    running.advance()
    torch.testing.assert_close(first, rewards.mean(0).expand(3, 2))
    second = running.values(rewards, every)
    torch.testing.assert_close(second, first + 0.1)
    with pytest.raises(ValueError, match="at least 2 trajectories"):
        Baseline("loo").values(rewards[:1], every[:1])
    with pytest.raises(ValueError, match=r"baseline must be one of .* not 'mean'"):
        Baseline("mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(("olds", "size"), [(2, 4), (2, 5)])
def test_leaving_one_out_of_two_policies_is_unbiased(olds: int, size: int) -> None:
    """The mean estimate over all batches of a bandit with two arms, two policies having sampled."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)  # old, new
    logp = logits.log_softmax(1)
    rewards = torch.tensor([0.0, 1.0], dtype=torch.float64)
    scores = torch.tensor([0.0, 1.0]) - logp[0].exp()[1]  # of the old policy's second logit
    true = (logp[0].exp() * rewards * scores).sum()
    every = torch.ones(size, 1, dtype=torch.bool)
    sources = [slice(olds), slice(olds, None)]
    mean = torch.zeros((), dtype=torch.float64)
    for arms in itertools.product((0, 1), repeat=size):
        taken = torch.tensor(arms)
        chance = torch.cat([logp[0][taken[:olds]], logp[1][taken[olds:]]]).sum().exp()
        old, new = (of[taken, None] for of in logp)
        share = olds / size
        weights = importance_weights(old, [(1 - share, new), (share, old)])
        reward = rewards[taken, None]
        baseline = Baseline("loo").values(reward, every, sources)
        c = coefficients("gpomdp", reward, baseline, weights)
        mean += chance * (c[:, 0] * scores[taken]).mean()
    assert float(mean) == pytest.approx(float(true), abs=1e-12)


def test_wrong_input_is_refused() -> None:
    logp = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"estimator must be one of .* not 'sarsa'"):
        coefficients("sarsa", logp, logp, logp)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shares must sum to 1"):
        importance_weights(logp, [(0.5, logp)])
    with pytest.raises(ValueError, match="clip must be at least 1"):
        importance_weights(logp, [(1.0, logp)], clip=0.5)
    with pytest.raises(FloatingPointError, match="log importance weight is 900"):
        importance_weights(logp + 300, [(1.0, logp)])
    assert float(importance_weights(logp + 300, [(1.0, logp)], clip=2.0).max()) == 2
