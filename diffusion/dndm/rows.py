"""Typed rows of the text loop."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Text:
    """A text, with its source if there is one, as symbols joined the way its file has them."""

    text_id: str
    source: str
    """Empty where nothing is translated."""
    target: str
    others: tuple[str, ...] = ()
    """Further targets that are right too."""


@dataclass(frozen=True)
class SampledText:
    """A text that a sampler made. Time is in the artifact's figures: rows are the same each run."""

    text_id: str
    source: str
    target: str
    """What was held out."""
    others: tuple[str, ...]
    text: str
    ids: tuple[int, ...]
    score: float
    """(log p of the length + log p of the tokens when they were written) / tokens, in nats; of
    ancestral samplers the first part only."""
    evaluations: int
    """Calls that this row took part in; with a length beam the sum over its candidates."""
    batch: int
    """Number of the batch, whose rows were sampled together."""
    nfe: int
    """Network calls of that batch."""


@dataclass(frozen=True)
class TimedText(SampledText):
    """A row of a shard: with the seconds that its batch took."""

    seconds: float

    def untimed(self) -> SampledText:
        """The row without them."""
        names = [field.name for field in fields(SampledText)]
        return SampledText(**{name: getattr(self, name) for name in names})
