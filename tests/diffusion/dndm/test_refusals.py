"""What samplers refuse: the value, what is allowed, and the fix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparring.diffusion.dndm import (
    CosineCounts,
    EntropyBoundCounts,
    LinearCounts,
    Reveal,
    ThresholdCounts,
    absorbing,
    algorithm,
    d3pm,
    dndm,
    dndm_k,
    generate,
)
from sparring.diffusion.dndm.denoisers import Denoiser

V, MASK = 6, 5


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def zeros(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(*x.shape, V)


BAD_SAMPLERS = [
    (lambda: algorithm("dndm-q"), "one of .*'dndm-k'.* not 'dndm-q'"),
    (lambda: algorithm("dndm", stpes=3), "does not take the settings"),
    (lambda: algorithm("dndm"), "missing"),
    (lambda: dndm(0), "steps must be .* not 0"),
    (lambda: d3pm(0), "steps must be .* not 0"),
    (lambda: d3pm(math.inf), "finitely many"),  # type: ignore[arg-type]
    (lambda: Reveal(counts=LinearCounts(), position="best"), "position must be one of .*'best'"),
    (lambda: Reveal(counts=LinearCounts(), token="beam"), "token must be one of .*'beam'"),
    (lambda: Reveal(counts=LinearCounts(), revise="all"), "revise must be one of .*'all'"),  # type: ignore[arg-type]
    (lambda: Reveal(counts=LinearCounts(), path="x"), "path must be"),  # type: ignore[arg-type]
    (lambda: Reveal(counts=ThresholdCounts(0.5), revise="rerank"), "drawn beforehand"),
    (lambda: ThresholdCounts(0), r"threshold must lie in \(0, 1\], not 0"),
    (lambda: EntropyBoundCounts(-1), "bound must be at least 0 nats, not -1"),
    (lambda: LinearCounts(0), "not 0"),
    (lambda: CosineCounts(math.inf), "finite"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("make", "message"), BAD_SAMPLERS)
def test_bad_samplers(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def nan_at_a_place(x: Tensor, t: Tensor) -> Tensor:
    logits = torch.zeros(*x.shape, V)
    logits[-1, 2, 1] = math.nan
    return logits


def only(token: int) -> Denoiser:
    """Sure of one token at every position, all others impossible."""
    law = torch.full((V,), -math.inf)
    law[token] = 0
    return lambda x, t: law.expand(*x.shape, V)


def nan_at_the_mask(x: Tensor, t: Tensor) -> Tensor:
    logits = torch.zeros(*x.shape, V)
    logits[0, 1, MASK] = math.nan
    return logits


BAD_INPUT = [
    ({"x": torch.zeros(1, 0, dtype=torch.long)}, r"both at least 1.*\(1, 0\)"),
    ({"x": torch.zeros(4, dtype=torch.long)}, r"shape \(rows, positions\)"),
    ({"x": torch.zeros(1, 3)}, "must be integer"),
    ({"free": torch.zeros(2, 3, dtype=torch.bool)}, "row 0 has all tokens fixed"),
    ({"free": torch.tensor([[True] * 3, [False] * 3])}, "row 1 has all tokens fixed"),
    ({"free": torch.ones(2, 3)}, "free must be bool"),
    ({"free": torch.ones(1, 3, dtype=torch.bool)}, "free must be bool with shape"),
    ({"x": torch.full((2, 3), 9)}, r"fixed token 9 is outside 0\.\.5"),
    ({"x": torch.full((2, 3), MASK)}, r"a fixed position holds the mask \(5\)"),
    ({"net": lambda x, t: torch.zeros(*x.shape, V - 1)}, r"shape \(2, 3, 5\), not \(2, 3, 6\)"),
    ({"net": lambda x, t: torch.zeros(*x.shape)}, r"not \(2, 3, 6\)"),
    ({"net": nan_at_a_place}, "NaN, .* at row 1, position 2"),
    ({"net": lambda x, t: torch.full((*x.shape, V), -math.inf)}, "all -inf at row 0"),
    ({"net": lambda x, t: torch.full((*x.shape, V), math.inf)}, r"\+inf .* at row 0"),
    ({"net": only(MASK)}, "all -inf at row 0, position 0"),
    ({"net": nan_at_the_mask}, "NaN, .* at row 0, position 1"),
    ({"cond": {"source": torch.zeros(3, 2)}}, r"cond\['source'\] .* batch of 2"),
    ({"generator": [seeded()]}, "2 rows need one generator, or one each, not 1"),
]


@pytest.mark.parametrize(
    "sampler", [dndm(5), dndm_k(5), d3pm(5)], ids=["reveal", "confidence", "ancestral"]
)
@pytest.mark.parametrize(("change", "message"), BAD_INPUT)
def test_bad_input(sampler: Reveal, change: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.long)
    free = torch.tensor([[True, True, False], [True, False, True]])
    given = {"net": zeros, "x": x, "free": free, "cond": None, "generator": seeded(), **change}
    with pytest.raises(ValueError, match=message):
        sampler.sample(
            given["net"],  # type: ignore[arg-type]
            given["x"],  # type: ignore[arg-type]
            given["free"],  # type: ignore[arg-type]
            noise=absorbing(V, MASK),
            generator=given["generator"],  # type: ignore[arg-type]
            cond=given["cond"],  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("mask", [0, V - 1])
def test_a_sure_network_is_no_refusal(mask: int) -> None:
    """One token is enough, whichever end the mask is at."""
    x = torch.full((2, 3), mask)
    made = dndm(5).sample(only(3), x, x == mask, noise=absorbing(V, mask), generator=seeded())
    assert made.sequences.tolist() == [[3] * 3] * 2


def test_suppressed_tokens_are_tokens_and_not_all_of_them() -> None:
    x = torch.full((1, 3), MASK)
    for suppressed, message in (
        ([0, 1, 2, 3, 4], "not for all of them but the mask"),
        ([2, 9], r"suppress_tokens must lie in 0\.\.5, not \[9\]"),
        ([-1], r"not \[-1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(zeros, x, noise=absorbing(V, MASK), suppress_tokens=suppressed)
