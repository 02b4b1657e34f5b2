"""Vector environments whose episodes begin together and stay ended once they have ended.

Gymnasium's default (NEXT_STEP) answers the step after an ending with a reset in disguise: its
action is ignored, its reward is 0, and an episodic estimator that takes it for a transition is
silently wrong. Here an ended episode does nothing until it is reset: one reset an episode, and no
step is spent on an environment that has ended.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

Array = npt.NDArray[Any]
Step = tuple[Array, Array, Array]
"""Rewards, terminations and truncations of the environments that were stepped."""


class Lockstep(VectorEnv[Any, Any, Any]):  # type: ignore[misc]
    """Base of vector environments that hold ended episodes, in gymnasium's DISABLED mode.

    A subclass says how an episode begins, how live episodes go on, and what is seen. Seeds are one
    a sub-environment, so that an episode depends on its seed and not on its neighbours.

    Args:
        num_envs: how many episodes run side by side.
        observation_space: of one environment.
        action_space: of one environment.

    Raises:
        ValueError: `num_envs` below 1.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "autoreset_mode": AutoresetMode.DISABLED,
        "render_modes": [],
    }

    def __init__(self, num_envs: int, observation_space: Space[Any], action_space: Space[Any]):
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, not {num_envs}")
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.ended: Array = np.ones(num_envs, dtype=bool)
        """Whose episode has ended, or has not begun."""
        self.resets = 0
        """Episodes begun since construction."""

    @abstractmethod
    def _begin(self, index: int, seed: int | None) -> None:
        """Put environment `index` at the start of an episode."""

    @abstractmethod
    def _advance(self, live: Array, actions: Array) -> Step:
        """One step of the environments with these indices, which are all of the live ones."""

    @abstractmethod
    def _observe(self) -> Array:
        """(num_envs, ...) what every environment shows now; a new array."""

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Array, dict[str, Any]]:
        """Begin episodes: all, or those of `options["reset_mask"]` (num_envs,), bool.

        Args:
            seed: one seed an environment, or a number to count up from, or None to go on with the
                generators as they are.

        Raises:
            ValueError: as many seeds or mask entries as environments are needed.
        """
        mask = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if seed is None or isinstance(seed, int):
            seeds = [None if seed is None else seed + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if mask.shape != (self.num_envs,) or len(seeds) != self.num_envs:
            raise ValueError(
                f"{self.num_envs} environments need a mask of that shape and as many seeds, got "
                f"{mask.shape} and {len(seeds)}"
            )
        for index in np.flatnonzero(mask):
            self._begin(int(index), seeds[index])
        self.ended[mask] = False
        self.resets += int(mask.sum())
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Step the live environments; ended ones keep what they show and get reward 0."""
        reward = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=bool)
        truncated = np.zeros(self.num_envs, dtype=bool)
        live = np.flatnonzero(~self.ended)
        if live.size:
            result = self._advance(live, np.asarray(actions)[live])
            reward[live], terminated[live], truncated[live] = result
        self.ended |= terminated | truncated
        return self._observe(), reward, terminated, truncated, {}


class SubEnvironments(Lockstep):
    """Any gymnasium environment, several times, one after the other in this process.

    Args:
        make: makes one environment.
        num_envs: how many.
    """

    def __init__(self, make: Callable[[], gymnasium.Env[Any, Any]], num_envs: int) -> None:
        self.envs = [make() for _ in range(max(1, num_envs))]
        super().__init__(num_envs, self.envs[0].observation_space, self.envs[0].action_space)
        space = self.single_observation_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise ValueError(
                f"observations must be a Box, not {space}; wrap the environment, for instance in "
                "gymnasium.wrappers.FlattenObservation"
            )
        self._seen = np.zeros((num_envs, *space.shape), dtype=space.dtype)

    def _begin(self, index: int, seed: int | None) -> None:
        self._seen[index] = self.envs[index].reset(seed=seed)[0]

    def _advance(self, live: Array, actions: Array) -> Step:
        rows = []
        for index, action in zip(live, actions, strict=True):
            self._seen[index], reward, terminated, truncated, _ = self.envs[index].step(action)
            rows.append((float(reward), terminated, truncated))
        rewards, terminated_, truncated_ = zip(*rows, strict=True)
        return np.array(rewards), np.array(terminated_), np.array(truncated_)

    def _observe(self) -> Array:
        return self._seen.copy()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        for environment in self.envs:
            environment.close()
