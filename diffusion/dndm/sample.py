"""Stage `sample-text-diffusion`: texts by any named sampler, in shards.

A row's randomness is derived from (seed, row, length), so samples depend on shards no more than the
network's rounding does.

Shape legend: B rows (candidates), N target positions, S source positions, L lengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.diffusion.dndm.algorithms import Sampler, algorithm, settings_of
from sparring.diffusion.dndm.ancestral import Ancestral
from sparring.diffusion.dndm.denoisers import shaped
from sparring.diffusion.dndm.network import TextDenoiser, load, padded, sampling_schedule
from sparring.diffusion.dndm.reveal import Reveal
from sparring.diffusion.dndm.rows import SampledText, Text, TimedText
from sparring.diffusion.dndm.stages import SampleTextStage
from sparring.diffusion.dndm.vocabulary import MASK, PAD, SPECIAL, UNK, Vocabularies
from sparring.launch import shards
from sparring.launch.collective import device
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures

SAMPLES = "samples.parquet"


def build_sampler(settings: SampleTextStage, network: TextDenoiser) -> Sampler:
    """The sampler that settings name.

    Raises:
        UsageError: a setting that the algorithm does not take, or a network that it is not for.
    """
    config = network.config
    known = settings_of(settings.algorithm)
    given: dict[str, Any] = {"schedule": sampling_schedule(settings, config)}
    if "steps" in known:
        given["steps"] = settings.steps or math.inf
    given |= {k: getattr(settings, k) for k in ("threshold", "bound") if k in known}
    given |= {k: v for k in ("position", "token") if (v := getattr(settings, k))}
    if config.shape.schedule_conditioning:
        given["schedule_conditioning"] = True
    try:
        sampler = algorithm(settings.algorithm, **given)
    except ValueError as error:
        told = (
            "; the network needs schedule_conditioning" if "schedule_conditioning" in given else ""
        )
        raise UsageError(f"{settings.name}: {error}{told}") from None
    if isinstance(sampler, Ancestral) and sampler.cache and config.shape.time:
        raise UsageError("mdlm-cache is for networks that ignore t: train with model.time = false")
    if settings.length_beam > 1 and (
        not isinstance(sampler, Reveal) or not config.source_vocab_size
    ):
        raise UsageError(
            "length_beam above 1 needs a network with a source, and a sampler whose tokens have a "
            f"score; {settings.algorithm} of this network has not"
        )
    return sampler


@dataclass
class TextSampler:
    """A network with all that sampling needs."""

    settings: SampleTextStage
    network: TextDenoiser
    vocabularies: Vocabularies
    sampler: Sampler
    seed: int

    @torch.no_grad()
    def batch(self, rows: Sequence[tuple[int, Text]]) -> list[TimedText]:
        """Sample a text for each of some numbered rows."""
        first, place = rows[0][0], self.network.device
        started = time.perf_counter()
        source = self._sources([row for _, row in rows])
        sizes, owner, length_logp, cond = self._candidates([row for _, row in rows], source)
        prompt = self.vocabularies.target.encode(self.settings.prompt)
        x = padded([[*prompt, *[MASK] * (size - len(prompt))] for size in sizes]).to(place)
        free = torch.tensor(
            [[len(prompt) <= n < size for n in range(x.shape[1])] for size in sizes]
        )
        streams = [
            torch.Generator().manual_seed(derive(self.seed, "row", rows[b][0], size))
            for b, size in zip(owner, sizes, strict=True)
        ]
        denoiser = shaped(
            self.network.denoiser,
            temperature=self.settings.temperature,
            top_k=self.settings.top_k,
            top_p=self.settings.top_p,
            suppress_tokens=[PAD, UNK, MASK],
        )
        made = self.sampler.sample(
            denoiser,
            x,
            free.to(place),
            noise=self.network.config.noise,
            generator=streams,
            cond=cond,
        )
        seconds = time.perf_counter() - started
        total = torch.zeros(len(x)) if made.logp_BN is None else made.logp_BN.sum(1).cpu()
        # The length's own chance counts: a network that never saw a wrong length is as sure of a
        # text that lacks its end.
        score = ((total + torch.tensor(length_logp, dtype=torch.float64)) / free.sum(1)).tolist()
        found = []
        for b, (_, row) in enumerate(rows):
            mine = [c for c, whose in enumerate(owner) if whose == b]
            best = max(mine, key=lambda c: score[c])
            ids = made.sequences[best, : sizes[best]].tolist()
            found.append(
                TimedText(
                    text_id=row.text_id,
                    source=row.source,
                    target=row.target,
                    others=row.others,
                    text=self.vocabularies.target.decode(ids),
                    ids=tuple(ids),
                    score=score[best],
                    evaluations=int(made.evaluations[mine].sum()),
                    batch=first // self.settings.batch,
                    nfe=made.nfe,
                    seconds=seconds,
                )
            )
        return found

    def _sources(self, rows: Sequence[Text]) -> Tensor | None:
        """(B, S)

        Raises:
            SparringError: a source that is empty, or longer than the network takes.
        """
        if self.vocabularies.source is None:
            return None
        encoded = [self.vocabularies.source.encode(row.source) for row in rows]
        most = self.network.config.max_source
        for row, ids in zip(rows, encoded, strict=True):
            if not 0 < len(ids) <= most:
                raise SparringError(
                    f"source of {row.text_id!r} has {len(ids)} symbols, the network takes 1 to "
                    f"{most}; leave it out, or train with a larger data.max_source"
                )
        return padded(encoded).to(self.network.device)

    def _candidates(
        self, rows: Sequence[Text], source_BS: Tensor | None
    ) -> tuple[list[int], list[int], list[float], dict[str, Tensor]]:
        """Length of each candidate, the row that it is for, log p(length), and its conditions."""
        most = self.network.config.max_target
        if source_BS is None:
            default = len(self.vocabularies.target.encode(rows[0].target))
            sizes = [self.settings.length or default] * len(rows)
            return sizes, list(range(len(rows))), [0.0] * len(rows), {}
        memory = self.network.encode(source_BS)
        logits = self.network.length_logits(memory, source_BS)
        offsets = self.network.config.shape.offsets
        real = (source_BS != PAD).sum(1).tolist()
        sizes, owner, length_logp = [], [], []
        for b, logp in enumerate(logits.double().log_softmax(1).cpu()):
            lengths = real[b] + torch.arange(-offsets, offsets + 1)
            logp = logp.masked_fill((lengths < 1) | (lengths > most), -torch.inf)
            order = logp.argsort(descending=True, stable=True)[: self.settings.length_beam]
            found = [(int(lengths[n]), float(logp[n])) for n in order if logp[n] > -torch.inf]
            found = found or [(most, 0.0)]  # all that it knows are longer than the network
            sizes += [size for size, _ in found]
            length_logp += [chance for _, chance in found]
            owner += [b] * len(found)
        at = torch.tensor(owner, device=source_BS.device)
        return sizes, owner, length_logp, {"source": source_BS[at], "memory": memory[at]}


def _rows(settings: SampleTextStage, heldout: Sequence[Text], *, source: bool) -> list[Text]:
    """What to sample; without a source held-out texts are repeated as often as is needed."""
    count = settings.count or len(heldout)
    if not source:
        return [replace(heldout[n % len(heldout)], text_id=f"s{n}") for n in range(count)]
    if count > len(heldout):
        raise UsageError(
            f"count is {count}, but only {len(heldout)} pairs are held out; lower it, or raise "
            "data.heldout"
        )
    return list(heldout[:count])


def _load(
    config: SampleTextStage, inputs: Mapping[str, Path]
) -> tuple[TextDenoiser, Vocabularies, list[Text]]:
    """Network, vocabularies, and rows to sample for.

    Raises:
        SparringError: what cannot be sampled.
    """
    vocabularies = Vocabularies.load(inputs["data"])
    network = load(inputs["model"], vocabularies)
    heldout = read_rows(inputs["data"] / "heldout.parquet", Text)
    if not heldout:
        raise SparringError(f"{inputs['data']} holds no held-out text")
    source = vocabularies.source is not None
    if source and (config.prompt or config.length):
        raise UsageError("prompt and length are for networks without a source")
    length = config.length or len(vocabularies.target.encode(heldout[0].target))
    most = network.config.max_target
    if not source and length > most:
        raise SparringError(f"length is {length}, but the network takes at most {most} symbols")
    prompt = vocabularies.target.encode(config.prompt)
    if len(prompt) >= length and not source:
        raise UsageError(
            f"the prompt has {len(prompt)} symbols and the sequence {length}: nothing would be "
            f"left to sample; shorten it, or set length (at most {most})"
        )
    if UNK in prompt:
        outside = sorted(set(config.prompt) - set(vocabularies.target.symbols[len(SPECIAL) :]))
        raise UsageError(f"the prompt has symbols outside the alphabet: {' '.join(outside)!r}")
    return network, vocabularies, _rows(config, heldout, source=source)


def run(
    config: SampleTextStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Sample this rank's shards.

    Raises:
        SparringError: another vocabulary, sequences that are too long, no held-out texts.
        UsageError: settings that the sampler does not take.
    """
    network, vocabularies, rows = _load(config, inputs)
    network = network.to(device())
    sampler = TextSampler(
        config, network, vocabularies, build_sampler(config, network), context.seed
    )
    shards.make(
        list(enumerate(rows)), config.batch, TimedText, sampler.batch, context, unit="texts"
    )
    return {}


def finish(
    config: SampleTextStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write samples.parquet; calls and seconds are figures, so that the file is reproducible."""
    count = config.count or len(read_rows(inputs["data"] / "heldout.parquet", Text))
    rows = shards.merge(math.ceil(count / config.batch), TimedText, context.work)
    write_rows(output / SAMPLES, SampledText, [row.untimed() for row in rows])
    # Each batch once, though all of its rows say what it took.
    cost = {row.batch: (row.nfe, row.seconds) for row in rows}
    return {
        "sampler": config.name,
        "texts": len(rows),
        "nfe": sum(nfe for nfe, _ in cost.values()) / len(cost),
        "row_evaluations": sum(row.evaluations for row in rows) / len(rows),
        "seconds": round(sum(seconds for _, seconds in cost.values()), 3),
        "batches": len(cost),
    }
