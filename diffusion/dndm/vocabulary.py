"""Symbols and their numbers. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from sparring.launch import artifacts
from sparring.launch.errors import SparringError

PAD, MASK, UNK = 0, 1, 2
SPECIAL = ("<pad>", "<mask>", "<unk>")
Unit = Literal["characters", "words"]
FILE = "vocabulary.json"


def split(text: str, unit: Unit) -> list[str]:
    """Symbols of a text: its characters, or what stands between its spaces."""
    return list(text) if unit == "characters" else text.split()


def join(symbols: Iterable[str], unit: Unit) -> str:
    """The text of symbols, which `split` takes apart again."""
    return ("" if unit == "characters" else " ").join(symbols)


@dataclass(frozen=True)
class Vocabulary:
    """One side's symbols; number 0 is padding, 1 the mask, 2 all that is unknown."""

    symbols: tuple[str, ...]
    unit: Unit

    @classmethod
    def of(cls, texts: Iterable[str], unit: Unit, *, min_count: int = 1) -> Vocabulary:
        """Of all symbols that come `min_count` times, in their sorted order."""
        counts = Counter(symbol for text in texts for symbol in split(text, unit))
        known = sorted(s for s, n in counts.items() if n >= min_count and s not in SPECIAL)
        return cls((*SPECIAL, *known), unit)

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """Numbers; `UNK` for symbols outside the alphabet."""
        place = self._places
        return [place.get(symbol, UNK) for symbol in split(text, self.unit)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text without padding."""
        return join((self.symbols[i] for i in ids if i != PAD), self.unit)

    @cached_property
    def _places(self) -> dict[str, int]:
        # Special names are never found in text: "<mask>" as a word of a corpus is unknown.
        return {s: i for i, s in enumerate(self.symbols) if i >= len(SPECIAL)}


@dataclass(frozen=True)
class Vocabularies:
    """Of both sides; the source's is None where there is none."""

    target: Vocabulary
    source: Vocabulary | None

    @property
    def digest(self) -> str:
        """Hash of the symbols and their numbers."""
        return artifacts.hash_json(self._plain())[:16]

    def _plain(self) -> dict[str, dict[str, Sequence[str] | str] | None]:
        return {
            name: {"unit": side.unit, "symbols": list(side.symbols)} if side is not None else None
            for name, side in (("target", self.target), ("source", self.source))
        }

    def save(self, folder: Path) -> None:
        """Write vocabulary.json."""
        artifacts.write_json(folder / FILE, self._plain())

    @classmethod
    def load(cls, folder: Path) -> Vocabularies:
        """Read vocabulary.json.

        Raises:
            SparringError: there is none, or it is none.
        """
        path = folder / FILE
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            sides = {
                name: side and Vocabulary(tuple(side["symbols"]), side["unit"])
                for name, side in found.items()
            }
            return cls(sides["target"], sides["source"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparringError(
                f"{path} cannot be read ({error}); the folder must be an artifact of text-data or "
                "train-text-diffusion"
            ) from None
