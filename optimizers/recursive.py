"""The recursive gradient estimator that MARS, STORM, SARAH and momentum share.

One recursion, with g a gradient at the present point and h one at the point before, both on the
same sample (exact) or each on its own (approximate):

    d_t = beta d_{t-1} + (1 - beta) g_t + gamma beta (g_t - h_t)

    gamma = 0            exponential moving average (momentum)
    gamma = 1            STORM with alpha = 1 - beta: d_t = g_t + (1 - alpha) (d_{t-1} - h_t)
    gamma = 1, beta = 1  SARAH and SPIDER: d_t = d_{t-1} + g_t - h_t
    0 < gamma < 1        MARS (arXiv 2411.10438): the EMA of c_t = g_t + kappa (g_t - h_t)

Sources: STORM, arXiv 1905.10018; SARAH, arXiv 1703.00102; MARS, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def correction_coefficient(gamma: float, beta: float) -> float:
    """kappa = gamma beta / (1 - beta), the weight of g - h in MARS's corrected gradient."""
    return gamma * beta / (1 - beta)


def correct_(previous: Sequence[Tensor], gradients: Sequence[Tensor], coefficient: float) -> None:
    """Overwrite h by c = g + coefficient (g - h), in the memory of h."""
    torch._foreach_lerp_(list(previous), list(gradients), 1 + coefficient)


class RecursiveEstimator:
    """Estimate of a gradient at a moving point, for losses that are sampled.

    Args:
        beta: weight of the past; STORM's 1 - alpha. In [0, 1].
        gamma: strength of the correction: 0 is momentum, 1 is STORM. In [0, 1].

    Raises:
        ValueError: a coefficient outside its range.

    >>> estimator = RecursiveEstimator(beta=0.9)
    >>> first = estimator.update([torch.tensor([1.0])])
    >>> later = estimator.update([torch.tensor([2.0])], [torch.tensor([1.5])])
    >>> [round(float(value), 3) for value in later]
    [1.55]
    """

    def __init__(self, beta: float, gamma: float = 1.0) -> None:
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must lie in [0, 1], not {value!r}")
        self.beta = beta
        self.gamma = gamma
        self.estimate: list[Tensor] | None = None

    def restart(self) -> None:
        """Forget the past: the next gradient is the estimate (SARAH's and PAGE's outer step)."""
        self.estimate = None

    @torch.no_grad()
    def update(
        self, gradients: Sequence[Tensor], previous: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Take in g and h; returns the estimate d, whose tensors the next call changes.

        Args:
            gradients: g, at the present point.
            previous: h, at the point before, on the sample of g. Not needed for the first gradient
                after construction or `restart`, which is taken as it is, nor when gamma is 0.

        Raises:
            ValueError: `previous` is missing, or tensors do not match in number or shape.
        """
        if self.estimate is None:
            self.estimate = [gradient.detach().clone() for gradient in gradients]
            return self.estimate
        self._check("gradients", gradients)
        if self.gamma:
            if previous is None:
                raise ValueError(
                    f"gamma = {self.gamma} needs `previous`, the gradients at the point before on "
                    "the same sample; call restart() first, or use gamma = 0"
                )
            self._check("previous", previous)
        beta, correction = self.beta, self.gamma * self.beta
        torch._foreach_mul_(self.estimate, beta)
        torch._foreach_add_(self.estimate, list(gradients), alpha=1 - beta + correction)
        if self.gamma and previous is not None:
            torch._foreach_add_(self.estimate, list(previous), alpha=-correction)
        return self.estimate

    def _check(self, name: str, tensors: Sequence[Tensor]) -> None:
        assert self.estimate is not None
        shapes = [tuple(tensor.shape) for tensor in tensors]
        expected = [tuple(tensor.shape) for tensor in self.estimate]
        if shapes != expected:
            raise ValueError(f"{name} have shapes {shapes}, the estimate has {expected}")

    def state_dict(self) -> dict[str, object]:
        """What `load_state_dict` needs to go on."""
        return {"beta": self.beta, "gamma": self.gamma, "estimate": self.estimate}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from a state of the same recursion.

        Raises:
            ValueError: the state is of another beta or gamma.
        """
        found = (state["beta"], state["gamma"])
        if found != (self.beta, self.gamma):
            raise ValueError(
                f"the state has (beta, gamma) = {found}, this estimator {(self.beta, self.gamma)}"
            )
        tensors: Sequence[Tensor] | None = state["estimate"]  # type: ignore[assignment]
        self.estimate = None if tensors is None else [tensor.clone() for tensor in tensors]
