"""A chat model as a judge: it is asked which of two responses is better, in both orders.

Shape legend: N prompts, K responses a prompt.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from sparring.alignment.judges.cache import Triple
from sparring.alignment.judges.chat_models import (
    Answer,
    ChatModel,
    EndpointChat,
    LocalChat,
    Refusal,
    Token,
)
from sparring.alignment.judges.pairwise import PairwiseJudge
from sparring.alignment.judges.protocol import FloatArray, PromptLike, prompt_text
from sparring.launch.errors import SparringError, UsageError

PLACES = ("{prompt}", "{first}", "{second}")

TEMPLATE = """\
Here are a request and two answers to it. Decide which answer is better: does what was asked, is \
correct, and helps the person who asked. Being longer does not make an answer better, and neither \
does being shown first.

<request>
{prompt}
</request>

<answer_A>
{first}
</answer_A>

<answer_B>
{second}
</answer_B>

Which answer is better? Say one letter and nothing else: A, B, or T if they are equally good."""

_LETTERS = {"A": "A", "B": "B", "T": "T", "TIE": "T", "C": "T"}
_BRACKETS = re.compile(r"\[\[\s*(A|B|C|T|tie)\s*\]\]", re.I)  # "C" is a tie in such templates
_ALONE = re.compile(r"\W*(A|B|T|tie)\W*", re.I)
# Only capitals from here on: "a" is an article.
_BETTER = re.compile(r"\b(A|B)\W+is\W+(?:\w+\W+)?(?:better|preferable|superior|stronger)\b")
_NAMED = re.compile(
    r"(?i:\b(?:answer|response|assistant|option|verdict|winner|choice)\b)\W*(?:is\W*)?\b(A|B|T)\b"
)
_TIE = re.compile(r"\b(?:a tie|equally good|equally bad)\b", re.I)


def read_verdict(text: str) -> str | None:
    """ "A", "B" or "T" (tie) as an answer says it; None when it says none, or contradicts itself.

    Read are, in this order: [[A]]; a line that is the letter alone, first or last; "A is better";
    "answer: A", "verdict: A" and the like; "a tie", "equally good".
    """
    found = _read(text)
    return found[0] if found else None


def _read(text: str) -> tuple[str, int] | None:
    """The verdict, and where its letter (of several the last one) stands in the text."""
    lines = [line for line in re.finditer(r"[^\n]+", text) if line[0].strip()]
    alone = [(_ALONE.fullmatch(line[0]), line.start()) for line in lines[:1] + lines[-1:]]
    tie = _TIE.search(text)
    readings = (
        [(match[1], match.start(1)) for match in _BRACKETS.finditer(text)],
        [(match[1], start + match.start(1)) for match, start in alone if match],
        [(match[1], match.start(1)) for match in _BETTER.finditer(text)],
        [(match[1], match.start(1)) for match in _NAMED.finditer(text)],
        [("T", tie.start())] if tie else [],
    )
    for found in readings:
        if found:
            letters = {_LETTERS[letter.upper()] for letter, _ in found}
            return (letters.pop(), found[-1][1]) if len(letters) == 1 else None
    return None


def _plain(token: str) -> str:
    """A token without the space and marks around its word."""
    return token.strip(" \t\r\n*_`\"'()[]{}<>.:,!▁Ġ")


def _logprob(token: Token, letter: str) -> float | None:
    """Log-probability of a letter at a token's place, however it is spaced; None: not listed."""
    listed = [value for text, value in token.top.items() if _plain(text) == letter]
    return float(np.logaddexp.reduce(listed)) if listed else None


def _verdict_tokens(tokens: Sequence[Token], spoken: str, at: int) -> list[Token]:
    """The token that is the verdict: of those that spell it the one nearest to where it was read.

    The others are names of the responses in the reasoning.
    """
    starts = itertools.accumulate((len(token.text) for token in tokens), initial=0)
    spelt = [
        (abs(start + len(token.text) / 2 - at), token)
        for token, start in zip(tokens, starts, strict=False)
        if _LETTERS.get(_plain(token.text).upper()) == spoken
    ]
    return [min(spelt, key=lambda pair: pair[0])[1]] if spelt else []


def verdict_logit(answer: Answer, spoken_logit: float, clip: float) -> float | None:
    """Logit that the first response is better.

    With log-probabilities: log p(A) − log p(B) at the token that is the verdict, or at the first
    token when the text says none and both letters are listed there. A letter that is not listed
    counts as the least likely one that is, which is the most it can have. Otherwise ±spoken_logit,
    or 0 for a tie.

    Args:
        answer: what the model said.
        spoken_logit: logit of a verdict without log-probabilities, > 0.
        clip: largest magnitude.

    Returns:
        The logit, or None when there is no verdict.
    """
    read = _read(answer.text)
    spoken = read[0] if read else None
    place = _verdict_tokens(answer.tokens, *read) if read else list(answer.tokens[:1])
    if place and place[0].top:
        first, second = (_logprob(place[0], letter) for letter in "AB")
        listed = [value for value in (first, second) if value is not None]
        if listed and (spoken or len(listed) == 2):
            least = min(place[0].top.values())
            gap = (least if first is None else first) - (least if second is None else second)
            if not math.isnan(gap):
                return min(max(gap, -clip), clip)
    if spoken is None:
        return None
    return {"A": spoken_logit, "B": -spoken_logit, "T": 0.0}[spoken]


class LLMJudge(PairwiseJudge):
    """A chat model's verdicts as logits.

    L_ij is what it says when response i is shown as A and j as B. Both orders are asked and kept;
    averaging them is the pairing stage's convention. Equal texts tie without being asked about.
    A pair without a verdict after the retries has the logit 0 and is counted as `unparsed`; above
    `max_failures` of them the judge gives up.
    """

    name = "llm"

    def __init__(
        self,
        model: ChatModel,
        template: str = TEMPLATE,
        verdict_logit: float = 2.0,
        clip: float = 10.0,
        max_failures: float = 0.02,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ) -> None:
        """Judge with a chat model; most callers want `build`.

        Args:
            model: who is asked.
            template: the question, with {prompt}, {first} and {second}.
            verdict_logit: logit of a verdict without log-probabilities; 2: P = .88.
            clip: largest magnitude of a logit.
            max_failures: share of questions without a verdict that is borne, in [0, 1].
            price_in, price_out: of a million tokens read and written, in any currency.

        Raises:
            UsageError: the template lacks a place, or a number is out of range.
        """
        super().__init__()
        missing = [place for place in PLACES if place not in template]
        if missing:
            raise UsageError(f"judge option template has no {', '.join(missing)}")
        if not 0 < verdict_logit <= clip < math.inf:
            raise UsageError(
                f"judge options: 0 < verdict_logit <= clip, not {verdict_logit} and {clip}"
            )
        if getattr(model, "max_tokens", 1) < 1:
            raise UsageError("judge option max_tokens must be at least 1")
        if not 0 <= max_failures <= 1:
            raise UsageError(f"judge option max_failures is a share, not {max_failures}")
        self.model, self.template = model, template
        self.verdict_logit, self.clip = float(verdict_logit), float(clip)
        self.max_failures = max_failures
        self.price_in, self.price_out = price_in, price_out
        self.counts.update(dict.fromkeys(("questions", "unparsed", "without_logprobs"), 0))

    @classmethod
    def build(
        cls,
        path: str,
        base_url: str = "",
        api_key_env: str = "",
        template: str = TEMPLATE,
        logprobs: bool = True,
        max_tokens: int = 16,
        verdict_logit: float = 2.0,
        clip: float = 10.0,
        max_failures: float = 0.02,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        dtype: str = "auto",
        max_length: int = 0,
        memory: float = 0.0,
    ) -> LLMJudge:
        """The judge that a recipe describes.

        Args:
            path: the model's name at the endpoint; without base_url, a folder, hub id or "smollm2"
                for vLLM in this process.
            base_url, api_key_env, logprobs, concurrency, timeout, retries, backoff: as
                `EndpointChat`.
            max_tokens: longest answer.
            dtype, max_length, memory: as `LocalChat`.
            template, verdict_logit, clip, max_failures, price_in, price_out: as the class.

        Raises:
            UsageError: a value is out of range, or the key is not in the environment.
            SparringError: a package or the model is missing.
        """
        model: ChatModel
        if base_url:
            model = EndpointChat(
                path,
                base_url,
                api_key_env=api_key_env,
                max_tokens=max_tokens,
                logprobs=logprobs,
                concurrency=concurrency,
                timeout=timeout,
                retries=retries,
                backoff=backoff,
            )
        else:
            model = LocalChat(
                path, max_tokens=max_tokens, max_length=max_length, dtype=dtype, memory=memory
            )
        return cls(model, template, verdict_logit, clip, max_failures, price_in, price_out)

    @cached_property
    def identity(self) -> str:
        """The model as far as it is known, the question, and how answers become logits."""
        settings = (self.verdict_logit, self.clip, getattr(self.model, "logprobs", True))
        question = hashlib.sha256(self.template.encode()).hexdigest()[:16]
        return (
            f"llm/1 {self.model.identity} template={question} "
            f"max_tokens={getattr(self.model, 'max_tokens', None)} settings={settings}"
        )

    def question(self, triple: Triple) -> str:
        """The template with its places filled; what the texts contain is not read as a place."""
        texts = dict(zip(PLACES, triple, strict=True))
        return re.sub("|".join(map(re.escape, PLACES)), lambda m: texts[m[0]], self.template)

    def compare(self, triples: Sequence[Triple]) -> Iterator[tuple[Triple, float | None]]:
        """One-order logits; None where there is no verdict.

        Raises:
            SparringError: more than `max_failures` of the questions have no verdict, or the model
                cannot be asked.
        """
        different = [triple for triple in triples if triple[1] != triple[2]]
        yield from ((triple, 0.0) for triple in triples if triple[1] == triple[2])
        self.counts["questions"] += len(different)
        reasons: list[str] = []
        answers = self.model.ask([self.question(t) for t in different], self._readable)
        for number, answer in answers:
            value = None if isinstance(answer, Refusal) else self._logit(answer)
            if isinstance(answer, Answer) and not answer.tokens:
                self.counts["without_logprobs"] += 1
            if isinstance(answer, Refusal):
                self.counts["unparsed"] += 1
                reasons.append(answer.reason)
                self._check_failures(reasons)
            yield different[number], value

    def _logit(self, answer: Answer) -> float | None:
        return verdict_logit(answer, self.verdict_logit, self.clip)

    def _readable(self, answer: Answer) -> bool:
        return self._logit(answer) is not None

    def _check_failures(self, reasons: Sequence[str]) -> None:
        failed, asked = self.counts["unparsed"], self.counts["questions"]
        if failed > self.max_failures * asked:
            examples = "; ".join(dict.fromkeys(reasons[:3]))
            raise SparringError(
                f"the judge llm got no verdict on {failed} of {asked} questions, more than "
                f"max_failures = {self.max_failures:g} of them: {examples}. Look at the model, at "
                f"max_tokens (now {getattr(self.model, 'max_tokens', None)}) and at the template; "
                f"verdicts so far are kept in judge.cache when there is one"
            )

    def usage(self) -> dict[str, float]:
        """Pairs as every pairwise judge, questions, requests (retries too), tokens, price, and what
        had no verdict (unparsed) or no log-probabilities."""
        counts = {**super().usage(), **{k: float(v) for k, v in self.model.counts.items()}}
        price = counts["input_tokens"] * self.price_in + counts["output_tokens"] * self.price_out
        return {**counts, "price": price / 1e6}

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) empty: 1 where a response is blank; unparsed: share of a response's 2(K − 1)
        comparisons that have no verdict and count as ties."""
        figures = super().details(prompts, responses)
        unparsed_NK = np.zeros_like(figures["empty"])
        for n, (prompt, given) in enumerate(zip(prompts, responses, strict=True)):
            text = prompt_text(prompt)
            for i, one in enumerate(given):
                others = [other for j, other in enumerate(given) if j != i]
                pairs = [p for o in others for p in ((text, one, o), (text, o, one))]
                failed = sum(pair in self.undecided for pair in pairs)
                unparsed_NK[n, i] = failed / max(len(pairs), 1)
        return {**figures, "unparsed": unparsed_NK}
