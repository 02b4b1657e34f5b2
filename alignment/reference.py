"""Stage `reference`: the reference policy's log-probabilities of all pairs, computed once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from sparring.alignment.rows import Pair, ReferencedPair
from sparring.alignment.stages import ReferenceStage
from sparring.launch import shards
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, Figures


def _pairs(inputs: Mapping[str, Path]) -> list[Pair]:
    return read_rows(inputs["pairs"] / "pairs.parquet", Pair)


def run(
    config: ReferenceStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Score this rank's shards."""
    import torch

    from sparring.alignment import tokens
    from sparring.alignment.logprobs import response_logps, scored_policy
    from sparring.alignment.momentum import folded_reference
    from sparring.launch.collective import device

    if config.alpha and "previous" not in inputs:
        raise UsageError(
            "alpha folds momentum into the reference; it needs --previous, the solution before"
        )
    world = context.world.sharing(config.devices)
    if world is None:
        return {}
    where = device()
    pad = tokens.eos_ids(tokens.load_tokenizer(inputs["model"]), inputs["model"])[0]
    names = ["model", *(["previous"] if config.alpha else [])]
    policies = [scored_policy(inputs[name], config) for name in names]
    pairs = _pairs(inputs)
    for policy in policies:
        policy.verify([*pairs[0].prompt_ids, *pairs[0].chosen_ids])

    def score(chunk: Sequence[Pair]) -> list[ReferencedPair]:
        rows = [
            (pair.prompt_ids, ids) for pair in chunk for ids in (pair.chosen_ids, pair.rejected_ids)
        ]
        values, *others = (
            torch.tensor(
                response_logps(policy, rows, pad=pad, batch=2 * config.batch, device=where),
                dtype=torch.float64,
            )
            for policy in policies
        )
        for before in others:
            values = folded_reference(values, before, config.alpha)
        return [
            ReferencedPair(
                **dataclasses.asdict(pair),
                chosen_reference_logp=float(values[2 * n]),
                rejected_reference_logp=float(values[2 * n + 1]),
            )
            for n, pair in enumerate(chunk)
        ]

    ours = dataclasses.replace(context, world=world)
    shards.make(pairs, config.chunk, ReferencedPair, score, ours, unit="pairs")
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
                "or its number type (train.precision) is at fault"
            )
    write_rows(output / "pairs.parquet", ReferencedPair, rows)
    return {
        "pairs": len(rows),
        "mean_chosen_logp": sum(r.chosen_reference_logp for r in rows) / len(rows),
        "mean_rejected_logp": sum(r.rejected_reference_logp for r in rows) / len(rows),
    }
