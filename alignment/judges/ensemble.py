"""Several judges as one: their win probabilities are averaged.

Shape legend: N prompts, K responses a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparring.alignment.judges.protocol import FloatArray, Judge, PromptLike, checked_matrix
from sparring.launch.errors import UsageError

SMALLEST = 1e-6
"""Averaged probabilities are kept this far from 0 and 1, so |L| is at most 13.8."""


@dataclass(frozen=True)
class Member:
    """A judge in an ensemble."""

    label: str
    """Before the names of its figures; distinct within the ensemble."""
    judge: Judge
    weight: float = 1.0


class Ensemble:
    """L_ij = log P_ij/P_ji with P the weighted mean of the members' probabilities.

    Each member's logits become probabilities by the convention `pairwise`, σ((L_ij − L_ji)/2), so
    the result is antisymmetric, and σ(L_ij) is the mean.
    """

    name = "ensemble"

    def __init__(self, members: Sequence[Member]) -> None:
        """Put judges together.

        Raises:
            UsageError: no member, equal labels, or a weight that is not positive.
        """
        labels = [member.label for member in members]
        if not members:
            raise UsageError("an ensemble needs members: [[judge.members]] tables with a name each")
        if len(set(labels)) < len(labels):
            raise UsageError(f"an ensemble's members need different labels, not {labels}")
        for member in members:
            if not 0 < member.weight < np.inf:
                raise UsageError(
                    f"the weight of {member.label} must be positive, not {member.weight}"
                )
        self.members = tuple(members)

    @property
    def identity(self) -> str:
        """The members' identities and weights."""
        parts = [f"{m.weight:g}·({m.judge.identity})" for m in self.members]
        return f"ensemble/1 {' + '.join(parts)}"

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) logits, antisymmetric.

        Raises:
            SparringError: a member's matrix is not what a judge promises.
        """
        total = sum(member.weight for member in self.members)
        mean_NKK = np.zeros(())
        for member in self.members:
            logits_NKK = checked_matrix(member.judge, prompts, responses).astype(np.float64)
            half_NKK = (logits_NKK - np.swapaxes(logits_NKK, 1, 2)) / 2
            # tanh keeps P_ij + P_ji = 1 to the last digit, and does not overflow.
            mean_NKK = mean_NKK + member.weight / total * (0.5 + 0.5 * np.tanh(half_NKK / 2))
        mean_NKK = np.clip(mean_NKK, SMALLEST, 1 - SMALLEST)
        logit_NKK = np.log(mean_NKK) - np.log1p(-mean_NKK)
        matrix: FloatArray = ((logit_NKK - np.swapaxes(logit_NKK, 1, 2)) / 2).astype(np.float32)
        return matrix

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) figures of each member, its label before their names."""
        return {
            f"{member.label}.{name}": values
            for member in self.members
            for name, values in member.judge.details(prompts, responses).items()
        }

    def usage(self) -> dict[str, float]:
        """What each member counts, its label before the names."""
        return {
            f"{member.label}.{name}": value
            for member in self.members
            for name, value in getattr(member.judge, "usage", dict)().items()
        }
