"""Small Markov decision processes with an exact objective, to measure estimators against.

Shape legend: S states, A actions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from sparring.rl.lockstep import Array, Lockstep, Step


class TabularMDP(Lockstep):
    """A finite decision process whose observations are one-hot states.

    Args:
        transitions_SAS: (S, A, S) probabilities of the next state.
        rewards_SA: (S, A) reward of an action.
        initial_S: (S,) probabilities of the first state, 0 for terminal ones.
        terminal: states that end an episode.
        num_envs: how many episodes run side by side.

    Raises:
        ValueError: shapes do not fit, or probabilities do not sum to 1.
    """

    def __init__(
        self,
        transitions_SAS: npt.ArrayLike,
        rewards_SA: npt.ArrayLike,
        initial_S: npt.ArrayLike,
        *,
        terminal: tuple[int, ...] = (),
        num_envs: int = 1,
    ) -> None:
        self.transitions = np.asarray(transitions_SAS, dtype=np.float64)
        self.rewards = np.asarray(rewards_SA, dtype=np.float64)
        self.initial = np.asarray(initial_S, dtype=np.float64)
        states, actions = self.rewards.shape
        if self.transitions.shape != (states, actions, states) or self.initial.shape != (states,):
            raise ValueError(
                "transitions (S, A, S), rewards (S, A) and initial (S,) do not fit: "
                f"{self.transitions.shape}, {self.rewards.shape}, {self.initial.shape}"
            )
        for name, table in (("transitions", self.transitions), ("initial", self.initial)):
            if (table < 0).any() or not np.allclose(table.sum(-1), 1):
                raise ValueError(f"{name} are probabilities that sum to 1, got {table.tolist()}")
        self.terminal = np.isin(np.arange(states), terminal)
        if self.initial[self.terminal].any():
            raise ValueError(f"an episode cannot begin in a terminal state of {terminal}")
        super().__init__(num_envs, Box(0.0, 1.0, (states,), np.float64), Discrete(actions))
        self._state = np.zeros(num_envs, dtype=np.int64)
        self._draws = [np.random.default_rng() for _ in range(num_envs)]

    def _begin(self, index: int, seed: int | None) -> None:
        if seed is not None:
            self._draws[index] = np.random.default_rng(seed)
        self._state[index] = self._choose(self.initial, index)

    def _choose(self, probabilities_S: Array, index: int) -> int:
        below = probabilities_S.cumsum() < self._draws[index].random()
        return min(int(below.sum()), len(self.initial) - 1)

    def _advance(self, live: Array, actions: Array) -> Step:
        states = self._state[live]
        reward = self.rewards[states, actions]
        for index, state, action in zip(live, states, actions, strict=True):
            self._state[index] = self._choose(self.transitions[state, action], index)
        ended = self.terminal[self._state[live]]
        return reward, ended, np.zeros(live.size, dtype=bool)

    def _observe(self) -> Array:
        return np.eye(len(self.initial))[self._state]

    def objective(self, policy: nn.Module, *, horizon: int, gamma: float) -> Tensor:
        """J = sum_{h < H} gamma^h E r_h, exact and differentiable in the policy's parameters.

        Args:
            policy: its `distribution` must be categorical over the A actions.
            horizon: H.
            gamma: discount.
        """
        like = next(policy.parameters())
        chance_SA = policy.distribution(torch.eye(len(self.initial)).to(like)).probs  # type: ignore[operator]
        step_SAS, reward_SA, mass_S = (
            torch.from_numpy(table).to(like)
            for table in (self.transitions, self.rewards, self.initial)
        )
        running_S = torch.from_numpy(~self.terminal).to(like)
        total = like.new_zeros(())
        for h in range(horizon):
            visits_SA = mass_S[:, None] * chance_SA
            total = total + gamma**h * (visits_SA * reward_SA).sum()
            mass_S = torch.einsum("sa,sat->t", visits_SA, step_SAS) * running_S
        return total

    def gradient(self, policy: nn.Module, *, horizon: int, gamma: float) -> list[Tensor]:
        """The exact gradient of J, one tensor a trainable parameter."""
        trained = [p for p in policy.parameters() if p.requires_grad]
        value = self.objective(policy, horizon=horizon, gamma=gamma)
        return list(torch.autograd.grad(value, trained))
