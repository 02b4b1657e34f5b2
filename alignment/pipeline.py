"""The alignment pipeline: a recipe becomes a chain of stages. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.alignment.algorithms import Algorithm, algorithm, algorithms
from sparring.alignment.config import ModelConfig, Recipe, TemplateConfig
from sparring.alignment.stages import (
    EVALUATE,
    EXTRAPOLATE,
    GENERATE,
    JUDGE,
    MODEL,
    PAIR,
    PARITY,
    PROMPTS,
    REFERENCE,
    STAGES,
    TRAIN,
)
from sparring.launch.config import at, plain, resolved
from sparring.launch.seeds import derive
from sparring.launch.stages import Stage, Step, numbered


class _Chain:
    """Builds the steps of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.algorithm: Algorithm = algorithm(recipe.algorithm)
        self.steps: list[Step] = []
        devices = recipe.model.devices
        self.sampling = {"dtype": recipe.model.dtype, "devices": devices}
        self.scoring = {"precision": recipe.train.precision, "devices": devices}
        self.writing = {
            field.name: getattr(recipe.generate, field.name)
            for field in dataclasses.fields(TemplateConfig)
        }

    def add(
        self, folder: str, stage: Stage, settings: Mapping[str, Any], **inputs: str | None
    ) -> str:
        """Append a step; `settings` are the stage's configuration values. Returns its name."""
        name = f"{folder}/{stage.name}" if folder else stage.name
        given = {key: source for key, source in inputs.items() if source}
        # A stage draws from the stream of its kind and iteration, so that what an algorithm or
        # another stage draws never shifts it.
        seed = derive(self.recipe.seed, stage.name, folder)
        self.steps.append(Step(name, stage, stage.config(**settings), given, seed))
        return name

    def sample(self, folder: str, policy: str, settings: Mapping[str, Any]) -> str:
        base = plain(self.recipe.generate)
        extra = {
            **self.sampling,
            "max_prompt_tokens": self.recipe.prompts.max_tokens,
            "too_long": self.recipe.prompts.too_long,
        }
        return self.add(
            folder, GENERATE, {**base, **extra, **settings}, model=policy, prompts="prompts"
        )

    def train_samples(self, t: int, policy: str) -> str:
        prompts = self.recipe.prompts
        probes = self.recipe.parity.probes
        settings: dict[str, Any] = {"iteration": t, "part": "train", "probes": probes}
        if prompts.fresh:
            share = prompts.train // self.recipe.iterations
            settings |= {"start": t * share, "count": share}
        if not self.algorithm.needs_judge:
            settings["k"] = 1
        responses = self.sample(f"iter{t}", policy, settings)
        if probes:
            self.parity(t, policy, responses)
        return responses

    def parity(self, t: int, policy: str, responses: str) -> None:
        """The gate that stops the run where sampler and trainer disagree about the samples."""
        generate = self.recipe.generate
        settings = vars(self.recipe.parity) | {
            "temperature": generate.temperature,
            "top_p": generate.top_p,
            **self.writing,
            **self.sampling,
            **self.scoring,
        }
        self.add(f"iter{t}", PARITY, settings, model=policy, prompts="prompts", responses=responses)

    def pairs(self, t: int, policy: str, previous: str | None) -> str:
        recipe = self.recipe
        responses = self.train_samples(t, policy)
        judged = None
        if self.algorithm.needs_judge:
            judged = self.add(
                f"iter{t}", JUDGE, vars(recipe.judge), prompts="prompts", responses=responses
            )
        mixed = recipe.pair.mix_previous
        mixed = self.algorithm.mix_previous if mixed is None else mixed
        settings = {k: v for k, v in vars(recipe.pair).items() if k != "mix_previous"}
        settings |= {"rule": recipe.pair.rule or self.algorithm.rule, **self.writing}
        return self.add(
            f"iter{t}",
            PAIR,
            settings,
            prompts="prompts",
            responses=responses,
            judged=judged,
            model=None if judged else policy,
            previous=previous if mixed else None,
        )

    def evaluate(self, t: int, policy: str, samples: Mapping[int, str]) -> None:
        """Evaluate π̂_t, the outcome of t iterations, against π_0 and π̂_{t-1}.

        The last one meets all iterates, which makes the cross-play matrix.
        """
        recipe = self.recipe
        last = t == recipe.iterations
        between = [samples[n] for n in range(1, t - 1)] if self.algorithm.needs_judge else []
        own_tasks = recipe.evaluate.lm_eval_path if recipe.evaluate.lm_eval else ""
        settings = {
            "judge": recipe.judge,
            "use_judge": self.algorithm.needs_judge,
            # Samples of a sharpened policy say nothing of the KL of the policy itself.
            "kl": recipe.evaluate.kl and t > 0 and recipe.evaluate.temperature == 1,
            "level": recipe.evaluate.level,
            **self.scoring,
            "max_response_tokens": recipe.pair.max_response_tokens,
            **self.writing,
            # Leaderboards are dear: of the start and of the result.
            "lm_eval": recipe.evaluate.lm_eval if last or not t else (),
            "lm_eval_limit": recipe.evaluate.lm_eval_limit,
        }
        self.add(
            f"heldout{t}",
            EVALUATE,
            settings,
            prompts="prompts",
            current=samples[t],
            base=samples[0] if t else None,
            previous=samples[t - 1] if t > 1 else None,
            model=policy,
            base_model="model" if t else None,
            lm_eval_path=f"path:{own_tasks}" if settings["lm_eval"] and own_tasks else None,
            **(numbered("against", between) if last else {}),
        )

    def heldout(self, t: int, policy: str, samples: dict[int, str]) -> None:
        settings = {
            "iteration": t,
            "part": "heldout",
            "k": self.recipe.evaluate.k,
            "temperature": self.recipe.evaluate.temperature,
            "top_p": 1.0,
            "probes": 0,
        }
        samples[t] = self.sample(f"heldout{t}", policy, settings)
        self.evaluate(t, policy, samples)


def build_steps(recipe: Recipe) -> list[Step]:
    """The chain of a recipe, in the order in which it runs.

    At iteration t, `policy` is APO's π_t (sampled from, and the reference) and `solution` is π̂_t.
    Without momentum they are the same.
    """
    chain = _Chain(recipe)
    chain.add("", PROMPTS, vars(recipe.prompts))
    policy = solution = chain.add("", MODEL, vars(recipe.model))
    older: str | None = None
    previous_pairs: str | None = None
    samples: dict[int, str] = {}
    chain.heldout(0, policy, samples)
    momentum = recipe.momentum
    for t in range(recipe.iterations):
        pairs = chain.pairs(t, policy, previous_pairs)
        previous_pairs = pairs
        # Momentum acts from the second iteration on: π_0 = π̂_0.
        fold = at(momentum.alpha, t - 1) if momentum.realised == "reference" and older else 0.0
        reference = chain.add(
            f"iter{t}",
            REFERENCE,
            {"alpha": fold, **chain.scoring},
            pairs=pairs,
            model=policy,
            previous=older if fold else None,
        )
        settings = vars(resolved(recipe.train, t)) | {"algorithm": recipe.algorithm}
        start = policy if momentum.start == "extrapolated" else solution
        newer = chain.add(f"iter{t}", TRAIN, settings, model=start, pairs=reference)
        older, solution = solution, newer
        policy = solution
        alpha = at(momentum.alpha, t) if momentum.realised == "weights" else 0.0
        # The run's result is π̂, not its extrapolation, so the last one is not made.
        if alpha and t + 1 < recipe.iterations:
            policy = chain.add(f"iter{t}", EXTRAPOLATE, {"alpha": alpha}, new=solution, old=older)
        chain.heldout(t + 1, solution, samples)
    return chain.steps


class AlignmentPipeline:
    """What `sparring run` needs to know of this package."""

    recipe = Recipe
    stages: Mapping[str, Stage] = STAGES

    def algorithms(self) -> dict[str, str]:
        return {name: f"{a.summary} ({a.paper})" for name, a in algorithms().items()}

    def steps(self, recipe: Recipe) -> Sequence[Step]:
        return build_steps(recipe)

    def locate(self, name: str) -> Path:
        """A policy that is no path: "smollm2" or a hub id."""
        from sparring.alignment.models import locate

        return locate(ModelConfig(path=name))

    def summary(self, recipe: Recipe, run: Path) -> dict[str, Any]:
        from sparring.alignment.results import summary

        return summary(recipe, run)

    def report(self, recipe: Recipe, run: Path) -> Path:
        from sparring.alignment.results import write_report

        return write_report(recipe, run)


PIPELINE = AlignmentPipeline()
