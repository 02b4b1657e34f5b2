"""Whole episodes from vector environments, the same whatever runs side by side.

Trajectory n of a run draws its first state, its environment's noise and its actions from seeds made
of (run seed, n), so neither the number of environments nor of ranks changes it, up to rounding.

Shape legend: N trajectories, H horizon, O observation size, A action size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch import Tensor, nn

from sparring.launch.seeds import derive
from sparring.rl.lockstep import Array, Lockstep
from sparring.rl.policies import draw, noise_shape


@dataclass(frozen=True)
class Trajectories:
    """Episodes of at most H steps; after an ending the state is absorbing, with reward 0."""

    observations_NHO: Tensor
    """What the policy saw; zeros after the ending."""
    actions_NHA: Tensor
    """What the policy emitted, before clipping; (N, H) where actions are discrete."""
    rewards_NH: Tensor
    """float64, not discounted; zeros after the ending."""
    alive_NH: Tensor
    """bool: whether step h was taken."""

    @property
    def steps(self) -> int:
        """Environment steps."""
        return int(self.alive_NH.sum())

    def __len__(self) -> int:
        return len(self.rewards_NH)

    @staticmethod
    def join(parts: Sequence[Trajectories]) -> Trajectories:
        """The trajectories of all parts in one."""
        names = [field.name for field in fields(Trajectories)]
        return Trajectories(*(torch.cat([getattr(p, name) for p in parts]) for name in names))


def log_probabilities(policy: nn.Module, batch: Trajectories) -> Tensor:
    """(N, H) log pi(a_h | s_h) in float64, 0 after the ending; differentiable.

    Raises:
        ValueError: the policy's `log_prob` has another shape than one number an action.
    """
    alive = batch.alive_NH
    seen, done = batch.observations_NHO[alive], batch.actions_NHA[alive]
    taken = policy.distribution(seen).log_prob(done)  # type: ignore[operator]
    if taken.shape != (len(seen),):
        raise ValueError(
            f"log_prob has shape {tuple(taken.shape)}, not {(len(seen),)}: give one number an "
            "action, for instance with torch.distributions.Independent(..., 1)"
        )
    logp_NH = torch.zeros(alive.shape, dtype=torch.float64, device=taken.device)
    return logp_NH.masked_scatter(alive, taken.double())


class Sampler:
    """Episodes of a policy, in waves of as many as there are environments.

    Where ended episodes are not held (gymnasium's own vector environments), a wave still ends only
    when all its episodes have; what an environment does after its episode's ending is thrown away.

    Args:
        environment: from `open_environment`.
        horizon: H, at least 1. A time limit of the environment below it ends episodes too; both are
            part of the objective, so nothing is bootstrapped.

    Raises:
        ValueError: `horizon` below 1, or actions that are neither Discrete nor a vector.
    """

    def __init__(self, environment: VectorEnv[Any, Any, Any], horizon: int) -> None:
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1 step, not {horizon}")
        self.environment, self.horizon = environment, horizon
        space = environment.single_action_space
        if not isinstance(space, Box | Discrete):
            raise ValueError(f"actions must be Discrete or a Box, not {space}")
        self._action_space = space
        inner = environment.unwrapped
        self._holds = isinstance(inner, Lockstep)
        self._own_seeds = isinstance(inner, Lockstep | SyncVectorEnv | AsyncVectorEnv)
        self._mode = environment.metadata["autoreset_mode"]

    @torch.no_grad()
    def sample(self, policy: nn.Module, seed: int, numbers: Sequence[int]) -> Trajectories:
        """The trajectories with these numbers.

        Args:
            policy: a module with `distribution` (see `sparring.rl.policies.Policy`).
            seed: of the run.
            numbers: at least one, each not negative.

        Raises:
            ValueError: a reward is not finite, or actions do not fit the environment.
            FloatingPointError: an action is not finite.
        """
        width = self.environment.num_envs
        waves = [numbers[i : i + width] for i in range(0, len(numbers), width)]
        return Trajectories.join([self._wave(policy, seed, wave) for wave in waves])

    def _wave(self, policy: nn.Module, seed: int, numbers: Sequence[int]) -> Trajectories:
        count, environment = len(numbers), self.environment
        model = next(policy.parameters())
        seen = self._reset(seed, numbers)
        running = np.ones(count, dtype=bool)
        observations = np.zeros((count, self.horizon, *seen.shape[1:]))
        rewards = np.zeros((count, self.horizon))
        alive = np.zeros((count, self.horizon), dtype=bool)
        actions: Tensor | None = None
        noise = _Noise(seed, numbers, self.horizon)
        for h in range(self.horizon):
            live = np.flatnonzero(running)
            observations[live, h], alive[live, h] = seen[live], True
            shown = torch.as_tensor(seen[live], dtype=model.dtype, device=model.device)
            emitted = noise.act(policy.distribution(shown), live, h)  # type: ignore[operator]
            if actions is None:
                actions = emitted.new_zeros((count, self.horizon, *emitted.shape[1:]))
            actions[live, h] = emitted
            seen, reward, terminated, truncated, _ = environment.step(self._act(live, emitted, h))
            if not np.isfinite(reward[live]).all():
                raise ValueError(
                    f"reward {reward[live][~np.isfinite(reward[live])][0]} at step {h} of an "
                    f"episode of {environment}: rewards must be finite; fix or wrap the environment"
                )
            rewards[live, h] = reward[live]
            running &= ~(terminated | truncated)[:count]
            if not running.any():
                break
            if self._mode is AutoresetMode.DISABLED and not self._holds:
                self._revive(terminated | truncated)
        assert actions is not None
        return Trajectories(
            torch.as_tensor(observations, dtype=model.dtype, device=model.device),
            actions,
            torch.as_tensor(rewards, device=model.device),
            torch.as_tensor(alive, device=model.device),
        )

    def _reset(self, seed: int, numbers: Sequence[int]) -> Array:
        # 31 bits, since some environments hand their seed to a C library.
        seeds = [derive(seed, "environment", n) % 2**31 for n in numbers]
        spare = self.environment.num_envs - len(seeds)
        options = None
        if self._holds:
            mask = np.arange(self.environment.num_envs) < len(seeds)
            options = {"reset_mask": mask}
            # Episodes that the horizon cut off in the wave before must not go on.
            self.environment.unwrapped.ended[:] = True  # type: ignore[attr-defined]
        given: Any = [*seeds, *[seeds[0]] * spare] if self._own_seeds else seeds[0]
        return np.asarray(self.environment.reset(seed=given, options=options)[0])

    def _revive(self, ended: Array) -> None:
        """In gymnasium's DISABLED mode an ended environment cannot be stepped on before a reset."""
        if ended.any():
            self.environment.reset(options={"reset_mask": ended.copy()})

    def _act(self, live: Array, emitted: Tensor, h: int) -> Array:
        """(num_envs, ...) what the environments are told: clipped, and anything for ended ones."""
        space, given = self._action_space, emitted.cpu().numpy()
        if given.shape[1:] != space.shape or (
            isinstance(space, Discrete) != (given.dtype.kind == "i")
        ):
            raise ValueError(
                f"the policy emits {given.dtype} actions of shape {given.shape[1:]}, the "
                f"environment takes {space}"
            )
        if not np.isfinite(given).all():
            raise FloatingPointError(
                f"the policy's action at step {h} is not finite: its parameters have diverged; "
                "lower lr, or set clip"
            )
        if isinstance(space, Box):
            given = np.clip(given, space.low, space.high)
        else:
            given = given + space.start
        told = np.zeros((self.environment.num_envs, *space.shape), dtype=space.dtype)
        if isinstance(space, Discrete):
            told += space.start
        told[live] = given
        return told


class _Noise:
    """Noise of the actions of a wave, made when the kind of distribution is known."""

    def __init__(self, seed: int, numbers: Sequence[int], horizon: int) -> None:
        self._seed, self._numbers, self._horizon = seed, numbers, horizon
        self._noise: Tensor | None = None
        self._kind: tuple[str, int] | None = None

    def act(self, distribution: Any, live: Array, h: int) -> Tensor:
        kind = noise_shape(distribution)
        if kind is None:
            # torch's distributions take no generator; such actions do depend on the sharding.
            with torch.random.fork_rng():
                torch.manual_seed(derive(self._seed, "actions", self._numbers[0], h))
                return draw(distribution, None)
        if kind != self._kind:
            self._kind, rows = kind, []
            for number in self._numbers:
                rng = np.random.default_rng(derive(self._seed, "actions", number))
                make = rng.random if kind[0] == "uniform" else rng.standard_normal
                rows.append(make((self._horizon, kind[1])))
            self._noise = torch.from_numpy(np.stack(rows))
        assert self._noise is not None
        base = getattr(distribution, "base_dist", None)
        like = distribution.probs if base is None else base.loc
        return draw(distribution, self._noise[live, h].to(like))
