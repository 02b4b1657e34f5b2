"""Stage `evaluate-text-diffusion`: samples against held-out texts, with bootstrap intervals."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparring.diffusion.dndm.collect import REFERENCE
from sparring.diffusion.dndm.config import STEPLESS, TextEvaluateConfig
from sparring.diffusion.dndm.measures import NgramModel, entropy, nearest, words_known
from sparring.diffusion.dndm.rows import SampledText, Text
from sparring.diffusion.dndm.stages import SampleTextStage
from sparring.diffusion.dndm.vocabulary import SPECIAL, Unit, Vocabularies, split
from sparring.launch import artifacts
from sparring.launch.config import build
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures

_RESAMPLES = 1000
_COST = ("nfe", "row_evaluations", "seconds", "batches")
Floats = npt.NDArray[np.float64]


def run(
    config: TextEvaluateConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write evaluation.json; measures are [value, low, high], beside them what sampling cost.

    Raises:
        SparringError: no samples, no reference text, no network for bits, or sacrebleu is missing.
        UsageError: a measure that does not fit the data.
    """
    vocabularies = Vocabularies.load(inputs["data"])
    rows = read_rows(inputs["samples"] / "samples.parquet", SampledText)
    if not rows:
        raise SparringError(f"{inputs['samples']} holds no sample")
    pairs = vocabularies.source is not None
    measures = config.measures or (("errors",) if pairs else ("perplexity", "words", "entropy"))
    if not pairs and set(measures) & {"errors", "bleu", "chrf"}:
        raise UsageError(
            "errors, bleu and chrf need pairs; texts have perplexity, words, entropy, bits"
        )
    heldout = read_rows(inputs["data"] / "heldout.parquet", Text)
    spread = Spread(derive(context.seed, "bootstrap"), config.level)
    found: dict[str, Any] = {}
    if "errors" in measures:
        found |= _errors(rows, vocabularies.target.unit, spread)
    for name in ("bleu", "chrf"):
        if name in measures:
            found[name] = _sacrebleu(name, rows, spread)
    if {"perplexity", "words"} & set(measures):
        reference, texts = _reference(inputs["data"]), [row.target for row in heldout]
        if "perplexity" in measures:
            symbols = vocabularies.target.symbols[len(SPECIAL) :]
            found |= _perplexity(rows, texts, reference, symbols, spread)
        if "words" in measures:
            found |= _words(rows, texts, reference, spread)
    if "entropy" in measures:
        found |= _entropy(rows, vocabularies.target.unit, spread)
    if "bits" in measures:
        found["bits"] = _bits(inputs, vocabularies, heldout[: config.bits_texts], spread)
    artifacts.write_json(output / "evaluation.json", found)
    sampled = artifacts.read(inputs["samples"])
    cost = sampled.figures if sampled else {}
    return {**found, **{k: cost[k] for k in _COST if k in cost}}


@dataclass(frozen=True)
class Spread:
    """Bootstrap intervals over sequences, whose draws depend on the seed alone."""

    seed: int
    level: float

    def interval(self, rows: Floats, statistic: Callable[[Floats], float]) -> list[float]:
        """[value, low, high] of a statistic of the sum over rows.

        Args:
            rows: (R, F) what each sequence adds.
            statistic: of the sum, (F,).
        """
        rng = np.random.default_rng(self.seed)
        drawn = (rng.integers(len(rows), size=len(rows)) for _ in range(_RESAMPLES))
        values = [statistic(rows[some].sum(0)) for some in drawn]
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return [statistic(rows.sum(0)), float(low), float(high)]

    def ratio(self, above: Sequence[float], below: Sequence[float]) -> list[float]:
        """[value, low, high] of sum(above) / sum(below); 0 where nothing is below."""
        rows = np.array([above, below], dtype=np.float64).T
        return self.interval(rows, lambda total: float(total[0] / max(total[1], 1)))


def _errors(rows: Sequence[SampledText], unit: Unit, spread: Spread) -> Figures:
    """Edits a target symbol (PER for phones), share of sequences that are not right (WER)."""
    pairs = [
        nearest(split(row.text, unit), [split(t, unit) for t in (row.target, *row.others)])
        for row in rows
    ]
    wrong = [float(distance > 0) for distance, _ in pairs]
    return {
        "symbol_error": spread.ratio([d for d, _ in pairs], [n for _, n in pairs]),
        "sequence_error": spread.ratio(wrong, [1.0] * len(wrong)),
    }


def _sacrebleu(name: str, rows: Sequence[SampledText], spread: Spread) -> list[float]:
    """BLEU or chrF against all targets of a source, of subwords put together again; no tokenizer of
    sacrebleu's own."""
    try:
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise SparringError(f"{name} needs sacrebleu: pip install sacrebleu ({error})") from None

    def whole(text: str) -> str:
        return text.replace("@@ ", "").removesuffix("@@")

    metric: Any = BLEU(tokenize="none", force=True) if name == "bleu" else CHRF()
    targets = ([whole(text) for text in (row.target, *row.others)] for row in rows)
    streams = list(itertools.zip_longest(*targets))  # None where a source has fewer
    # sacrebleu's own bootstrap has one level and one seed; both scores are of summed statistics.
    statistics = metric._extract_corpus_statistics([whole(row.text) for row in rows], streams)
    return spread.interval(
        np.array(statistics, dtype=np.float64),
        lambda total: float(metric._compute_score_from_stats(total.astype(int).tolist()).score),
    )


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
    spread: Spread,
) -> Figures:
    """Of samples, and of held-out texts: below that is too sure of itself, not better."""
    model = NgramModel(reference, symbols=symbols)
    found: Figures = {}
    texts = {"perplexity": [row.text for row in rows], "heldout_perplexity": list(heldout)}
    for name, some in texts.items():
        nats = [-float(model.log_probabilities(text).sum()) for text in some]
        mean = spread.ratio(nats, [float(len(text)) for text in some])
        found[name] = [math.exp(value) for value in mean]
    return found


def _words(
    rows: Sequence[SampledText], heldout: Sequence[str], reference: str, spread: Spread
) -> Figures:
    """Share of whole words that the reference text has, of samples and of held-out texts."""
    known = frozenset(reference.split())
    found: Figures = {}
    texts = {"words_known": [row.text for row in rows], "heldout_words_known": list(heldout)}
    for name, some in texts.items():
        counted = [words_known(text, known) for text in some]
        found[name] = spread.ratio([k for k, _ in counted], [n for _, n in counted])
    return found


def _entropy(rows: Sequence[SampledText], unit: Unit, spread: Spread) -> Figures:
    """Bits a symbol, of samples and of as many held-out texts; low where samples repeat."""
    found: Figures = {}
    texts = {"entropy": [r.text for r in rows], "heldout_entropy": [r.target for r in rows]}
    for name, some in texts.items():
        counts = [Counter(split(text, unit)) for text in some]
        symbols = sorted(set().union(*counts))
        table = np.array([[each[s] for s in symbols] for each in counts], dtype=np.float64)
        found[name] = spread.interval(table, entropy)
    return found


def _bits(
    inputs: Mapping[str, Path],
    vocabularies: Vocabularies,
    heldout: Sequence[Text],
    spread: Spread,
) -> list[float]:
    """Bound on -log2 p of held-out texts, a symbol, of the network with the sampler's T."""
    if "model" not in inputs:
        raise SparringError("bits is of a network: give the one that sampled, --model FOLDER")
    sampled = artifacts.read(inputs["samples"])
    if sampled is None:
        raise SparringError(
            f"{inputs['samples']} does not say how it was sampled, which decides the T of bits; it "
            "must be a finished artifact of sample-text-diffusion"
        )
    # Not at the top: the other measures need no torch.
    from sparring.diffusion.dndm.likelihood import bound
    from sparring.diffusion.dndm.network import load, sampling_schedule
    from sparring.launch.collective import device

    settings = build(SampleTextStage, sampled.manifest["config"], str(inputs["samples"]))
    network = load(inputs["model"], vocabularies).to(device())
    source = vocabularies.source
    targets = [vocabularies.target.encode(row.target) for row in heldout]
    nats = bound(
        network,
        targets,
        [source.encode(row.source) for row in heldout] if source else [],
        steps=math.inf if settings.algorithm in STEPLESS else settings.steps or math.inf,
        schedule=sampling_schedule(settings, network.config),
        seed=spread.seed,
    )
    bits = (nats / math.log(2)).tolist()
    return spread.ratio(bits, [float(len(ids)) for ids in targets])
