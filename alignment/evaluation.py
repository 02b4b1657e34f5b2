"""Stage `evaluate`: what an iterate achieved on held-out prompts, with bootstrap intervals.

Intervals resample base questions, since prompts that share one are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparring.alignment.judges.protocol import Judge, checked_matrix
from sparring.alignment.judging import Group, group_responses, make_judge
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.rows import Prompt, Response
from sparring.alignment.stages import EvaluateStage
from sparring.alignment.statistics import bootstrap_mean
from sparring.launch.rows import read_rows
from sparring.launch.stages import Context, Figures


class _Measure:
    """Means with intervals over responses, resampling base questions."""

    def __init__(self, groups: Sequence[Group], seed: int, level: float) -> None:
        self._labels = [prompt.group for prompt, rows in groups for _ in rows]
        self._seed, self._level = seed, level

    def __call__(self, values: Sequence[float]) -> list[float]:
        mean, low, high = bootstrap_mean(
            np.asarray(values, dtype=np.float64),
            groups=self._labels,
            seed=self._seed,
            level=self._level,
        )
        return [float(mean), float(low), float(high)]


def _read(inputs: Mapping[str, Path], name: str, prompts: Sequence[Prompt]) -> list[Group]:
    rows = read_rows(inputs[name] / "responses.parquet", Response)
    return group_responses(prompts, rows)


def win_rates(judge: Judge, ours: Sequence[Group], theirs: Sequence[Group]) -> list[float]:
    """A response each: 1 where ours beats theirs of the same prompt and k, ½ for a tie, else 0."""
    prompts = [prompt for prompt, rows in ours for _ in rows]
    texts = [
        [a.text, b.text]
        for (_, mine), (_, other) in zip(ours, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    ]
    logits = checked_matrix(judge, prompts, texts)
    margin = logits[:, 0, 1] - logits[:, 1, 0]
    return [0.5 + 0.5 * float(np.sign(m)) for m in margin]


def run(
    config: EvaluateStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Figures are [mean, low, high]; `base`, `previous` and `current` are sampled responses."""
    prompts = read_prompt_set(inputs["prompts"])
    current = _read(inputs, "current", prompts)
    measure = _Measure(current, context.seed, config.level)
    rows = [row for _, group in current for row in group]
    figures: Figures = {
        "responses": len(rows),
        "length": measure([float(len(row.response_ids)) for row in rows]),
        "cut": measure([float(row.finish_reason == "length") for row in rows]),
    }
    if config.use_judge:
        judge = make_judge(config.judge)
        texts = [[row.text for row in group] for _, group in current]
        details = judge.details([prompt for prompt, _ in current], texts)
        figures |= {name: measure(values.ravel().tolist()) for name, values in details.items()}
        for name in ("base", "previous"):
            if name in inputs:
                other = _read(inputs, name, prompts)
                figures[f"win_rate_{name}"] = measure(win_rates(judge, current, other))
    human = all(prompt.real is not None for prompt, _ in current)
    if human:
        figures["human_or_generated"] = _separability(current, context.seed)
    if "model" in inputs and (config.kl or human):
        figures |= _model_figures(config, inputs, current, measure, human=human)
    return figures


def _model_figures(
    config: EvaluateStage,
    inputs: Mapping[str, Path],
    current: Sequence[Group],
    measure: _Measure,
    *,
    human: bool,
) -> Figures:
    """KL to the base model, and the log-likelihood of the human responses, from forward passes."""
    from sparring.alignment import tokens
    from sparring.alignment.logprobs import ScoredPolicy, response_logps
    from sparring.alignment.models import device, load_policy

    tokenizer = tokens.load_tokenizer(inputs["model"])
    pad = tokens.eos_ids(tokenizer, inputs["model"])[0]

    def score(model: Path, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        policy = ScoredPolicy(load_policy(model, config.dtype).to(device()))
        return response_logps(policy, texts, pad=pad, batch=config.batch, device=device())

    figures: Figures = {}
    if human:
        limit = config.max_response_tokens
        texts = [
            (rows[0].prompt_ids, tokens.response_ids(tokenizer, prompt.real or "", limit=limit))
            for prompt, rows in current
        ]
        logps = score(inputs["model"], texts)
        # One figure a prompt, repeated for its k responses, keeps one set of groups for all.
        per_token = [lp / len(ids) for lp, (_, ids) in zip(logps, texts, strict=True)]
        repeated = [v for v, (_, rows) in zip(per_token, current, strict=True) for _ in rows]
        figures["human_logp_per_token"] = measure(repeated)
    if config.kl and "base_model" in inputs:
        # One sample a prompt: two forward passes of both models over all of them would cost more
        # than everything else here.
        sampled = [(rows[0].prompt_ids, rows[0].response_ids) for _, rows in current]
        ours, theirs = score(inputs["model"], sampled), score(inputs["base_model"], sampled)
        gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
        figures["kl"] = measure(
            [g for g, (_, rows) in zip(gaps, current, strict=True) for _ in rows]
        )
    return figures


def _separability(groups: Sequence[Group], seed: int) -> list[float]:
    """Cross-validated accuracy of telling human responses from generated ones; ½ is parity.

    Logistic regression on MiniLM embeddings; no base question is on both sides of a fold.
    """
    from sparring.alignment.judges.relevance import Relevance

    relevance = Relevance()
    texts, labels, owners = [], [], []
    for prompt, rows in groups:
        texts += [prompt.real or "", rows[0].text]
        labels += [1.0, 0.0]
        owners += [prompt.group, prompt.group]
    features = relevance.embed(texts)
    folds = np.random.default_rng(seed).permutation(len(set(owners))) % 5
    fold_of = dict(zip(dict.fromkeys(owners), folds.tolist(), strict=True))
    fold = np.array([fold_of[owner] for owner in owners])
    target = np.array(labels)
    right = np.zeros(len(target))
    for number in range(5):
        held = fold == number
        if held.any():
            weights = _logistic(features[~held], target[~held])
            right[held] = (_scores(features[held], weights) > 0) == (target[held] > 0.5)
    mean, low, high = bootstrap_mean(right, groups=owners, seed=seed)
    return [float(mean), float(low), float(high)]


def _scores(features: Any, weights: Any) -> Any:
    return features @ weights[:-1] + weights[-1]


def _logistic(features: Any, target: Any, *, penalty: float = 1e-2, steps: int = 30) -> Any:
    """Ridge logistic regression by Newton's method; returns weights with the intercept last."""
    design = np.hstack([features, np.ones((len(features), 1))]).astype(np.float64)
    weights = np.zeros(design.shape[1])
    ridge = penalty * len(design) * np.eye(design.shape[1]) / design.shape[1]
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (chance - target) + ridge @ weights
        curve = (design * (chance * (1 - chance))[:, None]).T @ design + ridge
        change = np.linalg.solve(curve, slope)
        weights -= change
        if np.abs(change).max() < 1e-8:
            break
    return weights
