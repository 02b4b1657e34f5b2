"""Stage `judge`: each prompt's K responses compared with each other."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sparring.alignment.config import JudgeConfig
from sparring.alignment.games import pairwise_probabilities
from sparring.alignment.health import health
from sparring.alignment.judges.build import build_ensemble, build_judge, open_cache
from sparring.alignment.judges.protocol import Judge, Metered, checked_matrix
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.response_files import read_responses
from sparring.alignment.rows import Judged, Prompt, Ranked, Response
from sparring.alignment.stages import JudgeStage
from sparring.launch import artifacts, shards
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, Figures

Group = tuple[Prompt, list[Response]]


def group_responses(prompts: Iterable[Prompt], responses: Iterable[Response]) -> list[Group]:
    """Responses by prompt, in the order in which prompts first appear among the responses.

    Raises:
        SparringError: a response without its prompt, or prompts with different k.
    """
    known = {p.prompt_id: p for p in prompts}
    groups: dict[str, list[Response]] = {}
    for response in responses:
        if response.prompt_id not in known:
            raise SparringError(
                f"there is a response to {response.prompt_id!r}, but no such prompt"
            )
        groups.setdefault(response.prompt_id, []).append(response)
    sizes = {len(rows) for rows in groups.values()}
    if len(sizes) > 1:
        odd = min(groups, key=lambda name: len(groups[name]))
        raise SparringError(
            f"prompts have different numbers of responses ({sorted(sizes)}); {odd!r} has "
            f"{len(groups[odd])}. Generate them again with one k"
        )
    return [(known[name], sorted(rows, key=lambda r: r.k)) for name, rows in groups.items()]


def _groups(config: JudgeStage, inputs: Mapping[str, Path]) -> Sequence[Group]:
    """This stage's share of the responses."""
    responses = read_responses(inputs["responses"])
    groups = group_responses(read_prompt_set(inputs["prompts"]), responses)
    return shards.portion(groups, config.chunk, config.shard)


def make_judge(config: JudgeConfig) -> Judge:
    """The judge that a recipe names, with its cache."""
    judge = (
        build_ensemble(config.members)
        if config.members
        else build_judge(config.name, config.path or None, **config.options)
    )
    if config.cache:
        open_cache(judge, config.cache)
    return judge


def cache_notes(judge: Judge) -> list[str]:
    """What a judge's caches left out while they were read."""
    inside = [member.judge for member in getattr(judge, "members", ())] or [judge]
    caches = [cache for one in inside if (cache := getattr(one, "cache", None))]
    return [note for cache in caches for note in cache.notes]


def run(config: JudgeStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Judge this rank's shards."""
    groups = _groups(config, inputs)
    judge = make_judge(config)
    notes = cache_notes(judge)
    for note in notes:
        context.emit(note=f"judge.cache: {note}")
    # A name of its own: what an interrupted process did and paid stays on record.
    ledger = context.work / f"usage-{context.world.rank}-{uuid.uuid4().hex}.json"

    def compare(chunk: Sequence[Group]) -> list[Judged]:
        prompts = [prompt for prompt, _ in chunk]
        texts = [[r.text for r in rows] for _, rows in chunk]
        logits = checked_matrix(judge, prompts, texts)
        details = judge.details(prompts, texts)
        if isinstance(judge, Metered):
            artifacts.write_json(ledger, judge.usage())
        return [
            Judged(
                prompt_id=prompt.prompt_id,
                iteration=rows[0].iteration,
                logits=tuple(tuple(map(float, line)) for line in logits[n]),
                details={name: tuple(map(float, values[n])) for name, values in details.items()},
            )
            for n, (prompt, rows) in enumerate(chunk)
        ]

    shards.make(groups, config.chunk, Judged, compare, context, unit="prompts")
    figures: Figures = {"judge": judge.identity}
    return figures | ({"cache_parts_ignored": notes} if notes else {})


def finish(
    config: JudgeStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``judged.parquet``; write ``ranked.parquet``."""
    groups = _groups(config, inputs)
    rows = shards.merge(len(shards.chunks(groups, config.chunk)), Judged, context.work)
    write_rows(output / "judged.parquet", Judged, rows)
    write_rows(output / "ranked.parquet", Ranked, _ranked(groups, rows))
    figures: Figures = {"prompts": len(rows)}
    if config.health:
        figures["health"] = health(
            rows,
            [response for _, responses in groups for response in responses],
            prompts=[prompt for prompt, _ in groups],
            second=_second(inputs, rows),
            seed=context.seed,
        )
    for name in rows[0].details:
        figures[f"mean_{name}"] = float(np.mean([row.details[name] for row in rows]))
    return figures | _usage(context.work)


def _second(inputs: Mapping[str, Path], rows: Sequence[Judged]) -> list[Judged] | None:
    """The other judge's rows of the same prompts."""
    if "second" not in inputs:
        return None
    mine = {row.prompt_id for row in rows}
    second = read_rows(inputs["second"] / "judged.parquet", Judged)
    return [row for row in second if row.prompt_id in mine]


def _ranked(groups: Iterable[Group], rows: Iterable[Judged]) -> list[Ranked]:
    ranked = []
    for (_, responses), row in zip(groups, rows, strict=True):
        wins = pairwise_probabilities(row.logits).mean(axis=1)
        for response, win in zip(responses, wins, strict=True):
            better = int((wins > win + 1e-9).sum())  # equals differ in the last bits
            ranked.append(
                Ranked(
                    prompt_id=row.prompt_id,
                    k=response.k,
                    rank=better + 1,
                    win_probability=float(win),
                    text=response.text,
                )
            )
    return ranked


def _usage(work: Path) -> dict[str, float]:
    """What all ranks counted, in all attempts: a shard that was lost was paid for too."""
    total: Counter[str] = Counter()
    for path in sorted(work.glob("usage-*.json")):
        for name, value in json.loads(path.read_text(encoding="utf-8")).items():
            total[name] += value
    return dict(total)
