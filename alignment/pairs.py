"""Pair rules: which responses to a prompt the losses compare.

A rule on judged responses is one function ``(judged, responses, *, convention, min_margin, rng)``,
named in `algorithms.PAIR_RULES` or by a plug-in. It gives a `Pair`, the reason why there is none,
or a list of these, so that a stage can count the reasons and nothing disappears unreported.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import torch

from sparring.alignment.preferences import pair_probabilities
from sparring.alignment.rows import Judged, Pair, Prompt, Response
from sparring.launch.errors import SparringError

# Row means of the same terms in another order differ in the last bits; they must not decide a tie.
_TIE = 1e-9


class Dropped(StrEnum):
    """Why a prompt gives no pair."""

    SAME_TEXT = "same_text"
    """All responses are one text: nothing to prefer."""
    NO_PREFERENCE = "no_preference"
    """All win probabilities are equal."""
    SMALL_MARGIN = "small_margin"
    """Best and worst are not more than the wanted margin apart."""
    EMPTY = "empty"
    """The chosen or the rejected response has no token at all, not even one that ends it, or the
    human one is blank."""
    SAME_IDS = "same_ids"
    """Chosen and rejected are the same tokens: their gradients cancel in the pairwise losses."""


def _by_number(judged: Judged, responses: Sequence[Response]) -> list[Response]:
    """The responses in the order of the judge's rows."""
    strangers = {r.prompt_id for r in responses} - {judged.prompt_id}
    if strangers:
        raise SparringError(
            f"prompt {judged.prompt_id}: given responses to {', '.join(sorted(strangers))}"
        )
    ordered = sorted(responses, key=lambda r: r.k)
    numbers = [r.k for r in ordered]
    if numbers != list(range(len(judged.logits))):
        raise SparringError(
            f"prompt {judged.prompt_id}: {len(judged.logits)} responses were judged, so k must run "
            f"from 0 to {len(judged.logits) - 1}; got {numbers}. Judge these responses again"
        )
    return ordered


def _probabilities(judged: Judged, convention: str) -> tuple[list[float], list[list[float]]]:
    """P̂ of each response, and P of each beating each."""
    try:
        logits_BKK = torch.tensor([judged.logits], dtype=torch.float64)
        pair_KK = pair_probabilities(logits_BKK, convention)[0]
    except ValueError as error:
        raise SparringError(f"prompt {judged.prompt_id}: {error}") from error
    return pair_KK.mean(dim=1).tolist(), pair_KK.tolist()


def _tokens_problem(chosen_ids: Sequence[int], rejected_ids: Sequence[int]) -> Dropped | None:
    if not chosen_ids or not rejected_ids:
        return Dropped.EMPTY
    return Dropped.SAME_IDS if tuple(chosen_ids) == tuple(rejected_ids) else None


def _pair(
    judged: Judged,
    ordered: Sequence[Response],
    chosen: int,
    rejected: int,
    *,
    wins: Sequence[float],
    pair_win: Sequence[Sequence[float]],
    suffix: str = "",
) -> Pair:
    return Pair(
        pair_id=f"{judged.prompt_id}/{judged.iteration}{suffix}",
        prompt_id=judged.prompt_id,
        iteration=judged.iteration,
        prompt_ids=ordered[chosen].prompt_ids,
        chosen_ids=ordered[chosen].response_ids,
        rejected_ids=ordered[rejected].response_ids,
        chosen_win=wins[chosen],
        rejected_win=wins[rejected],
        pair_win=pair_win[chosen][rejected],
    )


def _margin_problem(margin: float, min_margin: float) -> Dropped | None:
    if not 0 <= min_margin < 1:
        raise ValueError(f"min_margin must be in [0, 1), got {min_margin}")
    if margin <= _TIE:
        return Dropped.NO_PREFERENCE
    return Dropped.SMALL_MARGIN if margin <= min_margin else None


def best_worst(
    judged: Judged,
    responses: Sequence[Response],
    *,
    convention: str,
    min_margin: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Pair | Dropped:
    """SPPO's rule: the response with the highest P̂ against the one with the lowest.

    Both win probabilities are over the K samples and include the self term (arXiv 2405.00675). Of
    equals the lowest k is taken.

    Args:
        judged: the (K, K) judge logits of one prompt.
        responses: its K responses, in any order; k numbers the judge's rows.
        convention: how logits become probabilities, a key of `preferences.CONVENTIONS`.
        min_margin: P̂_chosen − P̂_rejected must be greater than this, in [0, 1).
        rng: what every rule is given; nothing is drawn here.

    Returns:
        The pair, or why there is none.

    Raises:
        ValueError: `min_margin` is out of range.
        SparringError: the responses are not the judged ones, the logits are not finite or not
            square, or the convention is unknown.
    """
    ordered = _by_number(judged, responses)
    wins, pair_win = _probabilities(judged, convention)
    highest, lowest = max(wins), min(wins)
    too_close = _margin_problem(highest - lowest, min_margin)
    if len({r.text for r in ordered}) == 1:
        return Dropped.SAME_TEXT
    if too_close:
        return too_close
    best = next(k for k, win in enumerate(wins) if win >= highest - _TIE)
    worst = next(k for k, win in enumerate(wins) if win <= lowest + _TIE)
    problem = _tokens_problem(ordered[best].response_ids, ordered[worst].response_ids)
    return problem or _pair(judged, ordered, best, worst, wins=wins, pair_win=pair_win)


def random_pair(
    judged: Judged,
    responses: Sequence[Response],
    *,
    convention: str,
    rng: np.random.Generator,
    min_margin: float = 0.0,
) -> Pair | Dropped:
    """Two of the K responses at random; the one with the higher P̂ is chosen.

    The customary pair of online DPO: its margin is that of typical samples, not of extremes. The
    win probabilities are over all K, as in `best_worst`.

    Args:
        rng: draws the two, once a call.

    Other arguments, returns and raises are those of `best_worst`.
    """
    ordered = _by_number(judged, responses)
    wins, pair_win = _probabilities(judged, convention)
    if len(ordered) < 2:
        return Dropped.SAME_TEXT
    one, other = (int(k) for k in sorted(rng.choice(len(ordered), size=2, replace=False)))
    too_close = _margin_problem(abs(wins[one] - wins[other]), min_margin)
    if ordered[one].text == ordered[other].text:
        return Dropped.SAME_TEXT
    if too_close:
        return too_close
    best, worst = (one, other) if wins[one] > wins[other] else (other, one)
    problem = _tokens_problem(ordered[best].response_ids, ordered[worst].response_ids)
    return problem or _pair(judged, ordered, best, worst, wins=wins, pair_win=pair_win)


def all_responses(
    judged: Judged,
    responses: Sequence[Response],
    *,
    convention: str,
    min_margin: float = 0.0,
    rng: np.random.Generator | None = None,
) -> list[Pair | Dropped]:
    """Every response with its own P̂, for losses that are a sum over single responses (SPPO's).

    SPPO's paper allows training on all K instead of two of them (arXiv 2405.00675). A
    pair's loss is the mean of its two terms, so the mean over pairs is the mean over responses when
    each response is in equally many pairs: ranked by P̂, first with last, second with last but one
    where K is even; a ring of neighbours where K is odd, in which each is twice, at twice the work.

    Ties stay, since a response that wins half the time has a target too: log-ratio 0. Responses
    without a token are left out, one `Dropped.EMPTY` each.

    Args:
        min_margin: the prompt is dropped when its best and worst are no more than this apart.

    Other arguments, returns and raises are those of `best_worst`.
    """
    ordered = _by_number(judged, responses)
    wins, pair_win = _probabilities(judged, convention)
    too_close = _margin_problem(max(wins) - min(wins), min_margin)
    if len({r.text for r in ordered}) == 1:
        return [Dropped.SAME_TEXT]
    if too_close:
        return [too_close]
    full = [k for k, response in enumerate(ordered) if response.response_ids]
    rank = sorted(full, key=lambda k: (-wins[k], k))
    count = len(rank)
    places = (
        [(i, count - 1 - i) for i in range(count // 2)]
        if count % 2 == 0
        else [tuple(sorted((i, (i + 1) % count))) for i in range(count)]
    )
    made: list[Pair | Dropped] = [Dropped.EMPTY] * (len(ordered) - count)
    for high, low in places if count > 1 else []:
        best, worst = rank[high], rank[low]
        suffix = f"/{best}-{worst}"
        made.append(
            _pair(judged, ordered, best, worst, wins=wins, pair_win=pair_win, suffix=suffix)
        )
    return made


def reverse_half(pairs: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    """The negative control: the verdict on exactly half of the pairs, drawn at random, is reversed.

    Rows, lengths and the sizes of targets are those of the real run; only the information is gone,
    so training on these pairs must not raise the win rate.

    - Half, and not a coin for each: of one run's 69 coins 44 were with the judge, a net verdict of
      19 pairs, and that run improved (docs/alignment/baselines.md).
    - A reversed verdict makes P̂ into 1 − P̂. To swap the responses under the old numbers would not
      do: best and worst of K are not typical samples, and where P̂_best + P̂_worst ≠ 1, as with a
      trait that few responses have, SPPO would raise both and the trait with them.

    Args:
        pairs: of one iteration; of an odd number one more stays than is reversed.
        rng: draws which.

    Returns:
        As many pairs, in the same order.
    """
    reversed_places = set(rng.permutation(len(pairs))[: len(pairs) // 2].tolist())
    return [_reversed(pair) if n in reversed_places else pair for n, pair in enumerate(pairs)]


def _reversed(pair: Pair) -> Pair:
    """The pair under a judge of the opposite opinion."""
    return dataclasses.replace(
        pair,
        chosen_ids=pair.rejected_ids,
        rejected_ids=pair.chosen_ids,
        chosen_win=1 - pair.rejected_win,
        rejected_win=1 - pair.chosen_win,
    )


def real_generated(prompt: Prompt, response: Response, real_ids: Sequence[int]) -> Pair | Dropped:
    """SPIN's rule: the real response is chosen, the policy's own sample is rejected.

    No judge is asked (arXiv 2401.01335, algorithm 1): the win probabilities are 1, 0 and 1.

    Args:
        prompt: the prompt both answer.
        response: the policy's sample.
        real_ids: tokens of the real response, under the sample's template and ending.

    Returns:
        The pair, or why there is none.

    Raises:
        SparringError: the response belongs to another prompt.
    """
    if response.prompt_id != prompt.prompt_id:
        raise SparringError(f"prompt {prompt.prompt_id}: given a response to {response.prompt_id}")
    if prompt.real is not None and not prompt.real.strip():
        return Dropped.EMPTY  # the policy would learn to say nothing
    problem = _tokens_problem(real_ids, response.response_ids)
    if problem:
        return problem
    return Pair(
        pair_id=f"{prompt.prompt_id}/{response.iteration}/{response.k}",
        prompt_id=prompt.prompt_id,
        iteration=response.iteration,
        prompt_ids=response.prompt_ids,
        chosen_ids=tuple(real_ids),
        rejected_ids=response.response_ids,
        chosen_win=1.0,
        rejected_win=0.0,
        pair_win=1.0,
    )


def mix(current: Sequence[Pair], previous: Sequence[Pair]) -> list[Pair]:
    """SPIN's training set D_t ∪ D_{t−1}: this iteration's pairs, then those of the one before.

    Args:
        current: the pairs of iteration t.
        previous: the pairs of iteration t − 1; empty at t = 0.

    Returns:
        All of them; the trainer shuffles.

    Raises:
        SparringError: a `pair_id` occurs twice, as when both come from one iteration.
    """
    both = [*current, *previous]
    twice = [pair_id for pair_id, count in Counter(p.pair_id for p in both).items() if count > 1]
    if twice:
        shown = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
        raise SparringError(
            f"{len(twice)} of {len(both)} pairs occur twice ({shown}); current and previous must "
            "come from different iterations"
        )
    return both
