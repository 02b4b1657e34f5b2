"""Policies: any module with `distribution(observations)`; softmax and Gaussian networks.

Shape legend: N rows (trajectories or steps), O observation size, A action size, K actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal


class Policy(Protocol):
    """What the methods ask of a `torch.nn.Module`.

    `distribution` must depend on the observations and the parameters alone: with dropout or batch
    statistics the importance weights would be those of another policy.
    """

    def distribution(self, observation_NO: Tensor) -> Distribution:
        """Of the action, with `log_prob` of shape (N,)."""
        ...


def _network(sizes: Sequence[int], bias: bool, dtype: torch.dtype | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class CategoricalPolicy(nn.Module):
    """Softmax over K actions of a tanh network; linear where `hidden` is empty.

    Args:
        observation_size: O.
        actions: K.
        hidden: widths of the hidden layers; the paper has one of 64.
        bias: whether layers have biases. Without, and with one-hot observations, the linear policy
            is a table of logits.
        dtype: of the parameters, torch's default if None.
    """

    def __init__(
        self,
        observation_size: int,
        actions: int,
        *,
        hidden: Sequence[int] = (64,),
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = _network([observation_size, *hidden, actions], bias, dtype)

    def distribution(self, observation_NO: Tensor) -> Categorical:
        """Of an action in 0, ..., K - 1."""
        return Categorical(logits=self.network(observation_NO), validate_args=False)


class GaussianPolicy(nn.Module):
    """N(network(o), sigma^2) in A dimensions.

    Args:
        observation_size: O.
        action_size: A.
        hidden: widths of the hidden tanh layers; the paper has one of 64.
        sigma: standard deviation of every action dimension, in the action's unit, above 0.
        learn_sigma: whether log(sigma) is a parameter, one an action dimension. The paper's is
            fixed; learned ones shrink, and the weights between policies grow with 1 / sigma.
        bias: whether layers have biases.
        dtype: of the parameters, torch's default if None.

    Raises:
        ValueError: sigma is not above 0.
    """

    log_sigma: Tensor

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        *,
        hidden: Sequence[int] = (64,),
        sigma: float = 1.0,
        learn_sigma: bool = False,
        bias: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be above 0, not {sigma!r}")
        self.network = _network([observation_size, *hidden, action_size], bias, dtype)
        log_sigma = torch.full((action_size,), math.log(sigma), dtype=dtype)
        if learn_sigma:
            self.log_sigma = nn.Parameter(log_sigma)
        else:
            self.register_buffer("log_sigma", log_sigma)

    def distribution(self, observation_NO: Tensor) -> Independent[Normal]:
        """Of an action (A,), not clipped to what the environment takes."""
        mean = self.network(observation_NO)
        normal = Normal(mean, self.log_sigma.exp().expand_as(mean), validate_args=False)
        return Independent(normal, 1, validate_args=False)


def policy_for(environment: Any, **settings: Any) -> CategoricalPolicy | GaussianPolicy:
    """The policy that fits an environment's spaces.

    Args:
        environment: a gymnasium environment or vector environment.
        settings: those of `CategoricalPolicy` or `GaussianPolicy`.

    Raises:
        ValueError: observations are no vector, or actions neither Discrete nor a vector.
    """
    seen = getattr(environment, "single_observation_space", environment.observation_space)
    done = getattr(environment, "single_action_space", environment.action_space)
    if isinstance(seen, Box) and len(seen.shape) == 1:
        if isinstance(done, Discrete):
            return CategoricalPolicy(seen.shape[0], int(done.n), **settings)
        if isinstance(done, Box) and len(done.shape) == 1:
            return GaussianPolicy(seen.shape[0], done.shape[0], **settings)
    raise ValueError(
        f"no policy for observations {seen} and actions {done}: pass a module with distribution()"
    )


def noise_shape(distribution: Distribution) -> tuple[str, int] | None:
    """("uniform", 1) or ("normal", A) if `draw` can make actions of such noise, else None."""
    if isinstance(distribution, Categorical):
        return "uniform", 1
    base = getattr(distribution, "base_dist", None)
    if isinstance(distribution, Independent) and isinstance(base, Normal) and base.loc.ndim == 2:
        return "normal", int(base.loc.shape[1])
    return None


def draw(distribution: Any, noise_NK: Tensor | None) -> Tensor:
    """Actions, from given noise where there is some, so that a row's action is its noise's only.

    Args:
        distribution: a torch distribution over N rows.
        noise_NK: of the kind that `noise_shape` says, or None for the global generator.
    """
    action: Tensor
    if noise_NK is None:
        action = distribution.sample()
    elif isinstance(distribution, Categorical):
        below = distribution.probs.cumsum(-1) < noise_NK  # type: ignore[union-attr]
        action = below.sum(-1).clamp(max=below.shape[-1] - 1)
    else:
        action = distribution.base_dist.loc + distribution.base_dist.scale * noise_NK
    return action
