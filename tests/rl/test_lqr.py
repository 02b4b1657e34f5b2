"""A linear system with a linear Gaussian policy: return and gradient in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import Tensor

from sparring.rl import GPOMDP, GaussianPolicy, Lockstep, StormPG
from sparring.rl.lockstep import Array, Step

A = np.array([[1.0, 0.1], [0.0, 0.9]])
B = np.array([[0.0], [0.3]])
Q, R = np.diag([1.0, 0.2]), 0.1
START, NOISE, SIGMA = 0.5, 0.05, 0.8
HORIZON, GAMMA = 6, 0.95


class LinearQuadratic(Lockstep):
    """x <- A x + B u + noise, reward -(x'Qx + R u^2)."""

    def __init__(self, num_envs: int) -> None:
        limit = np.full(2, np.inf)
        action = Box(-np.inf, np.inf, (1,), np.float64)
        super().__init__(num_envs, Box(-limit, limit, dtype=np.float64), action)
        self._x = np.zeros((num_envs, 2))
        self._draws = [np.random.default_rng() for _ in range(num_envs)]

    def _begin(self, index: int, seed: int | None) -> None:
        self._draws[index] = np.random.default_rng(seed)
        self._x[index] = START * self._draws[index].standard_normal(2)

    def _advance(self, live: Array, actions: Array) -> Step:
        x = self._x[live]
        reward = -((x @ Q * x).sum(1) + R * actions[:, 0] ** 2)
        noise = np.stack([self._draws[i].standard_normal(2) for i in live])
        self._x[live] = x @ A.T + actions @ B.T + NOISE * noise
        none = np.zeros(len(live), dtype=bool)
        return reward, none, none

    def _observe(self) -> Array:
        return self._x.copy()


def policy() -> GaussianPolicy:
    made = GaussianPolicy(2, 1, hidden=(), bias=False, sigma=SIGMA, dtype=torch.float64)
    with torch.no_grad():
        made.network[0].weight.copy_(torch.tensor([[0.4, 0.4]]))
    return made


def exact_return(gain: Array) -> float:
    """The second moment of the state goes through a Lyapunov recursion."""
    closed = A + B @ gain
    moment, total = START**2 * np.eye(2), 0.0
    for h in range(HORIZON):
        control = float((gain @ moment @ gain.T).item()) + SIGMA**2
        total -= GAMMA**h * (np.trace(Q @ moment) + R * control)
        moment = closed @ moment @ closed.T + SIGMA**2 * B @ B.T + NOISE**2 * np.eye(2)
    return float(total)


def exact_gradient(gain: Array, step: float = 1e-5) -> Array:
    found = np.zeros_like(gain)
    for index in np.ndindex(gain.shape):
        change = np.zeros_like(gain)
        change[index] = step
        found[index] = (exact_return(gain + change) - exact_return(gain - change)) / (2 * step)
    return found


@pytest.mark.parametrize("estimator", ["gpomdp", "pgt", "reinforce"])
def test_gradient_and_return_have_the_closed_form(estimator: str) -> None:
    """Oracle 6: the mean over 30 batches within 4 standard errors, which are small."""
    method = GPOMDP(policy(), LinearQuadratic(200), batch=200, horizon=HORIZON, gamma=GAMMA,
                    lr=1e-300, optimizer="sgd", estimator=estimator)  # fmt: skip
    gain = method.policy.network[0].weight.detach().numpy().copy()
    records, gradients = [], []
    for _ in range(30):
        records.append(method.step()["objective"])
        gradients.append(method.direction[0].numpy())
    for values, true in ((records, exact_return(gain)), (gradients, exact_gradient(gain))):
        rows = np.array(values)
        error = rows.std(0, ddof=1) / np.sqrt(len(rows))
        assert (np.abs(rows.mean(0) - true) < 4 * error).all()
        assert (error < 0.2 * np.abs(true).max()).all()


def test_the_correction_is_the_gradient_at_the_old_policy() -> None:
    """Continuous actions: weights of a Gaussian, against the closed form at other parameters."""
    old = np.array([[0.4, 0.4]])
    found = []
    for seed in range(30):
        method = StormPG(policy(), LinearQuadratic(200), alpha=0.5, init_batch=200, batch=200,
                         horizon=HORIZON, gamma=GAMMA, lr=0.15, optimizer="normalised")  # fmt: skip
        seen: list[Tensor] = []
        combine = method._combine
        method._combine = lambda g, h, c=combine, s=seen: (s.append(h), c(g, h))[1]  # type: ignore[method-assign]
        method.train(max_trajectories=400, seed=seed)
        found.append(seen[1][0].numpy())
    rows = np.array(found)
    error = rows.std(0, ddof=1) / np.sqrt(len(rows))
    assert (np.abs(rows.mean(0) - exact_gradient(old)) < 4 * error).all()
    assert (error < 0.2 * np.abs(exact_gradient(old)).max()).all()
