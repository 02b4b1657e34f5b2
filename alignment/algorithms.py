"""Algorithms as records: a loss, a rule for pairs, and what the loop must provide.

Imports no torch. The trainer knows none of them by name; a new one is a record, here or under the
entry-point group ``sparring.algorithms``.
"""

from __future__ import annotations

import difflib
import importlib.metadata
from dataclasses import dataclass
from typing import TypeVar

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Algorithm:
    """What distinguishes one self-play algorithm from another."""

    name: str
    summary: str
    paper: str
    loss: str
    """``module:function`` from PairTerms and TrainConfig to a (B,) loss."""
    rule: str
    """Its own pair rule: "real-generated", or one of `PAIR_RULES`."""
    beta: float = 0.1
    """Its paper's, where training is given none."""
    mix_previous: bool = False
    """Whether iteration t also trains on iteration t-1's pairs."""
    uses_rejected: bool = True
    uses_reference: bool = True
    folds: bool = False
    """Whether a constant added to both log-ratios of a prompt leaves the loss unchanged, which
    makes folding APO's momentum into the reference exact."""
    per_response: bool = False
    """Whether the loss is a sum over single responses, each with its own win probability, which is
    what the pair rule "all" is for."""

    @property
    def needs_judge(self) -> bool:
        return self.rule != REAL_GENERATED


REAL_GENERATED = "real-generated"
"""The rule that asks no judge: a human response against the policy's own."""

PAIR_RULES = {
    "best-worst": "sparring.alignment.pairs:best_worst",
    "all": "sparring.alignment.pairs:all_responses",
    "random-pair": "sparring.alignment.pairs:random_pair",
    "shuffled": "sparring.alignment.pairs:best_worst",
}
"""Rules on judged responses by name, as ``module:function``. "shuffled" is the control: the stage
reverses half of its pairs."""

_OBJECTIVES = "sparring.alignment.objectives"

_BUILT_IN = (
    Algorithm(
        name="sppo",
        summary="self-play preference optimisation with soft win rates over K responses",
        paper="arXiv 2405.00675",
        loss=f"{_OBJECTIVES}:sppo",
        rule="best-worst",
        beta=1e-3,
        per_response=True,
    ),
    Algorithm(
        name="sppo-single",
        summary="SPPO with the win rate of the pair alone",
        paper="arXiv 2405.00675",
        loss=f"{_OBJECTIVES}:sppo_single",
        rule="best-worst",
        beta=1e-3,
    ),
    Algorithm(
        name="sppo-hard",
        summary="SPPO with win rates 1 and 0",
        paper="arXiv 2405.00675",
        loss=f"{_OBJECTIVES}:sppo_hard",
        rule="best-worst",
        beta=1e-3,
    ),
    Algorithm(
        name="spin",
        summary="self-play fine-tuning: the human response against the model's own",
        paper="arXiv 2401.01335",
        loss=f"{_OBJECTIVES}:spin",
        rule="real-generated",
        mix_previous=True,
        folds=True,
    ),
    Algorithm(
        name="dpo",
        summary="iterative DPO, the baseline",
        paper="arXiv 2305.18290",
        loss=f"{_OBJECTIVES}:dpo",
        rule="best-worst",
        folds=True,
    ),
    Algorithm(
        name="ipo",
        summary="iterative IPO, the baseline",
        paper="arXiv 2310.12036",
        loss=f"{_OBJECTIVES}:ipo",
        rule="best-worst",
        folds=True,
    ),
    Algorithm(
        name="sft",
        summary="supervised fine-tuning on the human responses, SPIN's baseline",
        paper="-",
        loss=f"{_OBJECTIVES}:sft",
        rule="real-generated",
        uses_rejected=False,
        uses_reference=False,
    ),
)


def algorithms() -> dict[str, Algorithm]:
    """All algorithms by name, plug-ins included."""
    found = {entry.name: entry for entry in _BUILT_IN}
    for entry in importlib.metadata.entry_points(group="sparring.algorithms"):
        found[entry.name] = entry.load()
    return found


def algorithm(name: str) -> Algorithm:
    """The record of a name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    return _named("algorithm", name, algorithms())


def pair_rule(name: str) -> str:
    """``module:function`` of a rule on judged responses: built in, of a plug-in under the
    entry-point group ``sparring.pair_rules``, or given as such.

    Raises:
        ValueError: there is none; names the nearest.
    """
    if ":" in name:
        return name
    group = importlib.metadata.entry_points(group="sparring.pair_rules")
    return _named("pair rule", name, PAIR_RULES | {entry.name: entry.value for entry in group})


def _named(kind: str, name: str, known: dict[str, Entry]) -> Entry:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"unknown {kind} {name!r}; {hint}")
    return known[name]
