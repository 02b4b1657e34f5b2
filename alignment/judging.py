"""Stage `judge`: each prompt's K responses compared with each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sparring.alignment.config import JudgeConfig
from sparring.alignment.judges.build import build_judge
from sparring.alignment.judges.protocol import Judge, checked_matrix
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.rows import Judged, Prompt, Response
from sparring.launch import shards
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


def _groups(inputs: Mapping[str, Path]) -> list[Group]:
    responses = read_rows(inputs["responses"] / "responses.parquet", Response)
    return group_responses(read_prompt_set(inputs["prompts"]), responses)


def make_judge(config: JudgeConfig) -> Judge:
    """The judge that a recipe names."""
    return build_judge(config.name, config.path or None, **config.options)


def run(config: JudgeConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Judge this rank's shards."""
    groups = _groups(inputs)
    judge = make_judge(config)

    def compare(chunk: Sequence[Group]) -> list[Judged]:
        prompts = [prompt for prompt, _ in chunk]
        texts = [[r.text for r in rows] for _, rows in chunk]
        logits = checked_matrix(judge, prompts, texts)
        details = judge.details(prompts, texts)
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
    return {"judge": judge.identity}


def finish(
    config: JudgeConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Merge the shards into ``judged.parquet``."""
    count = len(shards.chunks(_groups(inputs), config.chunk))
    rows = shards.merge(count, Judged, context.work)
    write_rows(output / "judged.parquet", Judged, rows)
    figures: Figures = {"prompts": len(rows)}
    for name in rows[0].details:
        figures[f"mean_{name}"] = float(np.mean([row.details[name] for row in rows]))
    return figures
