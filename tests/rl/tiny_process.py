"""A tiny decision process with termination, and every trajectory of it with its probability.

An oracle for expectations: sums over trajectories, where the library samples or uses dynamic
programming.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparring.rl import CategoricalPolicy, TabularMDP, Trajectories
from sparring.rl.estimators import coefficients, discounted, importance_weights, surrogate
from sparring.rl.rollouts import log_probabilities

HORIZON, GAMMA = 4, 0.9
LIVE, ACTIONS = 3, 2
END = LIVE


def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Transitions, rewards and first states; the last state ends an episode."""
    rng = np.random.default_rng(5)
    # The second action ends episodes more often, so that surviving says something of the actions.
    transitions = np.stack(
        [rng.dirichlet([1, 1, 1, end], size=LIVE + 1) for end in (0.3, 3.0)], axis=1
    )
    return transitions, rng.normal(1, 2, (LIVE + 1, ACTIONS)), np.array([0.5, 0.3, 0.2, 0.0])


def process(num_envs: int = 1) -> TabularMDP:
    return TabularMDP(*tables(), terminal=(END,), num_envs=num_envs)


def softmax(seed: int, scale: float = 1.0) -> CategoricalPolicy:
    """A table of logits, in float64."""
    policy = CategoricalPolicy(LIVE + 1, ACTIONS, hidden=(), bias=False, dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        (table,) = policy.parameters()
        table.copy_(scale * torch.randn(table.shape, generator=draws, dtype=torch.float64))
    return policy


@dataclass
class Everything:
    """All trajectories, and the environment's factor of the probability of each."""

    batch: Trajectories
    dynamics: Tensor


def enumerate_all() -> Everything:
    transitions, rewards, initial = tables()
    found: list[tuple[float, list[tuple[int, int]]]] = []

    def go(chance: float, state: int, path: list[tuple[int, int]]) -> None:
        for action in range(ACTIONS):
            longer = [*path, (state, action)]
            if len(longer) == HORIZON:
                found.append((chance, longer))
                continue
            found.append((chance * transitions[state, action, END], longer))
            for following in range(LIVE):
                go(chance * transitions[state, action, following], following, longer)

    for state in range(LIVE):
        go(initial[state], state, [])
    count = len(found)
    seen = torch.zeros(count, HORIZON, LIVE + 1, dtype=torch.float64)
    done = torch.zeros(count, HORIZON, dtype=torch.int64)
    reward = torch.zeros(count, HORIZON, dtype=torch.float64)
    alive = torch.zeros(count, HORIZON, dtype=torch.bool)
    for row, (_, path) in enumerate(found):
        for h, (state, action) in enumerate(path):
            seen[row, h, state], done[row, h], alive[row, h] = 1, action, True
            reward[row, h] = rewards[state, action]
    batch = Trajectories(seen, done, reward, alive)
    return Everything(batch, torch.tensor([chance for chance, _ in found], dtype=torch.float64))


def chances(everything: Everything, policy: CategoricalPolicy) -> Tensor:
    """(N,) probability of each trajectory, differentiable."""
    return everything.dynamics * log_probabilities(policy, everything.batch).sum(1).exp()


def exact_objective(everything: Everything, policy: CategoricalPolicy) -> Tensor:
    powers = GAMMA ** torch.arange(HORIZON, dtype=torch.float64)
    return (chances(everything, policy) * (everything.batch.rewards_NH * powers).sum(1)).sum()


def exact_gradient(everything: Everything, policy: CategoricalPolicy) -> Tensor:
    (table,) = policy.parameters()
    return torch.autograd.grad(exact_objective(everything, policy), table)[0]


class OneTableEach(nn.Module):
    """The softmax policy with a table of its own for every trajectory, to differentiate by it."""

    def __init__(self, policy: CategoricalPolicy, batch: Trajectories) -> None:
        super().__init__()
        (table,) = policy.parameters()
        self.tables_NAS = nn.Parameter(table.detach().expand(len(batch), -1, -1).clone())
        self._rows = batch.alive_NH.nonzero()[:, 0]

    def distribution(self, seen: Tensor) -> torch.distributions.Categorical:
        logits = torch.einsum("ns,nas->na", seen, self.tables_NAS[self._rows])
        return torch.distributions.Categorical(logits=logits)


def estimates(
    everything: Everything,
    policy: CategoricalPolicy,
    behaviour: list[tuple[float, CategoricalPolicy]],
    *,
    estimator: str = "gpomdp",
    baseline: Tensor | None = None,
    clip: float | None = None,
    whole: bool = False,
) -> Tensor:
    """(N, A, S) the library's estimate from each trajectory."""
    batch = everything.batch
    each = OneTableEach(policy, batch)
    logp = log_probabilities(each, batch)
    others = [(share, log_probabilities(other, batch).detach()) for share, other in behaviour]
    weights = importance_weights(logp.detach(), others, clip=clip)
    if whole:
        weights = weights[:, -1:].expand_as(weights)
    rewards = discounted(batch.rewards_NH, GAMMA)
    b = torch.zeros_like(rewards) if baseline is None else baseline
    values = surrogate(logp, coefficients(estimator, rewards, b, weights))
    return torch.autograd.grad(values.sum(), each.tables_NAS)[0]


def mean_and_variance(chance: Tensor, rows: Tensor) -> tuple[Tensor, float]:
    """Expectation (A, S), and the trace of the covariance."""
    mean = torch.einsum("n,nas->as", chance, rows)
    return mean, float((chance * (rows - mean).square().sum((1, 2))).sum())
