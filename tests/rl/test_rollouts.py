"""Episodes: one reset each, the same whatever runs side by side; the environments' physics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from tiny_process import process, softmax

from sparring.launch.seeds import derive
from sparring.rl import CategoricalPolicy, GaussianPolicy, SubEnvironments, policy_for
from sparring.rl.environments import open_environment
from sparring.rl.rollouts import Sampler, log_probabilities

HORIZON = 60


class CountingResets(gymnasium.Wrapper[Any, Any, Any, Any]):
    count = 0

    def reset(self, **options: Any) -> Any:
        type(self).count += 1
        return super().reset(**options)


def counted() -> gymnasium.Env[Any, Any]:
    return CountingResets(gymnasium.make("CartPole-v1"))


def pole_policy() -> CategoricalPolicy:
    torch.manual_seed(0)
    return CategoricalPolicy(4, 2, dtype=torch.float64)


def by_hand(policy: CategoricalPolicy, seed: int, number: int) -> float:
    """The return of a trajectory from one environment and a loop."""
    env = gymnasium.make("CartPole-v1")
    seen, _ = env.reset(seed=derive(seed, "environment", number) % 2**31)
    noise = np.random.default_rng(derive(seed, "actions", number)).random((HORIZON, 1))
    total = 0.0
    for h in range(HORIZON):
        with torch.no_grad():
            logits = policy.network(torch.as_tensor(seen, dtype=torch.float64))
        action = int(noise[h, 0] > torch.softmax(logits, 0)[0].item())
        seen, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return total


def sync(mode: AutoresetMode) -> Callable[[int], VectorEnv[Any, Any, Any]]:
    return lambda n: SyncVectorEnv([counted] * n, autoreset_mode=mode)


@pytest.mark.parametrize("num_envs", [1, 3, 7])
@pytest.mark.parametrize("kind", ["held", *AutoresetMode], ids=str)
def test_vector_environments_give_the_episodes_of_a_single_one(kind: Any, num_envs: int) -> None:
    """Oracle 8, in every autoreset mode."""
    make = (lambda n: SubEnvironments(counted, n)) if kind == "held" else sync(kind)
    CountingResets.count = 0
    environment, policy = make(num_envs), pole_policy()
    batch = Sampler(environment, HORIZON).sample(policy, 11, range(7))
    expected = [by_hand(policy, 11, n) for n in range(7)]
    assert batch.rewards_NH.sum(1).tolist() == expected
    assert batch.alive_NH.sum(1).tolist() == expected  # reward 1 a step
    assert len(set(expected)) > 2
    if kind == "held":
        assert environment.resets == CountingResets.count == 7


def test_native_vector_environments_take_one_seed_a_wave() -> None:
    native = gymnasium.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point")
    sampler = Sampler(native, HORIZON)
    first, again = (sampler.sample(pole_policy(), 3, range(8)) for _ in range(2))
    assert torch.equal(first.rewards_NH, again.rewards_NH)
    lengths = first.alive_NH.sum(1)
    assert torch.equal(lengths, first.rewards_NH.sum(1).long())
    assert len(set(lengths.tolist())) > 2
    # Once an episode has ended nothing of the next one is in it.
    assert not (first.alive_NH[:, 1:] & ~first.alive_NH[:, :-1]).any()


def test_trajectories_depend_on_their_number_only() -> None:
    policy = softmax(0)
    sampler, wide = Sampler(process(2), 4), Sampler(process(9), 4)
    batch = wide.sample(policy, 5, range(9))
    odd = sampler.sample(policy, 5, range(1, 9, 2))
    assert torch.equal(odd.actions_NHA, batch.actions_NHA[1::2])
    assert torch.equal(odd.observations_NHO, batch.observations_NHO[1::2])
    other = wide.sample(policy, 6, range(9))
    assert not torch.equal(other.actions_NHA, batch.actions_NHA)


def test_actions_are_recorded_before_clipping() -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 1, sigma=3.0, dtype=torch.float64)
    environment = open_environment("sparring/ContinuousMountainCar-v0", 5)
    batch = Sampler(environment, 30).sample(policy, 0, range(5))
    assert float(batch.actions_NHA.abs().max()) > 3
    logp = log_probabilities(policy, batch).detach()
    mean = policy.network(batch.observations_NHO).detach()
    z = (batch.actions_NHA - mean)[..., 0] / 3
    torch.testing.assert_close(logp, -(z**2) / 2 - np.log(3 * np.sqrt(2 * np.pi)))


def test_a_time_limit_ends_the_trajectory() -> None:
    made = gymnasium.make("MountainCar-v0", max_episode_steps=9)
    assert made.spec is not None
    environment = SubEnvironments(lambda: gymnasium.make(made.spec), 2)
    batch = Sampler(environment, 20).sample(policy_for(made), 0, range(2))
    assert batch.alive_NH.sum(1).tolist() == [9, 9]
    assert batch.steps == 18


def test_the_cart_pole_is_gymnasiums() -> None:
    """At full force, up to the angle at which an episode ends (0.2 here, 12 degrees there)."""
    own, theirs = (
        open_environment("sparring/ContinuousCartPole-v0", 1),
        gymnasium.make("CartPole-v1"),
    )
    seen, _ = own.reset(seed=3)
    theirs.reset(seed=0)
    theirs.unwrapped.state = tuple(seen[0])  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for _ in range(12):
        push = int(rng.integers(2))
        # Twice the force that is allowed is clipped to it.
        seen, reward, ended, _, _ = own.step(np.array([[2.0 * (2 * push - 1)]]))
        expected = theirs.step(push)[0]
        np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-7)
        assert reward[0] == 1
        assert ended[0] == (abs(seen[0, 2]) > 0.2)


def test_the_mountain_car_is_gymnasiums_with_another_reward() -> None:
    own = open_environment("sparring/ContinuousMountainCar-v0", 1)
    theirs = gymnasium.make("MountainCarContinuous-v0")
    seen, _ = own.reset(seed=3)
    theirs.reset(seed=0)
    theirs.unwrapped.state = np.array(seen[0])  # type: ignore[attr-defined]
    ended = np.array([False])
    steps = 0
    while not ended[0]:
        force = np.sign(seen[:, 1:]) + (seen[:, 1:] == 0)  # pumping reaches the goal
        seen, reward, ended, _, _ = own.step(force)
        expected, _, done, _, _ = theirs.step(force[0].astype(np.float32))
        np.testing.assert_allclose(seen[0], expected, rtol=1e-3, atol=1e-4)
        height = 0.45 * np.sin(3 * seen[0, 0]) + 0.55
        assert reward[0] == pytest.approx(height - 1)
        steps += 1
    assert done
    assert 50 < steps < 200
    # An ended episode stays as it is.
    held, reward, _, _, _ = own.step(np.ones((1, 1)))
    np.testing.assert_array_equal(held, seen)
    assert reward[0] == 0


def test_registered_in_gymnasium() -> None:
    made = gymnasium.make_vec("sparring/ContinuousCartPole-v0", num_envs=3)
    assert made.reset(seed=0)[0].shape == (3, 4)
    assert made.metadata["autoreset_mode"] is AutoresetMode.DISABLED


class NoMode(SyncVectorEnv):
    def __init__(self) -> None:
        super().__init__([lambda: gymnasium.make("CartPole-v1")])
        self.metadata = {"autoreset_mode": "maybe"}


class Spoiled(gymnasium.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> float:
        return float("nan")


def test_what_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match="has autoreset mode 'maybe'; it must be one of"):
        open_environment(NoMode(), 1)
    with pytest.raises(ValueError, match="is one environment and several run side by side"):
        open_environment(gymnasium.make("CartPole-v1"), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observations must be a Box"):
        open_environment("FrozenLake-v1", 2)
    with pytest.raises(ValueError, match="num_envs must be at least 1, not 0"):
        process(0)
    with pytest.raises(ValueError, match="horizon must be at least 1 step"):
        Sampler(process(1), 0)
    spoiled = open_environment(lambda: Spoiled(gymnasium.make("CartPole-v1")), 2)
    with pytest.raises(ValueError, match="reward nan at step 0"):
        Sampler(spoiled, 5).sample(pole_policy(), 0, range(2))
    broken = pole_policy()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    moved = GaussianPolicy(4, 1)
    with torch.no_grad():
        next(moved.parameters()).fill_(float("nan"))
    cart = open_environment("sparring/ContinuousCartPole-v0", 2)
    with pytest.raises(FloatingPointError, match="parameters have diverged"):
        Sampler(cart, 5).sample(moved, 0, range(2))
    with pytest.raises(ValueError, match="no policy for observations"):
        policy_for(gymnasium.make("FrozenLake-v1"))
