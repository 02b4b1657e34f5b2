"""Every sampler on two prompts, and a denoiser that remembers what it was asked."""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.diffusion.dndm import (
    BetaSchedule,
    LinearCounts,
    Reveal,
    ThresholdCounts,
    absorbing,
    autoregressive,
    d3pm,
    dndm,
    dndm_c,
    dndm_k,
    dndm_v2,
    entropy_bound,
    first_hitting,
    maskgit,
    mdlm_cache,
    rdm,
    rdm_k,
    threshold,
    uniform,
)

V, MASK = 6, 5
ABSORBING, UNIFORM = absorbing(V, MASK), uniform(V, [1, 2, 3, 4])
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watching:
    """A denoiser whose rows are computed one by one, and which remembers what it was asked."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        near = TABLE[x] + 0.5 * TABLE[x.roll(1, 1)] - 0.5 * TABLE[x.roll(-1, 1)]
        return self.scale * (near + t.double()[:, None, None] * TABLE[0])


def constant(tokens: Tensor) -> object:
    """A denoiser that is sure of the same tokens whatever it sees."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens.expand_as(x), V).double() * 1e4

    return denoiser


NAMED = {
    "dndm": dndm(20),
    "dndm argmax": dndm(20, "cosine", token="argmax"),
    "dndm-v2": dndm_v2(20),
    "dndm-k": dndm_k(20, BetaSchedule(5, 3)),
    "dndm-c": dndm_c(),
    "dndm-c-k": dndm_c("cosine2", position="confidence"),
    "first-hitting": first_hitting(),
    "d3pm": d3pm(20),
    "mdlm-cache": mdlm_cache(20),
    "rdm": rdm(20),
    "rdm-k": rdm_k(20),
    "autoregressive": autoregressive(),
    "maskgit": maskgit(4),
    "threshold": threshold(threshold=0.6),
    "threshold random": Reveal(counts=ThresholdCounts(0.6)),
    "entropy-bound": entropy_bound(bound=0.5),
    "margin": Reveal(counts=LinearCounts(3), position="margin", token="argmax"),
}
PROMPT = torch.tensor([[0, 1, MASK, MASK, 2, MASK, MASK, 0], [0, MASK, MASK, 3, MASK, 1, 1, 0]])
FREE = PROMPT == MASK
