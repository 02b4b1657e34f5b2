"""From judge logits to win probabilities, by a convention that has a name.

The published codes turn the same logits into different probabilities, some twice as sharp as
others, so the whole (K, K) matrix is stored and the convention is chosen here.

Shapes: B prompts, K responses to each. L[b, i, j] > 0 says that response i is better than j, with i
shown first; L_ij and −L_ji differ because judges are not indifferent to the order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _pairwise(logits_BKK: Tensor) -> Tensor:
    return torch.sigmoid((logits_BKK - logits_BKK.mT) / 2)


def _mean_probability(logits_BKK: Tensor) -> Tensor:
    return (torch.sigmoid(logits_BKK) + torch.sigmoid(-logits_BKK.mT)) / 2


def _aggregated(logits_BKK: Tensor) -> Tensor:
    score_BK = (logits_BKK - logits_BKK.mT).mean(dim=2)
    return torch.sigmoid(score_BK.unsqueeze(2) - score_BK.unsqueeze(1))


CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pairwise": _pairwise,
    "pairwise-one-order": torch.sigmoid,
    "mean-probability": _mean_probability,
    "aggregated": _aggregated,
}
"""P_ij from logits whose diagonal is 0.

pairwise: σ((L_ij − L_ji)/2), both orders averaged as logits; the SPPO paper's σ(s), made symmetric.
pairwise-one-order: σ(L_ij); the only one for which P_ij + P_ji need not be 1.
mean-probability: the mean of σ(L_ij) and 1 − σ(L_ji).
aggregated: σ(s_i − s_j) with s_i = mean_j(L_ij − L_ji), what the SPPO repository computes. It is
transitive even where the judge is cyclic, and twice as sharp as `pairwise` on a consistent judge.
"""


def _checked(logits_BKK: Tensor) -> Tensor:
    """The logits with a zero diagonal."""
    shape = tuple(logits_BKK.shape)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] == 0:
        raise ValueError(f"logits must have shape (B, K, K) with K of at least 1, got {shape}")
    if not logits_BKK.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits_BKK.dtype}")
    diagonal = torch.eye(shape[1], dtype=torch.bool, device=logits_BKK.device)
    logits_BKK = logits_BKK.masked_fill(diagonal, 0.0)
    bad_rows = (~logits_BKK.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if bad_rows:
        raise ValueError(
            f"judge logits are NaN or infinite in row {', '.join(map(str, bad_rows))} of {shape[0]}"
        )
    return logits_BKK


def pair_probabilities(logits_BKK: Tensor, convention: str = "pairwise") -> Tensor:
    """Probability that each response beats each other one.

    Args:
        logits_BKK: (B, K, K) judge logits, row beats column. The diagonal is read as 0.
        convention: a key of `CONVENTIONS`.

    Returns:
        (B, K, K) probabilities, row beats column, ½ on the diagonal.

    Raises:
        ValueError: the shape or dtype is wrong, a logit off the diagonal is not finite (the message
            numbers the rows), or the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}")
    return CONVENTIONS[convention](_checked(logits_BKK))


def win_probabilities(logits_BKK: Tensor, convention: str = "pairwise") -> Tensor:
    """Probability P̂(y_i ≻ π | x) that each response beats a draw from the policy.

    P̂_i = (1/K) Σ_j P(y_i ≻ y_j) over all K samples, the self term ½ included (arXiv 2405.00675), so
    P̂ lies in [1/(2K), 1 − 1/(2K)].

    Args:
        logits_BKK: (B, K, K) judge logits, row beats column. The diagonal is read as 0.
        convention: a key of `CONVENTIONS`.

    Returns:
        (B, K) win probabilities, the row means of `pair_probabilities`.

    Raises:
        ValueError: as `pair_probabilities`.
    """
    return pair_probabilities(logits_BKK, convention).mean(dim=2)
