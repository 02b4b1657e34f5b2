"""A judge with a rule that a tiny random model can learn: more of the letter "a" is better."""

from __future__ import annotations

import numpy as np


class LetterJudge:
    name = "letter"

    def __init__(self, weight: float = 1.0, broken: float = 0.0) -> None:
        self.weight, self.broken = weight, broken

    @property
    def identity(self) -> str:
        return f"letter/{self.weight}"

    def matrix(self, prompts, responses):
        counts = self.weight * self._counts(responses)
        logits = counts[:, :, None] - counts[:, None, :]
        if self.broken:
            logits[0, 0, 1] = np.nan
        return logits.astype(np.float32)

    def details(self, prompts, responses):
        return {"letters": self._counts(responses).astype(np.float32)}

    @staticmethod
    def _counts(responses):
        return np.array([[text.count("a") for text in row] for row in responses], dtype=float)


def make(path, **options):
    return LetterJudge(**options)
