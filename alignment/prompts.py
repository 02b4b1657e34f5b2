"""Built-in prompts, and how prompts are split. Imports no torch.

Every choice is drawn from a hash of (seed, what it is for), so the same seed gives the same
prompts on every machine, and adding a source leaves the others' draws alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sparring.alignment.base_questions import CHITCHAT_FILE, base_questions
from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.packaged import packaged

Item = TypeVar("Item")

_FORBIDDEN = ("also", "can", "important", "like", "many", "people", "help", "one", "make", "time")
_COUNTS_ITSELF = re.compile(r"\b(?:two|three|four|five|ten|top|list|\d+)\b", re.I)

# Kinds with headroom both ways at 112 tokens: IFEval id, then the parameters to draw from.
# SmolLM2-135M-Instruct at T = 1 passed, of 24 one-sample prompts each: words 16, sentences 14,
# title 17, highlights 5, bullets 5, placeholders 13, postscript 7, comma 2, forbidden 18.
KINDS: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]] = {
    "words": (
        "length_constraints:number_words",
        [
            *({"num_words": n, "relation": "less than"} for n in (40, 50, 60)),
            *({"num_words": n, "relation": "at least"} for n in (50, 60, 70)),
        ],
    ),
    "sentences": (
        "length_constraints:number_sentences",
        [
            *({"num_sentences": n, "relation": "less than"} for n in (3, 4)),
            *({"num_sentences": n, "relation": "at least"} for n in (4, 5)),
        ],
    ),
    "title": ("detectable_format:title", [{}]),
    "highlights": (
        "detectable_format:number_highlighted_sections",
        [{"num_highlights": n} for n in (1, 2, 3)],
    ),
    "bullets": (
        "detectable_format:number_bullet_lists",
        [{"num_bullets": n} for n in (2, 3, 4)],
    ),
    "placeholders": (
        "detectable_content:number_placeholders",
        [{"num_placeholders": n} for n in (1, 2)],
    ),
    "postscript": (
        "detectable_content:postscript",
        [{"postscript_marker": marker} for marker in ("P.S.", "P.P.S")],
    ),
    "comma": ("punctuation:no_comma", [{}]),
    "forbidden": ("keywords:forbidden_words", []),
}


def _draw(seed: int, *purpose: object) -> int:
    """A number that depends on nothing but the arguments."""
    text = json.dumps([seed, *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _shuffled(items: Iterable[Item], seed: int, purpose: str, key: Any = str) -> list[Item]:
    return sorted(items, key=lambda item: _draw(seed, purpose, key(item)))


# ---------------------------------------------------------------- constraints on base questions


def _parameters(kind: str, seed: int, question_id: str) -> dict[str, Any]:
    values = KINDS[kind][1]
    if kind == "forbidden":
        return {"forbidden_words": sorted(_shuffled(_FORBIDDEN, seed, question_id)[:3])}
    return dict(values[_draw(seed, kind, question_id) % len(values)])


def _kinds_for(question_id: str, question: str, per_question: int, seed: int) -> list[str]:
    # "List five ..." and "exactly 3 bullet points" cannot both be met.
    kinds = [k for k in KINDS if not (k == "bullets" and _COUNTS_ITSELF.search(question))]
    return _shuffled(kinds, seed, f"kinds {question_id}")[:per_question]


def constraint_prompts(seed: int, per_question: int = 6) -> list[Prompt]:
    """Base questions, each with one verifiable constraint of several kinds.

    Args:
        seed: chooses kinds and parameters.
        per_question: kinds a base question, 1 to 9.

    Returns:
        Prompts with ids such as "mt081-title", grouped by base question.

    Raises:
        UsageError: per_question is out of range.
        SparringError: a data package or the checkers are missing.
    """
    from sparring.alignment.judges.verifier import describe

    if not 1 <= per_question <= len(KINDS):
        raise UsageError(f"per_question={per_question} must be between 1 and {len(KINDS)}")
    prompts = []
    for question_id, question in base_questions():
        for kind in _kinds_for(question_id, question, per_question, seed):
            instruction_id, kwargs = KINDS[kind][0], _parameters(kind, seed, question_id)
            text = f"{question} {describe(instruction_id, kwargs)}"
            prompts.append(
                Prompt(
                    prompt_id=f"{question_id}-{kind}",
                    messages=(Message("user", text),),
                    group=question_id,
                    verifier=json.dumps({"id": instruction_id, "kwargs": kwargs}, sort_keys=True),
                )
            )
    return prompts


# ---------------------------------------------------------------- human conversations

_PRIVATE = re.compile(r"https?:|www\.|@\w|\w@|\d{6,}|\+\d{2}|#\w+\d")
_NOT_PROSE = re.compile(r"(.)\1{5,}|[<>{}\\|`]")


def _turns(conversation: Mapping[str, Any]) -> list[str]:
    """What the two people said, consecutive messages of one person joined."""
    turns: list[tuple[str, str]] = []
    for block in conversation["messages"]:
        for message in block:
            sender, text = message["sender"], " ".join(message["text"].split())
            if turns and turns[-1][0] == sender:
                turns[-1] = (sender, f"{turns[-1][1]} {text}".strip())
            else:
                turns.append((sender, text))
    return [text for _, text in turns]


def _plain(text: str, shortest: int, longest: int) -> bool:
    ascii_share = sum(c.isascii() for c in text) / max(len(text), 1)
    return (
        shortest <= len(text) <= longest
        and ascii_share >= 0.97
        and _PRIVATE.search(text) is None
        and _NOT_PROSE.search(text) is None
    )


def chitchat_prompts(seed: int, turns: int = 3) -> list[Prompt]:
    """Turns of human conversations, with the human's next turn as the real response.

    Windows of a conversation do not overlap, so no real response is part of another prompt.

    Args:
        seed: chooses where in a conversation the windows start, and the order of the rows.
        turns: turns of a prompt, odd: it starts and ends with the user.

    Returns:
        Prompts with `real`, grouped by conversation.

    Raises:
        UsageError: turns is even or below 1.
        SparringError: chitchat-dataset is missing.
    """
    if turns < 1 or turns % 2 == 0:
        raise UsageError(f"turns={turns} must be odd, so that prompts start and end with the user")
    path = packaged("chitchat_dataset", CHITCHAT_FILE, "chitchat-dataset")
    conversations = json.loads(path.read_text(encoding="utf-8"))
    prompts = []
    seen: set[tuple[Message, ...]] = set()
    for name in sorted(conversations):
        texts = _turns(conversations[name])
        first = _draw(seed, "start", name) % (turns + 1)
        for start in range(first, len(texts) - turns, turns + 1):
            window, real = texts[start : start + turns], texts[start + turns]
            # Greetings and one-word turns say nothing that could be answered or learnt from.
            if not (_plain(real, 20, 320) and _plain(window[-1], 15, 320)):
                continue
            if not all(_plain(text, 2, 320) for text in window):
                continue
            roles = ("user", "assistant")
            messages = tuple(Message(roles[i % 2], text) for i, text in enumerate(window))
            if messages not in seen:
                seen.add(messages)
                prompts.append(Prompt(f"chat-{name[:13]}-{start:03d}", messages, name, real))
    return _shuffled(prompts, seed, "chitchat", key=lambda p: p.prompt_id)


# ---------------------------------------------------------------- split


def split(
    prompts: Sequence[Prompt], heldout: int, train: int, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Disjoint training and held-out prompts, with no group on both sides.

    Groups are shared out in the proportion heldout : train, and each side takes one prompt a
    group in turn, so that both sides see as many groups as they can.

    Args:
        prompts: with distinct ids.
        heldout: held-out prompts wanted, at least 0.
        train: training prompts wanted, at least 0.
        seed: chooses groups and prompts; the order of `prompts` does not matter.

    Returns:
        (training prompts, held-out prompts), exactly as many as asked for.

    Raises:
        UsageError: a count is negative.
        SparringError: there are too few prompts or groups.
    """
    if heldout < 0 or train < 0:
        raise UsageError(f"cannot take heldout={heldout} and train={train} prompts")
    groups: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in _shuffled(prompts, seed, "split", key=lambda p: p.prompt_id):
        groups[prompt.group].append(prompt)
    order = _shuffled(groups, seed, "group")
    share = heldout * len(prompts) / max(heldout + train, 1)
    # A fair share first; where groups are coarse, as few as will do.
    for wanted in (max(share, heldout), heldout):
        held, rest = _fill(groups, order, wanted)
        counts = [sum(len(groups[name]) for name in side) for side in (held, rest)]
        if counts[0] >= heldout and counts[1] >= train:
            kept = [groups[name] for name in rest]
            return _in_turn(kept, train), _in_turn([groups[n] for n in held], heldout)
    raise SparringError(
        f"{heldout} held-out and {train} training prompts were asked for; there are "
        f"{len(prompts)} prompts in {len(groups)} groups, and a group stays on one side"
    )


def _fill(
    groups: Mapping[str, Sequence[Prompt]], order: Sequence[str], wanted: float
) -> tuple[list[str], list[str]]:
    """The first groups of the order that hold at least `wanted` prompts, and the others."""
    held, count = 0, 0
    while held < len(order) and count < wanted:
        count += len(groups[order[held]])
        held += 1
    return list(order[:held]), list(order[held:])


def _in_turn(groups: Sequence[Sequence[Prompt]], count: int) -> list[Prompt]:
    """One prompt of each group, then a second of each, until there are `count`."""
    rounds = max((len(group) for group in groups), default=0)
    taken = [group[r] for r in range(rounds) for group in groups if r < len(group)]
    return taken[:count]
