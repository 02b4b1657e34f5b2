"""Stage `text-data`: texts in three parts that share nothing, and the alphabet of the first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparring.diffusion.dndm import corpora
from sparring.diffusion.dndm.catalogues import catalogues
from sparring.diffusion.dndm.config import TextDataConfig
from sparring.diffusion.dndm.rows import Text
from sparring.diffusion.dndm.vocabulary import UNK, Unit, Vocabularies, Vocabulary, split
from sparring.launch.errors import SparringError
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures

REFERENCE = "reference.txt"
Counts = dict[str, int]


def run(
    config: TextDataConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write train.parquet, heldout.parquet, vocabulary.json and, for texts, reference.txt.

    Raises:
        SparringError: too few texts, and what the source raises.
    """
    source_unit: Unit | None
    unit: Unit
    if config.source in ("cmudict", "gettext", "parallel"):
        train, heldout, (source_unit, unit), counts = _pairs(config, context.seed)
    else:
        train, heldout, counts, reference = _pieces(config, context.seed)
        source_unit, unit = None, "characters"
        (output / REFERENCE).write_text(reference, encoding="utf-8")
    if not train or not heldout:
        raise SparringError(
            f"data.source {config.source} leaves {len(train)} texts to train on and {len(heldout)} "
            f"held out ({counts}); both need one: lower data.heldout, or allow longer ones"
        )
    target = Vocabulary.of((row.target for row in train), unit, min_count=config.min_count)
    source = None
    if source_unit is not None:
        sources = (row.source for row in train)
        source = Vocabulary.of(sources, source_unit, min_count=config.min_count)
    Vocabularies(target, source).save(output)
    for name, rows in (("train", train), ("heldout", heldout)):
        write_rows(output / f"{name}.parquet", Text, rows)
    return {
        "train": len(train),
        "heldout": len(heldout),
        "symbols": len(target),
        **counts,
        "unknown_train": _unknown(train, target, source),
        "unknown_heldout": _unknown(heldout, target, source),
    }


def _unknown(rows: Sequence[Text], target: Vocabulary, source: Vocabulary | None) -> int:
    """Symbols that become <unk>."""
    found = sum(target.encode(row.target).count(UNK) for row in rows)
    if source is not None:
        found += sum(source.encode(row.source).count(UNK) for row in rows)
    return found


def _pairs(
    config: TextDataConfig, seed: int
) -> tuple[list[Text], list[Text], tuple[Unit, Unit], Counts]:
    units: tuple[Unit, Unit]
    if config.source in ("cmudict", "gettext"):
        spelt = config.source == "cmudict"
        units = ("characters" if spelt else "words", "words")
        pairs = corpora.cmudict() if spelt else catalogues(config.path)
        rows, counts = _suitable(pairs, config, units)
        order = np.random.default_rng(derive(seed, "split")).permutation(len(rows)).tolist()
        # In the order of the draw, so that the first of them, a batch say, are a fair sample.
        heldout = [rows[n] for n in order[: config.heldout]]
        train = [rows[n] for n in order[config.heldout :]]
    else:
        units = ("words", "words")
        languages = config.languages
        train, counts = _suitable(corpora.parallel(config.path, "train", languages), config, units)
        rest, more = _suitable(corpora.parallel(config.path, config.part, languages), config, units)
        heldout = rest[: config.heldout]
        counts |= {f"{name}_heldout": number for name, number in more.items()}
    train = train[: config.train or None]
    # What is right for a held-out word is a list; in training each of them is a pair.
    each = [
        replace(row, text_id=f"{row.text_id}/{n}" if n else row.text_id, target=said, others=())
        for row in train
        for n, said in enumerate((row.target, *row.others))
        if len(split(said, units[1])) <= config.max_target
    ]
    return each, heldout, units, counts


def _suitable(
    rows: Iterable[Text], config: TextDataConfig, units: tuple[Unit, Unit]
) -> tuple[list[Text], Counts]:
    """Rows with both sides, neither too long; how many were left out and why."""
    found: list[Text] = []
    counts = {"empty": 0, "too_long": 0}
    for row in rows:
        sizes = len(split(row.source, units[0])), len(split(row.target, units[1]))
        if not all(sizes):
            counts["empty"] += 1
        elif sizes[0] > config.max_source or sizes[1] > config.max_target:
            counts["too_long"] += 1
        else:
            found.append(row)
    return found, counts


def _pieces(config: TextDataConfig, seed: int) -> tuple[list[Text], list[Text], Counts, str]:
    """Train, held-out and reference parts of one long text; pieces of equal length."""
    outside = 0
    if config.source == "text8":
        text, outside = corpora.text8_file(config.path)
    elif config.source == "enwik8":
        text = corpora.enwik8_file(config.path)
    else:
        glosses = config.source == "wordnet"
        texts = corpora.wordnet(config.path) if glosses else corpora.chitchat()
        order = np.random.default_rng(derive(seed, "split")).permutation(len(texts)).tolist()
        # Symbols outside the alphabet are mapped, most to a space; this counts them.
        outside = sum(not ("a" <= c <= "z" or c == " ") for t in texts for c in t.lower())
        text = " ".join(corpora.text8(texts[n]) for n in order)
    # As text8 is split, held-out text is the last; the judge's text lies before it.
    heldout_at = len(text) - config.heldout * config.length
    reference_at = heldout_at - int(config.reference * len(text))
    if reference_at < config.length:
        raise SparringError(
            f"{config.source} has {len(text)} symbols, too few for data.heldout = "
            f"{config.heldout} pieces of {config.length}, a reference of {config.reference:g} of "
            "it and a piece to train on; lower data.heldout or data.length"
        )
    train = _cut("t", text[:reference_at], config.length)[: config.train or None]
    heldout = _cut("h", text[heldout_at:], config.length)
    return train, heldout, {"outside_alphabet": outside}, text[reference_at:heldout_at]


def _cut(name: str, text: str, length: int) -> list[Text]:
    """Pieces of equal length; the rest is left."""
    starts = range(0, len(text) - length + 1, length)
    return [Text(f"{name}{n}", "", text[i : i + length]) for n, i in enumerate(starts)]
