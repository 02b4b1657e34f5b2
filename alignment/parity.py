"""Stage `parity`: the gate between sampling and training.

Preference losses compare what the trainer thinks of a response with what the policy that sampled it
thought. A sampler with other weights, another template, a second BOS or a forgotten temperature
breaks that silently: the run goes on and learns noise. So before an iteration's samples are used,
the token ids are checked, and for some responses both programs must give each token the same
log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparring.alignment import tokens
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.response_files import read_responses
from sparring.alignment.rows import Prompt, Response
from sparring.alignment.stages import ParityStage
from sparring.launch import artifacts
from sparring.launch.errors import SparringError
from sparring.launch.rows import write_rows
from sparring.launch.stages import Context, Figures

# Mean and worst difference a token, in nats, that rounding explains; half precision rounds both
# programs' hidden states differently. Measured values are in docs/alignment/parity.md.
_TOLERANCES = {"float32": (0.002, 0.05), "float16": (0.02, 0.5), "bfloat16": (0.1, 2.0)}
_TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)


@dataclass(frozen=True)
class ComparedToken:
    """A token of a probe with both programs' log-probabilities, in nats."""

    prompt_id: str
    k: int
    place: int
    """Number of the token in its response, from 0."""
    token: str
    sampler: float
    trainer: float
    more_likely: float
    """Probability, in the trainer's eyes, of all tokens more likely than this one."""

    @property
    def difference(self) -> float:
        gap = abs(self.sampler - self.trainer)
        return gap if math.isfinite(gap) else math.inf


def run(config: ParityStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Compare; raise SparringError where the samples cannot be trusted."""
    _check_weights(inputs)
    responses = read_responses(inputs["responses"])
    tokenizer = tokens.load_tokenizer(inputs["model"])
    prompts = {prompt.prompt_id: prompt for prompt in read_prompt_set(inputs["prompts"])}
    _check_prompts(tokenizer, prompts, responses, config)
    _check_endings(responses, tokens.eos_ids(tokenizer, inputs["model"]))
    probes = [row for row in responses if row.logps][: config.probes]
    if not probes:
        raise SparringError(
            f"{inputs['responses']} keeps no log-probabilities of the sampler to compare with; "
            "sample again with `--probes 8`, or set parity.probes = 0 to do without the gate"
        )
    rows = _compare(config, inputs["model"], tokenizer, probes)
    write_rows(output / "parity.parquet", ComparedToken, rows)
    figures = _figures(config, rows, probes)
    if not figures["agrees"]:
        raise SparringError(_report(config, figures, rows, inputs, tokenizer, probes))
    return figures


def _check_weights(inputs: Mapping[str, Path]) -> None:
    """The sampler's weights are the trainer's, as far as the responses' manifest says."""
    other = artifacts.other_input(inputs["responses"], "model", inputs["model"])
    if other:
        sampled, here = other
        raise SparringError(
            f"{inputs['responses']} was sampled from other weights ({sampled[:12]}) than those of "
            f"{inputs['model']} ({here[:12]}); sample again from the policy that will be trained"
        )


def _check_prompts(
    tokenizer: Any,
    prompts: Mapping[str, Prompt],
    responses: Sequence[Response],
    config: ParityStage,
) -> None:
    """Every prompt's ids are what this tokenizer and template make of its messages."""
    seen: dict[str, tuple[int, ...]] = {}
    for row in responses:
        if seen.get(row.prompt_id) == row.prompt_ids:
            continue
        if row.prompt_id not in prompts:
            raise SparringError(f"there is a response to {row.prompt_id!r}, but no such prompt")
        expected = tokens.prompt_ids(tokenizer, prompts[row.prompt_id], config)
        if list(row.prompt_ids) != expected:
            raise SparringError(_other_prompt(tokenizer, row, expected, config.template))
        seen[row.prompt_id] = row.prompt_ids


def _other_prompt(tokenizer: Any, row: Response, expected: list[int], template: str) -> str:
    found = list(row.prompt_ids)
    bos = tokenizer.bos_token_id
    if bos is not None and found[:2] == [bos, bos]:
        why = f"it begins with two BOS tokens ({tokenizer.bos_token})"
    else:
        place = next(
            (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        shown = [tokenizer.decode(ids[place : place + 8]) for ids in (found, expected)]
        why = f"they part at token {place}: {shown[0]!r} where training has {shown[1]!r}"
    return (
        f"prompt {row.prompt_id!r} was sampled as {len(found)} tokens, training has "
        f"{len(expected)}; {why}. Sample again with this tokenizer and the template {template!r}"
    )


def _check_endings(responses: Sequence[Response], eos: Sequence[int]) -> None:
    """One end-of-sequence token at the end of a response that ended by itself, else none."""
    for row in responses:
        ends = [place for place, token in enumerate(row.response_ids) if token in eos]
        wanted = [len(row.response_ids) - 1] if row.finish_reason == "stop" else []
        if ends != wanted:
            raise SparringError(
                f"response k={row.k} to prompt {row.prompt_id!r} finished by "
                f"{row.finish_reason!r} with {len(ends)} of the end tokens {list(eos)} at {ends}, "
                f"expected at {wanted}; sampler and trainer have different stop tokens"
            )


def _compare(
    config: ParityStage, model: Path, tokenizer: Any, probes: Sequence[Response]
) -> list[ComparedToken]:
    temperature = config.temperature or 1.0
    top_p = config.top_p if config.temperature else 1.0
    found = _trainer_logps(config, model, probes, [(temperature, top_p)])[0]
    rows = []
    for probe, (logps, above) in zip(probes, found, strict=True):
        if len(probe.logps) != len(probe.response_ids):
            raise SparringError(
                f"response k={probe.k} to prompt {probe.prompt_id!r} has {len(probe.response_ids)} "
                f"tokens, but {len(probe.logps)} log-probabilities; sample again"
            )
        for place, token in enumerate(probe.response_ids):
            rows.append(
                ComparedToken(
                    prompt_id=probe.prompt_id,
                    k=probe.k,
                    place=place,
                    token=tokenizer.decode([token]),
                    sampler=probe.logps[place],
                    trainer=logps[place],
                    more_likely=above[place],
                )
            )
    return rows


def _trainer_logps(
    config: ParityStage,
    model: Path,
    probes: Sequence[Response],
    settings: Iterable[tuple[float, float]],
) -> list[list[tuple[list[float], list[float]]]]:
    """For each (temperature, top_p) and probe: log-probabilities, and the mass above each token."""
    from sparring.alignment.logprobs import sampling_logps, scored_policy

    policy = scored_policy(model, config)
    found = []
    for temperature, top_p in settings:
        scored = [
            sampling_logps(
                policy, row.prompt_ids, row.response_ids, temperature=temperature, top_p=top_p
            )
            for row in probes
        ]
        found.append([(logps.tolist(), above.tolist()) for logps, above in scored])
    return found


def _figures(
    config: ParityStage, rows: Sequence[ComparedToken], probes: Sequence[Response]
) -> Figures:
    mean_limit, token_limit = max(_TOLERANCES[config.dtype], _TOLERANCES[config.precision])
    mean_limit = config.mean_tolerance or mean_limit
    token_limit = config.token_tolerance or token_limit
    nucleus = config.top_p if config.temperature else 1.0
    # At the nucleus's edge rounding decides who is in; well outside it nothing was drawn.
    edge = [row for row in rows if nucleus < 1 and row.more_likely >= nucleus]
    outside = [row for row in edge if row.more_likely >= nucleus + token_limit / 5]
    gaps = np.array([row.difference for row in rows if row not in edge] or [0.0])
    return {
        "probes": len(probes),
        "tokens": len(rows),
        "mean_difference": float(gaps.mean()),
        "worst_difference": float(gaps.max()),
        "mean_tolerance": mean_limit,
        "token_tolerance": token_limit,
        "outside_nucleus": len(outside),
        "agrees": bool(gaps.mean() <= mean_limit and gaps.max() <= token_limit and not outside),
    }


def _report(
    config: ParityStage,
    figures: Figures,
    rows: Sequence[ComparedToken],
    inputs: Mapping[str, Path],
    tokenizer: Any,
    probes: Sequence[Response],
) -> str:
    worst = sorted(rows, key=lambda row: -row.difference)[:8]
    lines = [
        f"sampler and trainer disagree about the samples in {inputs['responses']}:",
        _summary(figures),
        "",
        f"{'prompt':<24} {'place':>5}  {'token':<16} {'sampler':>9} {'trainer':>9}",
    ]
    lines += [
        f"{row.prompt_id[:24]:<24} {row.place:>5}  {row.token[:14]!r:<16} {row.sampler:>9.3f} "
        f"{row.trainer:>9.3f}"
        for row in worst
    ]
    hint = _temperature_hint(config, inputs["model"], probes, figures["mean_difference"])
    lines += ["", hint or "Look at the weights, the template and BOS, and the number type."]
    lines.append(
        "parity.mean_tolerance and parity.token_tolerance set what is allowed; parity.probes = 0 "
        "does without the gate."
    )
    return "\n".join(lines)


def _temperature_hint(
    config: ParityStage, model: Path, probes: Sequence[Response], mean: float
) -> str | None:
    """Whether the sampler's numbers are those of another temperature."""
    settings = [(temperature, config.top_p) for temperature in _TEMPERATURES]
    reported = np.concatenate([row.logps for row in probes])
    if not np.isfinite(reported).all():
        return "Some of the sampler's numbers are not finite; look at its number type."
    means = [
        float(np.abs(reported - np.concatenate([logps for logps, _ in one])).mean())
        for one in _trainer_logps(config, model, probes, settings)
    ]
    best = int(np.nanargmin(means))
    if means[best] > mean / 2 or _TEMPERATURES[best] == config.temperature:
        return None
    return (
        f"The sampler's numbers fit temperature {_TEMPERATURES[best]} (mean difference "
        f"{means[best]:.4f}), not {config.temperature}."
    )


def _summary(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['probes']} responses, {figures['tokens']} tokens: mean |difference| "
        f"{figures['mean_difference']:.2g} nats (allowed {figures['mean_tolerance']:.2g}), worst "
        f"{figures['worst_difference']:.2g} (allowed {figures['token_tolerance']:.2g}), "
        f"{figures['outside_nucleus']} outside the nucleus"
    )


def text(path: Path) -> str:
    """What `sparring parity` shows of an artifact."""
    artifact = artifacts.read(path)
    assert artifact is not None
    return f"sampler and trainer agree: {_summary(artifact.figures)}"
