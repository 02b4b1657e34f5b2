"""Two of a sampler's three choices: which token each position gets, and which positions come first.

Each is a table of functions; one of your own goes wherever a name does.

Shape legend: B rows, N positions, M predicted positions (those of a mask, row by row), K tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sparring.diffusion.dndm.draws import Draws


@dataclass(frozen=True)
class Prediction:
    """What the network said at the positions that matter, in float64."""

    logp_MK: Tensor
    """log p(x_0), nats."""
    where_BN: Tensor
    """bool, with M True."""

    @property
    def entropy(self) -> Tensor:
        """Nats."""
        # exp(-1e4) is 0, and so is its product with -1e4; with -infinity it would be NaN.
        logp = self.logp_MK.clamp(min=-1e4)
        return -logp.exp().mul_(logp).sum(1)

    @property
    def margin(self) -> Tensor:
        """Chance of the likeliest token minus that of the next."""
        top = self.logp_MK.topk(2, dim=1).values.exp()
        return top[:, 0] - top[:, 1]

    def logp_of(self, tokens_M: Tensor) -> Tensor:
        """(M,) log p of these tokens."""
        return self.logp_MK.gather(1, tokens_M[:, None])[:, 0]

    def spread(self, values_M: Tensor, fill: float) -> Tensor:
        """(B, N) values at their positions, `fill` elsewhere."""
        out = torch.full(
            self.where_BN.shape, fill, dtype=values_M.dtype, device=self.where_BN.device
        )
        out[self.where_BN] = values_M
        return out


Token = Callable[[Prediction, Draws], Tensor]
"""prediction, randomness -> (M,) tokens x~_0."""


def sample(prediction: Prediction, draws: Draws) -> Tensor:
    """x~_0 ~ p, in float64."""
    return draws.categorical(prediction.logp_MK.exp(), prediction.where_BN)


def argmax(prediction: Prediction, draws: Draws) -> Tensor:
    """The likeliest token; the least id of several."""
    return prediction.logp_MK.argmax(1)


TOKENS: dict[str, Token] = {"sample": sample, "argmax": argmax}

Position = Callable[[Prediction, Tensor], Tensor]
"""prediction, (M,) tokens -> (M,) scores; the greatest come first."""


def confidence(prediction: Prediction, tokens_M: Tensor) -> Tensor:
    """log p(x~_0), of the chosen token."""
    return prediction.logp_of(tokens_M)


def margin(prediction: Prediction, tokens_M: Tensor) -> Tensor:
    """p of the likeliest token minus p of the next."""
    return prediction.margin


def entropy(prediction: Prediction, tokens_M: Tensor) -> Tensor:
    """Least entropy first."""
    return -prediction.entropy


SCORES: dict[str, Position] = {"confidence": confidence, "margin": margin, "entropy": entropy}

Order = Callable[[Tensor], Tensor]
"""(B, N) priorities -> (B, N) scores; positions are chosen before the network's answer is read."""


def random(priority_BN: Tensor) -> Tensor:
    """In the order of the transition times, which is uniformly random."""
    return priority_BN


def left_to_right(priority_BN: Tensor) -> Tensor:
    """The order of the text."""
    length = priority_BN.shape[1]
    places = torch.arange(length, device=priority_BN.device, dtype=torch.float64)
    return -places.expand_as(priority_BN)


ORDERS: dict[str, Order] = {"random": random, "left-to-right": left_to_right}

Choice = TypeVar("Choice")


def look_up(kind: str, choice: Choice | str, table: dict[str, Choice]) -> Choice:
    """The named entry of a table; anything that is no name is returned as it is.

    Raises:
        ValueError: no such name.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in table:
        raise ValueError(f"{kind} must be one of {list(table)} or a function, not {choice!r}")
    return table[choice]


def rank(score_BN: Tensor, priority_BN: Tensor, among_BN: Tensor) -> Tensor:
    """(B, N) positions from first to last: those of `among_BN` by falling score, then the others.

    Ranks, not a threshold on scores: k positions are k whatever the scores are. Equal scores go by
    falling priority, equal priorities by position.
    """
    order = priority_BN.argsort(dim=1, descending=True, stable=True)
    for key in (score_BN, among_BN.to(score_BN)):
        again = key.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, again)
    return order


def first(order_BN: Tensor, k_B: Tensor) -> Tensor:
    """(B, N) bool: the k first positions of each row's order."""
    places = torch.arange(order_BN.shape[1], device=order_BN.device)
    chosen = (places < k_B[:, None]).expand_as(order_BN)
    return torch.zeros_like(chosen).scatter(1, order_BN, chosen)
