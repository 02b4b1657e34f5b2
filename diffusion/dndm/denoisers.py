"""The network's side: what is asked of a denoiser, what it is checked for, and adapters.

A denoiser is any `denoiser(x, t, **cond) -> logits`: x integer (A, N), t (A,) real times in (0, 1],
float32 or the default type where that is finer, logits (A, N, K) of x_0. A is the number of rows
that take part.

Shape legend: B rows, A active rows, N positions, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from sparring.diffusion.dndm.noise import Noise

Denoiser = Callable[..., Tensor]
"""denoiser(x_AN, t_A, **cond) -> logits_ANK."""


@dataclass
class Sampled:
    """What a sampler made, and what it cost."""

    sequences: Tensor
    """(B, N) tokens."""
    nfe: int
    """Network calls for the batch."""
    evaluations: Tensor
    """(B,) calls that each row took part in; rows that are done are left out of later calls."""
    history: list[Tensor] | None
    """(B, N) before the first call and after each, if asked for."""
    logp_BN: Tensor | None = None
    """(B, N) float64, nats: log p of each generated token at the call that wrote it, 0 at fixed
    positions. None for ancestral sampling, whose tokens change with no such chance."""

    @property
    def row_evaluations(self) -> int:
        """Rows summed over calls: what a batch costs where a call's time grows with its rows."""
        return int(self.evaluations.sum())


@dataclass
class Network:
    """A denoiser with its conditions, whose calls are counted and whose answers are checked.

    Args:
        denoiser: see the module.
        noise: for the size of the vocabulary.
        cond: keyword arguments for the denoiser. Tensors have the batch as first axis and are cut
            to the rows of a call; anything else is handed on.
        rows: B.
        device: where evaluations are counted.

    Raises:
        ValueError: a tensor of `cond` with another first axis.
    """

    denoiser: Denoiser
    noise: Noise
    cond: Mapping[str, Any]
    rows: int
    device: torch.device
    nfe: int = 0
    evaluations: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.evaluations = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        for name, value in self.cond.items():
            if isinstance(value, Tensor) and value.shape[:1] != (self.rows,):
                raise ValueError(
                    f"cond[{name!r}] must have the batch of {self.rows} as first axis, not shape "
                    f"{tuple(value.shape)}; put what all rows share into the denoiser"
                )

    def __call__(self, x_BN: Tensor, t_B: Tensor, active_B: Tensor, **also: Tensor) -> Tensor:
        """(A, N, K) logits of the active rows; `also` is more of `cond`.

        Raises:
            ValueError: logits of another shape, NaN or +infinity among them.
        """
        self.nfe += 1
        self.evaluations += active_B
        cond = {
            name: value[active_B] if isinstance(value, Tensor) else value
            for name, value in {**self.cond, **also}.items()
        }
        x = x_BN[active_B]
        logits = self.denoiser(x, told(t_B[active_B]), **cond)
        check_logits(logits, x.shape, self.noise)
        return logits


def told(t: Tensor) -> Tensor:
    """Times as a network is told them: float32 at least, and none that is positive becomes 0.

    A coarser default type would merge steps: bfloat16 has 8 bits, and T = 1000 needs 10.
    """
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return t.to(dtype).clamp(min=torch.finfo(dtype).tiny)


def check_logits(logits: Tensor, size: torch.Size, noise: Noise) -> None:
    """Raises ValueError: another shape than (*size, K), NaN, +infinity, or a position where all
    tokens that x_0 can be have -infinity."""
    shape = (*size, noise.vocab_size)
    if tuple(logits.shape) != shape:
        raise ValueError(
            f"the denoiser returned logits of shape {tuple(logits.shape)}, not {shape} (rows, "
            "positions, vocabulary): give the noise the vocab_size of the network, the mask "
            "included"
        )
    # One pass finds all three: NaN and +infinity show in the maximum, and so does a row of
    # -infinity. The mask is no token that x_0 can be: alone it would leave nothing to draw.
    logits = logits.detach()
    bad = torch.zeros(size, dtype=torch.bool, device=logits.device)
    sides = [logits]
    if (mask := noise.mask_id) is not None:
        bad = ~(logits[..., mask] < torch.inf)
        sides = [s for s in (logits[..., :mask], logits[..., mask + 1 :]) if s.shape[-1]]
    top = torch.stack([side.amax(-1) for side in sides]).amax(0)
    bad |= ~top.isfinite()
    if bool(bad.any()):
        row, position = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the denoiser's logits are NaN, +inf or all -inf at row {row}, position {position} "
            f"(largest of what x_0 can be: {float(top[row, position])}); -inf is allowed for "
            "tokens that cannot be, but not for all of them but the mask"
        )


def check_input(x_BN: Tensor, free_BN: Tensor, noise: Noise) -> None:
    """Raises ValueError: nothing to generate, or tokens that cannot be."""
    if x_BN.ndim != 2 or not x_BN.numel() or x_BN.is_floating_point():
        raise ValueError(
            f"x must be integer with shape (rows, positions), both at least 1, not {x_BN.dtype} "
            f"{tuple(x_BN.shape)}"
        )
    if free_BN.shape != x_BN.shape or free_BN.dtype != torch.bool:
        raise ValueError(
            f"free must be bool with shape {tuple(x_BN.shape)}, not {free_BN.dtype} "
            f"{tuple(free_BN.shape)}; True is what is generated"
        )
    full = (~free_BN).all(1)
    if bool(full.any()):
        raise ValueError(
            f"row {int(full.nonzero()[0])} has all tokens fixed: free at least one position of "
            "each row, or leave the row out"
        )
    fixed = x_BN[~free_BN]
    outside = fixed[(fixed < 0) | (fixed >= noise.vocab_size)]
    if len(outside):
        raise ValueError(
            f"fixed token {int(outside[0])} is outside 0..{noise.vocab_size - 1}: give the noise "
            "the network's vocab_size"
        )
    if noise.mask_id is not None and bool((fixed == noise.mask_id).any()):
        raise ValueError(
            f"a fixed position holds the mask ({noise.mask_id}) and would keep it: free it"
        )


def check_mode(model: torch.nn.Module) -> None:
    """Raises ValueError: it is in training mode, where dropout would blur what it says."""
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call its eval() first")


def masked_lm(model: torch.nn.Module) -> Denoiser:
    """A Hugging Face masked language model as a denoiser that ignores t.

    Args:
        model: returns an output with `.logits`; `cond` goes to its forward (attention_mask, ...).

    Raises:
        ValueError: it is in training mode.
    """
    check_mode(model)

    def denoiser(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        logits: Tensor = model(input_ids=x, **cond).logits
        return logits

    return denoiser


def integer_time(denoiser: Denoiser, steps: int) -> Denoiser:
    """For a network that was trained with step numbers 0..steps-1, number k standing for x_{k+1}.

    t becomes ceil(t steps) - 1, the least trained step that is not before t. This is the one place
    where real times are converted; no number is ever out of the trained range.

    Args:
        denoiser: takes int64 times.
        steps: T of the training.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}: T of the network's training")

    def convert(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        # t may be float32: k / T times T is k up to k 2^-24.
        number = (t.double() * steps - steps * 2**-22).ceil().long() - 1
        return denoiser(x, number.clamp(0, steps - 1), **cond)

    return convert


def shaped(
    denoiser: Denoiser,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_tokens: Sequence[int] = (),
) -> Denoiser:
    """logits / temperature, with -inf for tokens that must not be generated.

    Scores of positions see the shaped law too.

    Args:
        denoiser: any.
        temperature: positive.
        top_k: only the likeliest so many tokens of a position; 0 for all.
        top_p: only the likeliest tokens whose chances reach it together, in (0, 1].
        suppress_tokens: ids, in 0..K-1; the two above are of the other tokens.

    Raises:
        ValueError: a number out of range; at a call, an id outside the vocabulary.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(
            f"temperature must be positive, not {temperature!r}; token='argmax' is the limit 0"
        )
    if top_k < 0:
        raise ValueError(f"top_k must be at least 1, or 0 for all tokens, not {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is a probability above 0, not {top_p}")
    never = list(suppress_tokens)
    warpers = [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    def shape(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        logits = denoiser(x, t, **cond) / temperature
        if outside := [i for i in never if not 0 <= i < logits.shape[-1]]:
            raise ValueError(
                f"suppress_tokens must lie in 0..{logits.shape[-1] - 1}, not {outside[:5]}"
            )
        if never:
            logits[..., never] = -torch.inf
        for warper in warpers:  # which take rows of logits, and no tokens
            logits = warper(None, logits.flatten(0, -2)).view(logits.shape)
        return logits

    return shape
