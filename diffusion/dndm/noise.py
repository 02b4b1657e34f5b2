"""What a token becomes when it is noised: the mask, or a draw from a law over tokens.

Shape legend: B rows, N positions, M chosen positions, K tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.diffusion.dndm.draws import Draws


@dataclass(frozen=True)
class Noise:
    """q_noise, so that q(x_t | x_0) = alpha_t 1[x_t = x_0] + (1 - alpha_t) q_noise(x_t).

    Made by `absorbing`, `uniform` or `unigram`.

    Args:
        law_K: q_noise, float64 with sum 1.
        mask_id: of absorbing noise: that token is never predicted.
    """

    law_K: Tensor = field(repr=False)
    mask_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """K."""
        return len(self.law_K)

    @property
    def predictable(self) -> Tensor:
        """(K,) bool: what x_0 can be, all but the mask."""
        allowed = torch.ones_like(self.law_K, dtype=torch.bool)
        if self.mask_id is not None:
            allowed[self.mask_id] = False
        return allowed

    def log_probabilities(self, logits_MK: Tensor) -> Tensor:
        """(M, K) float64 log p(x_0), with the mask left out."""
        logits = logits_MK.double()
        if self.mask_id is not None:
            ids = torch.tensor([self.mask_id], device=logits.device)
            logits = logits.index_fill(1, ids, -torch.inf)
        return logits.log_softmax(1)

    def from_uniform(self, u: Tensor) -> Tensor:
        """Tokens from uniform float64 numbers of any shape, by inversion; K numbers beside them."""
        if self.mask_id is not None:
            return torch.full_like(u, self.mask_id, dtype=torch.long)
        cdf = self.law_K.to(u.device).cumsum(0)
        return torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=self.vocab_size - 1)

    def fill(self, x_BN: Tensor, free_BN: Tensor, draws: Draws) -> Tensor:
        """(B, N) int64 x_T: noise where it is free, x elsewhere."""
        return x_BN.long().masked_scatter(free_BN, self.draw(draws, free_BN))

    def draw(self, draws: Draws, mask_BN: Tensor) -> Tensor:
        """(M,) a token of noise for each True. The mask costs no random number."""
        if self.mask_id is not None:
            return torch.full((int(mask_BN.sum()),), self.mask_id, device=mask_BN.device)
        return self.from_uniform(draws.uniform(mask_BN))


def absorbing(vocab_size: int, mask_id: int) -> Noise:
    """Noise is always the mask.

    Args:
        vocab_size: K, the mask among them.
        mask_id: in 0..K-1.

    Raises:
        ValueError: fewer than two tokens, or mask_id outside the vocabulary.
    """
    _check_size(vocab_size)
    _check_ids("mask_id", [mask_id], vocab_size)
    law = torch.zeros(vocab_size, dtype=torch.float64)
    law[mask_id] = 1
    return Noise(law, mask_id)


def uniform(vocab_size: int, allowed: Sequence[int] | None = None) -> Noise:
    """Noise is uniform over the allowed ids.

    Args:
        vocab_size: K.
        allowed: ids that noise can be, all if None. Leave out padding and other special tokens:
            they then count as clean wherever they stand.

    Raises:
        ValueError: fewer than two tokens, no allowed id, or one outside the vocabulary.
    """
    _check_size(vocab_size)
    ids = list(range(vocab_size) if allowed is None else allowed)
    _check_ids("allowed", ids, vocab_size)
    law = torch.zeros(vocab_size, dtype=torch.float64)
    law[ids] = 1
    return Noise(law / law.sum())


def unigram(counts_K: Tensor) -> Noise:
    """Noise has the law of tokens in a corpus.

    Args:
        counts_K: of each token, non-negative; 0 for those that noise must not be.

    Raises:
        ValueError: another shape, or counts that are negative, not finite or all 0.
    """
    counts = counts_K.double().cpu()
    if counts.ndim != 1:
        raise ValueError(f"counts must have shape (K,), not {tuple(counts.shape)}")
    _check_size(len(counts))
    if not bool((counts.isfinite() & (counts >= 0)).all()) or float(counts.sum()) <= 0:
        raise ValueError(
            f"counts must be finite, non-negative and not all 0; the least is "
            f"{float(counts.min()):g} and the sum {float(counts.sum()):g}"
        )
    return Noise(counts / counts.sum())


def _check_size(vocab_size: int) -> None:
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, not {vocab_size}: count the mask too")


def _check_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    if not ids:
        raise ValueError(f"{name} is empty: noise needs at least one token, or None for all")
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(
            f"{name} must lie in 0..{vocab_size - 1}, not {outside[:5]}: vocab_size counts every "
            "id that the network has logits for"
        )
