"""Stage `evaluate-text-diffusion`: samples against held-out texts, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.diffusion.dndm.collect import REFERENCE
from sparring.diffusion.dndm.config import TextEvaluateConfig
from sparring.diffusion.dndm.measures import NgramModel, entropy, nearest, words_known
from sparring.diffusion.dndm.rows import SampledText, Text
from sparring.diffusion.dndm.vocabulary import SPECIAL, Vocabularies, split
from sparring.launch import artifacts
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures

_RESAMPLES = 1000


def run(
    config: TextEvaluateConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write evaluation.json; the figures are [value, low, high], and what sampling cost.

    Raises:
        SparringError: no samples, no reference text, or sacrebleu is missing.
        UsageError: a measure that does not fit the data.
    """
    vocabularies = Vocabularies.load(inputs["data"])
    rows = read_rows(inputs["samples"] / "samples.parquet", SampledText)
    if not rows:
        raise SparringError(f"{inputs['samples']} holds no sample")
    pairs = vocabularies.source is not None
    measures = config.measures or (("errors",) if pairs else ("perplexity", "words", "entropy"))
    if not pairs and set(measures) & {"errors", "bleu", "chrf"}:
        raise UsageError("errors, bleu and chrf need pairs; texts have perplexity, words, entropy")
    found: dict[str, Any] = {}
    seed = derive(context.seed, "bootstrap")
    if "errors" in measures:
        found |= _errors(rows, vocabularies, seed, config.level)
    for name in ("bleu", "chrf"):
        if name in measures:
            found[name] = _sacrebleu(name, rows)
    if {"perplexity", "words"} & set(measures):
        reference = _reference(inputs["data"])
        heldout = [row.target for row in read_rows(inputs["data"] / "heldout.parquet", Text)]
        if "perplexity" in measures:
            symbols = vocabularies.target.symbols[len(SPECIAL) :]
            found |= _perplexity(rows, heldout, reference, symbols, seed, config.level)
        if "words" in measures:
            found |= _words(rows, heldout, reference, seed, config.level)
    if "entropy" in measures:
        unit = vocabularies.target.unit
        found["entropy"] = entropy([split(row.text, unit) for row in rows])
        found["heldout_entropy"] = entropy([split(row.target, unit) for row in rows])
    artifacts.write_json(output / "evaluation.json", found)
    sampled = artifacts.read(inputs["samples"])
    cost = sampled.figures if sampled else {}
    return {**found, **{k: cost[k] for k in ("nfe", "row_evaluations", "seconds") if k in cost}}


def ratio(above: Sequence[float], below: Sequence[float], seed: int, level: float) -> list[float]:
    """sum(above) / sum(below) with a bootstrap interval over rows: [value, low, high]."""
    numerator, denominator = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    if not denominator.sum():
        return [0.0, 0.0, 0.0]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(len(numerator), size=len(numerator))
        values.append(numerator[drawn].sum() / max(denominator[drawn].sum(), 1))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return [float(numerator.sum() / denominator.sum()), float(low), float(high)]


def _errors(
    rows: Sequence[SampledText], vocabularies: Vocabularies, seed: int, level: float
) -> Figures:
    """Edits a target symbol (PER for phones), share of sequences that are not right (WER)."""
    unit = vocabularies.target.unit
    pairs = [
        nearest(split(row.text, unit), [split(t, unit) for t in (row.target, *row.others)])
        for row in rows
    ]
    wrong = [float(distance > 0) for distance, _ in pairs]
    return {
        "symbol_error": ratio([d for d, _ in pairs], [n for _, n in pairs], seed, level),
        "sequence_error": ratio(wrong, [1.0] * len(wrong), seed, level),
    }


def _sacrebleu(name: str, rows: Sequence[SampledText]) -> float:
    """BLEU or chrF of subwords put together again; no tokenizer of sacrebleu's own."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise SparringError(f"{name} needs sacrebleu: pip install sacrebleu ({error})") from None

    def whole(text: str) -> str:
        return text.replace("@@ ", "").removesuffix("@@")

    metric: Any = BLEU(tokenize="none", force=True) if name == "bleu" else CHRF()
    targets = [whole(row.target) for row in rows]
    return float(metric.corpus_score([whole(row.text) for row in rows], [targets]).score)


def _reference(folder: Path) -> str:
    path = folder / REFERENCE
    if not path.is_file() or not path.stat().st_size:
        raise SparringError(
            f"{path} is missing or empty; perplexity and words need a text of their own, which "
            "text-data keeps for sources that are no pairs"
        )
    return path.read_text(encoding="utf-8")


def _perplexity(
    rows: Sequence[SampledText],
    heldout: Sequence[str],
    reference: str,
    symbols: Sequence[str],
    seed: int,
    level: float,
) -> Figures:
    """Of samples, and of held-out texts: below that is too sure of itself, not better."""
    model = NgramModel(reference, symbols=symbols)
    found: Figures = {}
    texts = {"perplexity": [row.text for row in rows], "heldout_perplexity": list(heldout)}
    for name, some in texts.items():
        nats = [-float(model.log_probabilities(text).sum()) for text in some]
        mean = ratio(nats, [float(len(text)) for text in some], seed, level)
        found[name] = [float(np.exp(value)) for value in mean]
    return found


def _words(
    rows: Sequence[SampledText],
    heldout: Sequence[str],
    reference: str,
    seed: int,
    level: float,
) -> Figures:
    """Share of whole words that the reference text has, of samples and of held-out texts."""
    known = frozenset(reference.split())
    found: Figures = {}
    texts = {"words_known": [row.text for row in rows], "heldout_words_known": list(heldout)}
    for name, some in texts.items():
        counted = [words_known(text, known) for text in some]
        found[name] = ratio([k for k, _ in counted], [n for _, n in counted], seed, level)
    return found
