"""Stage `reference`: the reference policy's log-probabilities of all pairs, computed once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparring.alignment.rows import Pair, ReferencedPair
from sparring.alignment.stages import ReferenceStage
from sparring.launch import shards
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, Figures


def _pairs(inputs: Mapping[str, Path]) -> list[Pair]:
    return read_rows(inputs["pairs"] / "pairs.parquet", Pair)


def run(
    config: ReferenceStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Score this rank's shards."""
    from sparring.alignment import tokens
    from sparring.alignment.logprobs import ScoredPolicy, response_logps
    from sparring.alignment.models import load_policy
    from sparring.alignment.momentum import folded_reference
    from sparring.launch.collective import device

    where = device()
    pad = tokens.eos_ids(tokens.load_tokenizer(inputs["model"]), inputs["model"])[0]
    names = ["model", *(["previous"] if config.alpha else [])]
    policies = [ScoredPolicy(load_policy(inputs[n], config.dtype).to(where)) for n in names]

    def score(chunk: Sequence[Pair]) -> list[ReferencedPair]:
        rows = [
            (pair.prompt_ids, ids) for pair in chunk for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        scored = [
            response_logps(policy, rows, pad=pad, batch=2 * config.batch, device=where)
            for policy in policies
        ]
        values = scored[0]
        if config.alpha:
            values = [
                float(folded_reference(new, old, config.alpha))
                for new, old in zip(*scored, strict=True)
            ]
        return [
            ReferencedPair(
                **dataclasses.asdict(pair),
                chosen_reference_logp=values[2 * n],
                rejected_reference_logp=values[2 * n + 1],
            )
            for n, pair in enumerate(chunk)
        ]

    shards.make(_pairs(inputs), config.chunk, ReferencedPair, score, context, unit="pairs")
    return {}


def finish(
    config: ReferenceStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``pairs.parquet``."""
    count = len(shards.chunks(_pairs(inputs), config.chunk))
    rows = shards.merge(count, ReferencedPair, context.work)
    for row in rows:
        if not math.isfinite(row.chosen_reference_logp + row.rejected_reference_logp):
            raise SparringError(
                f"the reference log-probability of pair {row.pair_id!r} is not finite; the model "
                "or its number type (model.dtype) is at fault"
            )
    write_rows(output / "pairs.parquet", ReferencedPair, rows)
    return {
        "pairs": len(rows),
        "mean_chosen_logp": sum(r.chosen_reference_logp for r in rows) / len(rows),
        "mean_rejected_logp": sum(r.rejected_reference_logp for r in rows) / len(rows),
    }
