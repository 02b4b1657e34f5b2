"""Policies' responses to the same held-out prompts, lined up and judged against each other.

Shape legend: N rows (a prompt and response number), M policies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparring.alignment.judges.protocol import FloatArray, Judge, checked_matrix
from sparring.alignment.judging import Group, group_responses
from sparring.alignment.response_files import read_responses
from sparring.alignment.rows import Prompt
from sparring.launch.artifacts import content_digest
from sparring.launch.errors import SparringError
from sparring.launch.stages import many

# Labels of the matrix that no folder's name may take.
_ROLES = ("base", "previous", "current")
_FILES = (".jsonl", ".json", ".ndjson", ".parquet")


@dataclass(frozen=True)
class Players:
    """The policies that meet, each once, however many inputs name it."""

    names: tuple[str, ...]
    """(M,) labels; the last is "current"."""
    samples: tuple[list[Group], ...]
    """(M,) responses, prompts in the order of the last one's."""
    opponents: Mapping[str, int]
    """What a win rate is called ("base", "previous", "vs_B") to the opponent's place."""


def read_samples(source: Path, prompts: Sequence[Prompt]) -> list[Group]:
    """A policy's responses by prompt."""
    return group_responses(prompts, read_responses(source))


def policy_names(sources: Sequence[Path]) -> list[str]:
    """Names for policies from the folders or files of their responses, all different.

    The last part of the path without the suffix of a file of rows, or the one before it where the
    folder is called after the stage ("generate"); with as many parents in front as it takes to tell
    all of them apart, and from base, previous and current.
    """
    parts = []
    for source in sources:
        plain = source.with_suffix("") if source.suffix in _FILES else source
        whole = plain.absolute().parts[1:]
        parts.append(whole[:-1] if whole[-1:] == ("generate",) and whole[1:] else whole)
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len({*names, *_ROLES}) == len(names) + len(_ROLES):
            return names
    return [str(source.absolute()) for source in sources]


def lined_up(current: Sequence[Group], other: Sequence[Group], name: str) -> list[Group]:
    """The other policy's groups in the order of the current one's.

    Raises:
        SparringError: they answer other prompts, or another number of times.
    """
    by_prompt = {prompt.prompt_id: (prompt, rows) for prompt, rows in other}
    wanted = [prompt.prompt_id for prompt, _ in current]
    lacking = [key for key in wanted if key not in by_prompt]
    extra = sorted(set(by_prompt) - set(wanted))
    if lacking or extra:
        differences = [
            f"{len(keys)} only in {where} (such as {keys[0]!r})"
            for keys, where in ((lacking, "current"), (extra, name))
            if keys
        ]
        raise SparringError(
            f"responses of {name} answer {len(by_prompt)} prompts, those of current {len(wanted)}: "
            f"{' and '.join(differences)}. Sample all policies on the same prompts"
        )
    ours, theirs = (len(groups[0][1]) for groups in (current, other))
    if ours != theirs:
        raise SparringError(
            f"{name} has {theirs} responses a prompt, current has {ours}; sample them with one k"
        )
    return [by_prompt[key] for key in wanted]


def read_players(
    inputs: Mapping[str, Path], prompts: Sequence[Prompt], current: Sequence[Group]
) -> Players:
    """`base`, `against*`, `previous` and `current` of a stage's inputs, in this order.

    Samples with the same bytes are one policy, so that nothing is judged twice.

    Raises:
        SparringError: as `lined_up`, and what reading the rows raises.
    """
    given = [("base", "base", inputs["base"])] if "base" in inputs else []
    against = list(dict.fromkeys(path.absolute() for path in many("against", inputs)))
    given += [
        (name, f"vs_{name}", path)
        for name, path in zip(policy_names(against), against, strict=True)
    ]
    if "previous" in inputs:
        given.append(("previous", "previous", inputs["previous"]))
    places: dict[str, int] = {}
    names: list[str] = []
    samples: list[list[Group]] = []
    opponents: dict[str, int] = {}
    own = content_digest(inputs["current"])
    for name, title, path in given:
        digest = content_digest(path)
        if digest not in places and digest != own:
            places[digest] = len(names)
            names.append(name)
            samples.append(lined_up(current, read_samples(path, prompts), name))
        opponents[title] = places.get(digest, -1)
    last = len(names)
    found = {title: last if place < 0 else place for title, place in opponents.items()}
    return Players((*names, "current"), (*samples, list(current)), found)


def play(
    judge: Judge, players: Players, *, chunk: int, report: Callable[[int, int], None]
) -> FloatArray:
    """Judge all policies' k-th responses to a prompt against each other, for all prompts and k.

    One call a chunk, so a judge of pairs is asked for M(M − 1) ordered pairs a row and no more.

    Args:
        judge: who compares.
        players: at least two policies.
        chunk: rows a call, which bounds memory.
        report: called with the number of rows done and of all.

    Returns:
        (N, M, M) float32 logits; rows in the order of prompts, then k.
    """
    prompts = [prompt for prompt, rows in players.samples[-1] for _ in rows]
    texts = [
        [response.text for response in responses]
        for groups in zip(*players.samples, strict=True)
        for responses in zip(*(rows for _, rows in groups), strict=True)
    ]
    found = []
    for start in range(0, len(texts), chunk):
        end = start + chunk
        found.append(checked_matrix(judge, prompts[start:end], texts[start:end]))
        report(min(end, len(texts)), len(texts))
    return np.concatenate(found)
