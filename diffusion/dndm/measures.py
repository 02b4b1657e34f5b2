"""Measures of texts: edit distance, a character n-gram model, words, entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def edits(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Levenshtein's distance: fewest insertions, deletions and substitutions."""
    row = list(range(len(theirs) + 1))
    for i, symbol in enumerate(ours, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(theirs, 1):
            best = min(row[j] + 1, row[j - 1] + 1, before + (symbol != other))
            before, row[j] = row[j], best
    return row[-1]


def nearest(ours: Sequence[str], targets: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Distance to the nearest of several targets, and that target's length."""
    return min((edits(ours, target), len(target)) for target in targets)


class NgramModel:
    """A Witten-Bell interpolated n-gram model of symbols.

        p(c | h) = (n(hc) + d(h) p(c | h')) / (n(h) + d(h)),    d(h) = #{c: n(hc) > 0},

    h' being h without its first symbol, and below the unigrams 1 / (number of symbols).

    Args:
        text: to count.
        order: n; the context has n - 1 symbols.
        symbols: that can be, in any order; others are one more symbol.

    Raises:
        ValueError: an empty text, order < 1, or more n-grams than an int64 numbers.
    """

    def __init__(self, text: str, *, order: int = 5, symbols: Sequence[str]) -> None:
        self.order, self._places = order, {s: n for n, s in enumerate(dict.fromkeys(symbols))}
        self._size = len(self._places) + 1
        if not text or order < 1:
            raise ValueError("an n-gram model needs a text and an order of at least 1")
        if order * math.log2(self._size) > 62:
            raise ValueError(f"{self._size} symbols are too many for {order}-grams")
        ids = self._encode(text)
        self._grams: list[tuple[Integers, Integers]] = []
        self._contexts: list[tuple[Integers, Integers, Integers]] = []
        for n in range(1, order + 1):
            keys, counts = np.unique(self._keys(ids, n), return_counts=True)
            # A context's total is that of its continuations: the text's last one has none.
            contexts, first = np.unique(keys // self._size, return_index=True)
            totals = np.add.reduceat(counts, first) if len(counts) else counts
            kinds = np.diff(np.append(first, len(keys)))
            self._grams.append((keys, counts))
            self._contexts.append((contexts, totals, kinds))

    def _encode(self, text: str) -> Integers:
        other = self._size - 1
        return np.array([self._places.get(c, other) for c in text], dtype=np.int64)

    def _keys(self, ids: Integers, n: int) -> Integers:
        """(len - n + 1,) number of the n-gram that begins at each place."""
        keys = np.zeros(max(len(ids) - n + 1, 0), dtype=np.int64)
        for k in range(n):
            keys = keys * self._size + ids[k : k + len(keys)]
        return keys

    def log_probabilities(self, text: str) -> Floats:
        """(len(text),) nats; the first symbols have what context there is."""
        ids = self._encode(text)
        p = np.full(len(ids), 1 / self._size)
        for n in range(1, self.order + 1):
            keys = self._keys(ids, n)
            count = _look_up(*self._grams[n - 1], keys)
            contexts, totals, kinds = self._contexts[n - 1]
            total = _look_up(contexts, totals, keys // self._size)
            distinct = _look_up(contexts, kinds, keys // self._size)
            seen = total > 0
            lower = p[n - 1 :]
            mixed = (count + distinct * lower) / np.where(seen, total + distinct, 1)
            p[n - 1 :] = np.where(seen, mixed, lower)
        found: Floats = np.log(p)
        return found


def _look_up(keys: Integers, values: Integers, wanted: Integers) -> Integers:
    """Values of sorted keys; 0 where there is no such key."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def entropy(counts: Floats) -> float:
    """Bits a symbol of the law of single symbols, from how often each comes; 0 of no symbols."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum())


def words_known(text: str, known: frozenset[str]) -> tuple[int, int]:
    """How many of a text's words are known, and how many there are.

    The first and the last are cut off by the text's ends, and do not count.
    """
    inner = text.split(" ")[1:-1]
    inner = [word for word in inner if word]
    return sum(word in known for word in inner), len(inner)
