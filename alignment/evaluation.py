"""Stage `evaluate`: what an iterate achieved on held-out prompts, with bootstrap intervals.

Intervals resample base questions, since prompts that share one are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from sparring.alignment.games import best_responses, cross_play, pairwise_probabilities
from sparring.alignment.judges.protocol import Judge, Metered
from sparring.alignment.judging import Group, cache_notes, group_responses, make_judge
from sparring.alignment.matches import Players, play, read_players, read_samples
from sparring.alignment.prompting import read_prompt_set
from sparring.alignment.response_files import with_ids
from sparring.alignment.stages import EvaluateStage
from sparring.alignment.win_rates import length_controlled_win_rate, verdicts
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.stages import Context, Figures
from sparring.launch.statistics import bootstrap_mean, fit_logistic


class _Options(TypedDict):
    seed: int
    level: float


class _Measure:
    """Means with intervals over responses, resampling base questions."""

    def __init__(self, groups: Sequence[Group], seed: int, level: float) -> None:
        self.labels = [prompt.group for prompt, rows in groups for _ in rows]
        self.prompts = [prompt.prompt_id for prompt, rows in groups for _ in rows]
        self.options: _Options = {"seed": seed, "level": level}

    def __call__(self, values: Sequence[float]) -> list[float]:
        mean, low, high = bootstrap_mean(
            np.asarray(values, dtype=np.float64), groups=self.labels, **self.options
        )
        return [float(mean), float(low), float(high)]


def run(
    config: EvaluateStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Figures are [mean, low, high]; `base`, `previous`, `against.N`, `current` are responses.

    Raises:
        UsageError: neither responses nor a leaderboard to run, or one without what it needs.
        SparringError: policies that answered other prompts, and what judging raises.
    """
    if "current" not in inputs and not config.lm_eval:
        raise UsageError(
            "nothing to evaluate: give --prompts and --current (sampled responses), or --model and "
            "--lm-eval TASK"
        )
    if config.lm_eval and "model" not in inputs:
        raise UsageError(f"--lm-eval {' '.join(config.lm_eval)} needs --model, the policy to run")
    boards: Figures = {}
    if config.lm_eval:  # first: a judge in vLLM keeps an accelerator's memory to the end
        from sparring.alignment.harness import leaderboards
        from sparring.launch.collective import device, free_memory

        boards = leaderboards(
            inputs["model"],
            config.lm_eval,
            own_tasks=inputs.get("lm_eval_path"),
            dtype=config.precision,
            batch=config.batch,
            device=str(device()),
            devices=config.devices,
            limit=config.lm_eval_limit,
        )
        free_memory()
    return (_held_out(config, inputs, context) if "current" in inputs else {}) | boards


def _held_out(config: EvaluateStage, inputs: Mapping[str, Path], context: Context) -> Figures:
    """Figures of the sampled responses."""
    if "prompts" not in inputs:
        raise UsageError("responses are evaluated with the prompts they answer: give --prompts")
    prompts = read_prompt_set(inputs["prompts"])
    current = read_samples(inputs["current"], prompts)
    if not current:
        raise SparringError(f"{inputs['current']} holds no responses; sample some first")
    measure = _Measure(current, context.seed, config.level)
    rows = [row for _, group in current for row in group]
    figures: Figures = {
        "prompts": len(current),
        "groups": len({prompt.group for prompt, _ in current}),
        "responses": len(rows),
        "characters": measure([float(len(row.text)) for row in rows]),
    }
    if all(row.prompt_ids for row in rows):  # sampled, and not a file's texts
        figures["length"] = measure([float(len(row.response_ids)) for row in rows])
        figures["cut"] = measure([float(row.finish_reason == "length") for row in rows])
    human = all(prompt.real is not None for prompt, _ in current)
    likelihoods: Figures = {}
    if "model" in inputs and (config.kl or human):  # before the judge, as above
        encoded = _encoded(config, inputs["model"], current)
        likelihoods = _model_figures(config, inputs, encoded, measure, human=human)
    if config.use_judge:
        judge, chunk = make_judge(config.judge), config.judge.chunk
        for note in cache_notes(judge):
            context.emit(note=f"judge.cache: {note}")
        figures |= _details(judge, current, measure, chunk)
        players = read_players(inputs, prompts, current)
        if players.opponents:
            figures |= _matches(judge, players, measure, chunk, context)
        if isinstance(judge, Metered):
            figures["judge_usage"] = judge.usage()
    if human:
        figures["human_or_generated"] = _separability(current, context.seed)
    return figures | likelihoods


def _encoded(config: EvaluateStage, model: Path, groups: Sequence[Group]) -> list[Group]:
    """Responses with token ids; those of files are texts."""
    prompts = {prompt.prompt_id: prompt for prompt, _ in groups}
    rows = [row for _, rows in groups for row in rows]
    encoded = with_ids(rows, prompts, model, how=config, limit=config.max_response_tokens)
    return group_responses(prompts.values(), encoded)


def _details(judge: Judge, current: Sequence[Group], measure: _Measure, chunk: int) -> Figures:
    """The judge's own figures of each response."""
    found: dict[str, list[float]] = {}
    for start in range(0, len(current), chunk):
        part = current[start : start + chunk]
        texts = [[row.text for row in rows] for _, rows in part]
        for name, values in judge.details([prompt for prompt, _ in part], texts).items():
            found.setdefault(name, []).extend(values.ravel().tolist())
    return {name: measure(values) for name, values in found.items()}


def _matches(
    judge: Judge, players: Players, measure: _Measure, chunk: int, context: Context
) -> Figures:
    """Win rates against each opponent, and the game of all of them where there are three."""
    ours = len(players.names) - 1
    if ours == 0:  # every opponent is the current policy's own sample
        logits = np.zeros((len(measure.labels), 1, 1), dtype=np.float32)
    else:
        logits = play(
            judge,
            players,
            chunk=chunk,
            report=lambda done, total: context.emit(done=done, total=total, unit="matches"),
        )
    # AlpacaEval's unit of length, and one that two tokenizers share.
    lengths = [[len(row.text) for _, rows in groups for row in rows] for groups in players.samples]
    figures: Figures = {}
    for title, theirs in players.opponents.items():
        wins = verdicts(logits, ours, theirs)
        figures[f"win_rate_{title}"] = measure(wins.tolist())
        controlled = length_controlled_win_rate(
            wins, lengths[ours], lengths[theirs], groups=measure.labels, **measure.options
        )
        if controlled:
            figures[f"lc_win_rate_{title}"] = list(controlled)
    if len(players.names) >= 3:
        chances = pairwise_probabilities(logits)
        matrix = {"policies": list(players.names)}
        game = cross_play(chances, groups=measure.labels, **measure.options)
        names = [name for name in game if name.startswith(("payoff", "duality"))]
        figures["cross_play"] = matrix | {name: game.pop(name) for name in names}
        figures |= game
        figures |= best_responses(chances, measure.prompts, measure.labels, **measure.options)
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
    from sparring.alignment.logprobs import response_logps, scored_policy
    from sparring.launch.collective import device, free_memory

    tokenizer = tokens.load_tokenizer(inputs["model"])
    pad = tokens.eos_ids(tokenizer, inputs["model"])[0]

    def score(model: Path, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        policy = scored_policy(model, config)
        return response_logps(policy, texts, pad=pad, batch=config.batch, device=device())

    figures: Figures = {}
    if human:
        limit = config.max_response_tokens
        place = tokens.turn(tokenizer, inputs["model"], config)
        texts = [
            (
                rows[0].prompt_ids,
                tokens.response_ids(tokenizer, prompt.real or "", place, limit=limit),
            )
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
    free_memory()
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
    features = np.asarray(relevance.embed(texts), dtype=np.float64)
    design = np.hstack([features, np.ones((len(features), 1))])
    folds = np.random.default_rng(seed).permutation(len(set(owners))) % 5
    fold_of = dict(zip(dict.fromkeys(owners), folds.tolist(), strict=True))
    fold = np.array([fold_of[owner] for owner in owners])
    target = np.array(labels)
    right = np.zeros(len(target))
    for number in range(5):
        held = fold == number
        if held.any():
            ridge = 1e-2 * (~held).sum() / design.shape[1]
            weights = fit_logistic(design[~held], target[~held], ridge=ridge)[0]
            right[held] = (design[held] @ weights > 0) == (target[held] > 0.5)
    mean, low, high = bootstrap_mean(right, groups=owners, seed=seed)
    return [float(mean), float(low), float(high)]
