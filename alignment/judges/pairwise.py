"""Judges that compare two responses at a time: equal questions are asked once, and remembered.

Shape legend: N prompts or pairs, K responses a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from sparring.alignment.judges.cache import Triple, VerdictCache
from sparring.alignment.judges.protocol import FloatArray, PromptLike, common_k, prompt_text
from sparring.launch.errors import SparringError


class PairwiseJudge(ABC):
    """A judge of single (prompt, first, second) triples.

    Subclasses say how triples are compared; matrix, cache and counts are here.
    """

    name: ClassVar[str]
    cache: VerdictCache | None = None
    """Where logits are looked up first and kept; None: nowhere. Changes no score but rounding."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(pairs_asked=0, pairs_computed=0, pairs_from_cache=0)
        self.undecided: set[Triple] = set()
        """What got no verdict, and so a logit of 0 that is not cached."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """A string that changes whenever scores would."""

    @abstractmethod
    def compare(self, triples: Sequence[Triple]) -> Iterator[tuple[Triple, float | None]]:
        """Each of the distinct triples with its one-order logit, in any order, as they come.

        None is for no verdict.
        """

    def open_cache(self, folder: str) -> None:
        """Keep logits in a folder from now on."""
        self.cache = VerdictCache(folder, self.identity)

    def usage(self) -> dict[str, float]:
        """Pairs asked, computed and found in the cache so far; the rest were repeats."""
        return {name: float(value) for name, value in self.counts.items()}

    def logits(
        self, prompts: Sequence[PromptLike], firsts: Sequence[str], seconds: Sequence[str]
    ) -> FloatArray:
        """One-order logits L_ab = logit that the first response beats the second.

        Args:
            prompts, firsts, seconds: N each.

        Returns:
            (N,) float32. Independent of the other rows to rounding.

        Raises:
            SparringError: the lists differ in length.
        """
        if not len(prompts) == len(firsts) == len(seconds):
            raise SparringError(
                f"{len(prompts)} prompts, {len(firsts)} firsts and {len(seconds)} seconds "
                f"do not line up"
            )
        triples = list(zip(map(prompt_text, prompts), firsts, seconds, strict=True))
        distinct = list(dict.fromkeys(triples))
        values = {} if self.cache is None else self.cache.find(distinct)
        wanted = [triple for triple in distinct if triple not in values]
        self.counts["pairs_asked"] += len(triples)
        self.counts["pairs_from_cache"] += len(values)
        self.counts["pairs_computed"] += len(wanted)
        values |= self._computed(wanted)
        return np.array([values[triple] for triple in triples], dtype=np.float32)

    def _computed(self, wanted: Sequence[Triple]) -> dict[Triple, float]:
        found: dict[Triple, float] = {}
        if not wanted:
            return found
        try:
            for triple, value in self.compare(wanted):
                found[triple] = 0.0 if value is None else value
                if value is None:
                    self.undecided.add(triple)
                    continue
                self.undecided.discard(triple)
                if self.cache is not None:
                    self.cache.add({triple: value})
        finally:  # what an error leaves behind was computed (and perhaps paid for) all the same
            if self.cache is not None:
                self.cache.flush()
        return found

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) logits, row beats column, of all ordered pairs; the diagonal is 0.

        The matrix is not antisymmetric: such judges are sensitive to order, and the convention that
        turns L_ij and L_ji into a probability is the pairing stage's choice.

        Raises:
            SparringError: responses are ragged.
        """
        k = common_k(prompts, responses)
        places = [
            (n, i, j) for n in range(len(prompts)) for i in range(k) for j in range(k) if i != j
        ]
        values = self.logits(
            [prompts[n] for n, _, _ in places],
            [responses[n][i] for n, i, _ in places],
            [responses[n][j] for n, _, j in places],
        )
        matrix = np.zeros((len(prompts), k, k), dtype=np.float32)
        for place, value in zip(places, values, strict=True):
            matrix[place] = value
        return matrix

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) empty: 1 where a response is blank; it is judged as the text that it is."""
        shape = (len(prompts), common_k(prompts, responses))
        blank = [float(not text.strip()) for given in responses for text in given]
        return {"empty": np.array(blank, dtype=np.float32).reshape(shape)}
