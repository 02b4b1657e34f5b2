"""Stage `pair`: judged (or human) responses become training pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from sparring.alignment import pairs as rules
from sparring.alignment import tokens
from sparring.alignment.algorithms import REAL_GENERATED, pair_rule
from sparring.alignment.judging import group_responses
from sparring.alignment.pairs import Dropped
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.response_files import read_responses, with_ids
from sparring.alignment.rows import Judged, Pair, Response
from sparring.alignment.stages import PairStage
from sparring.launch import artifacts
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures, load


def run(config: PairStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Write ``pairs.parquet`` (this iteration's, with the previous one's where mixed in)."""
    _check_inputs(config, inputs)
    responses = read_responses(inputs["responses"])
    made = (
        _real_generated(config, inputs, responses)
        if config.rule == REAL_GENERATED
        else _judged(config, inputs, responses, context.seed)
    )
    counts: Counter[str] = Counter()
    fresh: list[Pair] = []
    for item in made:
        if isinstance(item, Pair):
            fresh.append(item)
        else:
            counts[item.value] += 1
    if config.rule == "shuffled":
        fresh = rules.reverse_half(fresh, np.random.default_rng(context.seed))
    if not fresh:
        why = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
        raise SparringError(
            f"no pair is left to train on ({why}); sample at a higher temperature, raise "
            "generate.k, or lower pair.min_margin"
        )
    write_rows(output / "fresh.parquet", Pair, fresh)
    rows = fresh
    if "previous" in inputs:
        rows = rules.mix(fresh, read_rows(inputs["previous"] / "fresh.parquet", Pair))
    write_rows(output / "pairs.parquet", Pair, rows)
    margin = float(np.mean([row.chosen_win - row.rejected_win for row in fresh]))
    dropped = sum(counts.values())
    return {
        "pairs": len(rows),
        "fresh": len(fresh),
        "dropped": dropped,
        "mean_margin": margin,
        "dropped_because": dict(counts),
    }


def _check_inputs(config: PairStage, inputs: Mapping[str, Path]) -> None:
    needed, why = (
        ("model", "the policy whose tokenizer encodes the human responses")
        if config.rule == REAL_GENERATED
        else ("judged", "the judge's artifact of these responses")
    )
    if needed not in inputs:
        raise UsageError(f"the rule {config.rule!r} needs --{needed}: {why}")


def _real_generated(
    config: PairStage, inputs: Mapping[str, Path], responses: list[Response]
) -> Iterable[Pair | Dropped]:
    tokenizer = tokens.load_tokenizer(inputs["model"])
    place = tokens.turn(tokenizer, inputs["model"], config)
    prompts = {p.prompt_id: p for p in read_prompt_set(inputs["prompts"])}
    for response in responses:
        if response.prompt_id not in prompts:
            raise SparringError(
                f"there is a response to {response.prompt_id!r}, but no such prompt"
            )
        prompt = prompts[response.prompt_id]
        if prompt.real is None:
            raise SparringError(
                f"prompt {prompt.prompt_id!r} has no real response; SPIN and SFT need one"
            )
        if response.k == 0:
            limit = config.max_response_tokens
            real = tokens.response_ids(tokenizer, prompt.real, place, limit=limit)
            yield rules.real_generated(prompt, response, real)


def _encoded(
    config: PairStage, inputs: Mapping[str, Path], responses: list[Response]
) -> list[Response]:
    """Responses of the user's own files, as tokens."""
    if "model" not in inputs:
        raise SparringError(
            f"the responses of {inputs['responses']} are texts without token ids; give --model, "
            "the policy whose tokenizer encodes them"
        )
    prompts = {p.prompt_id: p for p in read_prompt_set(inputs["prompts"])}
    limit = config.max_response_tokens
    return with_ids(responses, prompts, inputs["model"], how=config, limit=limit)


def _check_verdicts(inputs: Mapping[str, Path]) -> None:
    """The verdicts are of these responses, as far as their manifest says (merged ones do not)."""
    if artifacts.other_input(inputs["judged"], "responses", inputs["responses"]):
        raise SparringError(
            f"{inputs['judged']} holds verdicts on other responses than {inputs['responses']}; "
            "judge these"
        )


def _judged(
    config: PairStage, inputs: Mapping[str, Path], responses: list[Response], seed: int
) -> Iterable[Pair | Dropped]:
    rule = load(pair_rule(config.rule))
    if any(not row.prompt_ids for row in responses):
        responses = _encoded(config, inputs, responses)
    _check_verdicts(inputs)
    judged = {r.prompt_id: r for r in read_rows(inputs["judged"] / "judged.parquet", Judged)}
    groups = group_responses(read_prompt_set(inputs["prompts"]), responses)
    for prompt, rows in groups:
        if prompt.prompt_id not in judged:
            raise SparringError(
                f"prompt {prompt.prompt_id!r} was not judged; judge these responses"
            )
        made = rule(
            judged[prompt.prompt_id],
            rows,
            convention=config.convention,
            min_margin=config.min_margin,
            rng=np.random.default_rng(derive(seed, prompt.prompt_id)),
        )
        yield from made if isinstance(made, list) else [made]
