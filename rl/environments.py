"""The two tasks of the STORM-PG paper as small vectorised environments, and opening any other.

The paper (arXiv 2003.04302) used rllab's box2d Cart-Pole and Mountain-Car. Those dynamics are not
reproduced: the equations here are those of gymnasium's classic control (Barto, Sutton and
Anderson, 1983; Moore, 1990), with continuous forces and rllab's kind of reward.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.error import DependencyNotInstalled, Error
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv

from sparring.launch.errors import SparringError, UsageError
from sparring.rl.lockstep import Array, Lockstep, Step, SubEnvironments

Environment: TypeAlias = str | VectorEnv[Any, Any, Any] | Callable[[], gymnasium.Env[Any, Any]]


class _Physics(Lockstep):
    """States (num_envs, D) in float64 that are shown whole; a generator an environment."""

    low: Array
    high: Array
    """(D,) ends of the uniform distribution of the first state."""

    def __init__(self, num_envs: int = 1) -> None:
        limit = np.full(self.low.shape, np.inf)
        super().__init__(num_envs, Box(-limit, limit, dtype=np.float64), Box(-1.0, 1.0, (1,)))
        self._state = np.zeros((num_envs, self.low.size))
        self._draws = [np.random.default_rng() for _ in range(num_envs)]

    def _begin(self, index: int, seed: int | None) -> None:
        if seed is not None:
            self._draws[index] = np.random.default_rng(seed)
        self._state[index] = self._draws[index].uniform(self.low, self.high)

    def _observe(self) -> Array:
        return self._state.copy()


class ContinuousCartPole(_Physics):
    """A pole on a cart pushed by 10 clip(a, -1, 1) newton; reward 1 a step while it stands.

    State (x, dx/dt, theta, dtheta/dt) in m, m/s, rad, rad/s; Euler steps of 0.02 s; the first state
    uniform in [-0.05, 0.05]^4. An episode ends when |x| > 2.4 or |theta| > 0.2; the step that ends
    it is rewarded too, as in gymnasium. There is no time limit: the horizon of the method is one.
    """

    low, high = np.full(4, -0.05), np.full(4, 0.05)

    def _advance(self, live: Array, actions: Array) -> Step:
        gravity, cart, pole, half, time = 9.8, 1.0, 0.1, 0.5, 0.02
        x, speed, angle, turn = self._state[live].T
        force = 10 * np.clip(actions[:, 0], -1, 1)
        sine, cosine = np.sin(angle), np.cos(angle)
        total = cart + pole
        push = (force + pole * half * turn**2 * sine) / total
        turning = (gravity * sine - cosine * push) / (half * (4 / 3 - pole * cosine**2 / total))
        pushing = push - pole * half * turning * cosine / total
        x, angle = x + time * speed, angle + time * turn
        speed, turn = speed + time * pushing, turn + time * turning
        self._state[live] = np.stack([x, speed, angle, turn], axis=1)
        fallen = (np.abs(x) > 2.4) | (np.abs(angle) > 0.2)
        return np.ones(live.size), fallen, np.zeros(live.size, dtype=bool)


class ContinuousMountainCar(_Physics):
    """A weak car in a valley; reward height - 1 a step, from -0.9 to 0, until the right hill.

    State (x, v): v <- clip(v + 0.0015 clip(a, -1, 1) - 0.0025 cos 3x, -0.07, 0.07), x <- x + v with
    an inelastic wall at -1.2; height = 0.45 sin 3x + 0.55. The first x is uniform in [-0.6, -0.4].
    An episode ends at x >= 0.45, and since rewards are negative, earlier is better.
    """

    low, high = np.array([-0.6, 0.0]), np.array([-0.4, 0.0])

    def _advance(self, live: Array, actions: Array) -> Step:
        x, v = self._state[live].T
        force = np.clip(actions[:, 0], -1, 1)
        v = np.clip(v + 0.0015 * force - 0.0025 * np.cos(3 * x), -0.07, 0.07)
        x = np.clip(x + v, -1.2, 0.6)
        v = np.where((x <= -1.2) & (v < 0), 0.0, v)
        self._state[live] = np.stack([x, v], axis=1)
        reward = 0.45 * np.sin(3 * x) + 0.55 - 1
        return reward, x >= 0.45, np.zeros(live.size, dtype=bool)


_OWN = {
    "sparring/ContinuousCartPole-v0": ContinuousCartPole,
    "sparring/ContinuousMountainCar-v0": ContinuousMountainCar,
}
for _name, _kind in _OWN.items():
    if _name not in gymnasium.registry:
        gymnasium.register(_name, vector_entry_point=f"{__name__}:{_kind.__name__}")


def open_environment(environment: Environment, num_envs: int) -> VectorEnv[Any, Any, Any]:
    """A vector environment for whole episodes.

    Args:
        environment: a gymnasium id; a function that makes one gymnasium environment; or a vector
            environment, which is taken as it is.
        num_envs: how many episodes run side by side, where that is not decided already.

    Raises:
        UsageError: an id that gymnasium does not make.
        SparringError: the environment needs a package that is not installed.
        ValueError: a vector environment whose autoreset mode is not said, or a single environment.
    """
    if isinstance(environment, str):
        if environment in _OWN:
            return _OWN[environment](num_envs)
        return _from_id(environment, num_envs)
    if isinstance(environment, VectorEnv):
        mode = environment.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(
                f"{environment} has autoreset mode {mode!r}; it must be one of "
                f"{[str(m) for m in AutoresetMode]}, or where an episode ends is unknown. Set "
                'metadata["autoreset_mode"] to what the environment does'
            )
        return environment
    if isinstance(environment, gymnasium.Env):
        raise ValueError(
            f"{environment} is one environment and several run side by side: pass its id, a "
            "function that makes it, or a VectorEnv"
        )
    return SubEnvironments(environment, num_envs)


def _from_id(name: str, num_envs: int) -> SubEnvironments:
    try:
        return SubEnvironments(lambda: gymnasium.make(name), num_envs)
    except (DependencyNotInstalled, ImportError) as error:
        extra = "mujoco" if "mujoco" in str(error).lower() else "rl"
        raise SparringError(
            f'environment {name!r}: {error}. Try: pip install "sparring[{extra}]"'
        ) from None
    except Error as error:
        known = [*_OWN, *gymnasium.registry]
        near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see gymnasium's list"
        text = str(error).rstrip(".")
        raise UsageError(f"environment {name!r} cannot be made ({text}); {hint}") from None
