"""The recipe of a language-model alignment run. Imports no torch.

Values that may change from one iteration to the next take a number or a list; a list's last entry
stays for the iterations after it.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Literal

from sparring.alignment.algorithms import REAL_GENERATED, Algorithm, algorithm, pair_rule
from sparring.launch.config import Schedule, config, positive, resource, schedule_values, within
from sparring.launch.stages import LaunchConfig
from sparring.launch.training import TrainingConfig


@config
class ModelConfig:
    """The policy to start from."""

    path: str = "smollm2"
    """A folder in the Hugging Face layout, a hub id, or "smollm2": SmolLM2-135M-Instruct."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of generation. Weights are always stored as float32, and log-probabilities are
    the trainer's: of those, in train.precision."""
    devices: int = resource(default=1)
    """Accelerators that one copy of the policy is spread over where it is only read (`generate`,
    `parity`, `reference`, `evaluate`), when it does not fit on one. `train` shards it by ZeRO."""

    def __post_init__(self) -> None:
        positive("model.devices", self.devices)


@config
class PromptsConfig:
    """Where prompts come from."""

    source: str = "constraints"
    """"constraints" (questions with a verifiable constraint), "chitchat" (human conversations), a
    JSONL or parquet file, or the id of a data set on the hub."""
    train: int = 300
    """Training prompts in all; 0, with heldout 0: every prompt, as they come, for `sparring
    generate` alone."""
    heldout: int = 160
    """Prompts that no iteration trains on; none of their base questions is trained on either."""
    fresh: bool = True
    """Give each iteration its own share of the prompts (SPPO, APO), or all to each (SPIN)."""
    max_tokens: int = 512
    """Longest prompt in tokens; none is cut."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer prompt: the run ends, or goes on without it and counts it."""
    split: str = "train"
    """Split of a data set."""
    turns: Literal["all", "first"] = "all"
    """Of the conversations of a file or data set: all turns, or the first and its answer (SPIN)."""

    def __post_init__(self) -> None:
        positive("prompts.max_tokens", self.max_tokens)
        for name in ("train", "heldout"):
            within(f"prompts.{name}", getattr(self, name), 0, math.inf)
        if self.heldout and not self.train:
            raise ValueError("prompts.train = 0 takes every prompt; then prompts.heldout must be 0")


@config
class TemplateConfig:
    """How a prompt is written for the policy."""

    template: Literal["chat", "instruction"] = "chat"
    """The model's chat template, or SPIN's "### Instruction:" text. Training sees the same ids."""
    template_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """What the chat template takes besides messages, such as Qwen3's enable_thinking = false."""

    def __post_init__(self) -> None:
        if self.template_options and self.template != "chat":
            raise ValueError(
                f"template_options {', '.join(self.template_options)} are for a model's chat "
                f"template, and template is {self.template!r}; leave one of them out"
            )


@config
class GenerateConfig(TemplateConfig):
    """How responses are sampled."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """vLLM, or transformers' own generate where vLLM does not run."""
    k: int = 5
    """Responses a prompt."""
    temperature: float = 1.0
    """0 is greedy. SPPO's paper says 1.0, its code 0.7."""
    top_p: float = 1.0
    """Nucleus; 1 keeps the whole distribution. SPPO's paper says 1.0, its code 0.9."""
    max_new_tokens: int = 256
    """Longest response in tokens, EOS included."""
    answer_after: str = ""
    """What ends a model's thinking, such as "</think>": judges read what follows its last place,
    which is nothing where a response was cut before. Training sees all tokens."""
    chunk: int = 64
    """Prompts a shard. Shards, not ranks, decide which prompts share a batch, so that results do
    not depend on the number of ranks."""
    max_batch: int = resource(default=128)
    """Responses that the engine decodes at once."""
    memory: float = resource(default=0.0)
    """vLLM's key-value cache: GiB on a CPU (0: 2), share of the GPU's memory on CUDA (0: 0.9)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "max_new_tokens", "chunk", "max_batch"):
            positive(f"generate.{name}", getattr(self, name))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate.top_p is a probability above 0, not {self.top_p}")
        if self.temperature < 0:
            raise ValueError(f"generate.temperature must not be negative, not {self.temperature}")


@config
class ParityConfig:
    """The gate between sampling and training: both must give the samples the same probability."""

    probes: int = 8
    """Responses compared each iteration; 0: no gate."""
    mean_tolerance: float = 0.0
    """Largest mean |difference| of log-probabilities a token, in nats; 0: by the model's number
    type, 0.002 (float32), 0.02 (float16) or 0.1 (bfloat16)."""
    token_tolerance: float = 0.0
    """Largest |difference| of one token; 0: 0.05 (float32), 0.5 (float16) or 2 (bfloat16)."""

    def __post_init__(self) -> None:
        for name in ("probes", "mean_tolerance", "token_tolerance"):
            within(f"parity.{name}", getattr(self, name), 0, math.inf)


@config
class JudgeMember:
    """One judge of an ensemble."""

    name: str = ""
    """As judge.name, but not "ensemble"."""
    path: str = ""
    """As judge.path."""
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    """As judge.options."""
    weight: float = 1.0
    """Share in the average, over the sum of all weights."""
    label: str = ""
    """Before the names of its figures; empty: its name. Two members need different labels."""

    def __post_init__(self) -> None:
        positive("judge.members.weight", self.weight)
        if self.name in ("", "ensemble"):
            raise ValueError(f"judge.members.name must name a single judge, not {self.name!r}")


@config
class JudgeConfig:
    """Who says which response is better."""

    name: str = "verifier"
    """"verifier" (rules, then relevance), "relevance", "pairrm", "reward-model", "llm" (a chat
    model), "ensemble" (several judges' average), or a plug-in's name."""
    path: str = ""
    """Folder or hub id of the judge's weights, for judges that have some; "llm": the model's name
    at its endpoint."""
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    """Settings of the judge by name."""
    members: tuple[JudgeMember, ...] = ()
    """The judges of an ensemble, as [[judge.members]] tables with name, path, options, weight."""
    cache: str = resource(default="")
    """Folder where verdicts on single pairs are kept across runs and looked up first ("pairrm",
    "llm"); may be shared by judges, ranks and hosts. Empty: none."""
    chunk: int = 64
    """Prompts a shard."""

    def __post_init__(self) -> None:
        positive("judge.chunk", self.chunk)
        if (self.name == "ensemble") != bool(self.members):
            raise ValueError(
                "judge.members and judge.name = 'ensemble' need each other (name is "
                f"{self.name!r}, members {len(self.members)})"
            )
        labels = [member.label or member.name for member in self.members]
        if len(set(labels)) < len(labels):
            raise ValueError(f"judge.members need different labels, not {labels}")


@config
class PairSettings:
    """How judged responses become training pairs."""

    convention: Literal["pairwise", "pairwise-one-order", "mean-probability", "aggregated"] = (
        "pairwise"
    )
    """How judge logits become win probabilities; "aggregated" is the SPPO repository's."""
    min_margin: float = 0.0
    """Drop pairs whose two win probabilities differ by no more than this."""
    max_response_tokens: int = 256
    """Where a given (human) response is cut, for real-generated pairs."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin < 1:
            raise ValueError(f"pair.min_margin is from 0 to below 1, not {self.min_margin}")
        positive("pair.max_response_tokens", self.max_response_tokens)


@config
class PairConfig(PairSettings):
    """How judged responses become training pairs."""

    rule: str = ""
    """Empty: the algorithm's own. "best-worst"; "all": every response with its own win probability
    (SPPO); "random-pair": any two; "shuffled": the control, best-worst with the judge's verdict on
    half of the prompts reversed; a plug-in's name, or module:function."""
    mix_previous: bool | None = None
    """Train on the previous iteration's pairs too (SPIN); default: as the algorithm does."""


@config
class TrainConfig(TrainingConfig):
    """One iteration's training."""

    beta: Schedule | None = None
    """β = 1/η: DPO's and IPO's β, SPIN's λ, SPPO's 1/η. Default: 0.001 for SPPO (η = 1e3), 0.1 for
    SPIN, DPO and IPO."""
    link: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    """SPIN's ℓ."""
    lr: Schedule = 5e-7
    """Peak learning rate. The papers' 5e-7 is for 7B models; 2e-5 suits SmolLM2-135M."""
    epochs: Schedule = 1.0
    """Passes over the pairs."""
    schedule_epochs: float = 0.0
    """Passes the schedule is laid out for; 0: `epochs`. SPPO's paper: 18, stopping after 1."""
    batch: int = 64
    """Pairs an optimizer step, over all ranks."""
    micro_batch: int = resource(default=4)
    """Pairs a rank's forward pass."""
    max_length: int = 1024
    """Longest prompt and response in tokens; longer pairs are dropped and counted, not cut."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. The result is merged."""
    lora_alpha: float = 16.0
    """Scale of the adapters' product is lora_alpha / lora_rank."""
    logits_chunk: int = 1024
    """Response tokens whose logits are held at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "logits_chunk"):
            positive(f"train.{name}", getattr(self, name))
        for name in ("beta", "epochs"):
            given = getattr(self, name)
            for value in () if given is None else schedule_values(f"train.{name}", given):
                positive(f"train.{name}", value)
        for name in ("lora_rank", "schedule_epochs"):
            within(f"train.{name}", getattr(self, name), 0, math.inf)


@config
class MomentumConfig:
    """APO's acceleration: π_{t+1} ∝ π̂_{t+1}·(π̂_{t+1}/π̂_t)^α."""

    alpha: Schedule = 0.0
    """0: none. APO's paper: 0.3."""
    realised: Literal["weights", "reference"] = "weights"
    """By extrapolating weights (the paper's), or by folding it into the reference's
    log-probabilities (exact for DPO, IPO and SPIN; samples then come from π̂)."""
    start: Literal["extrapolated", "solution"] = "extrapolated"
    """Where the next iteration's training starts: π_{t+1}, or π̂_{t+1}. The paper does not say."""

    def __post_init__(self) -> None:
        for value in schedule_values("momentum.alpha", self.alpha):
            within("momentum.alpha", value, 0, 10)

    @property
    def active(self) -> bool:
        """Whether any iteration has momentum."""
        return any(self.alpha) if isinstance(self.alpha, tuple) else self.alpha != 0


@config
class EvaluateConfig:
    """What is measured after each iteration, on held-out prompts."""

    k: int = 2
    """Responses a prompt."""
    temperature: float = 1.0
    """Of those responses; 0 is greedy."""
    kl: bool = True
    """Estimate KL(π̂_t ‖ π_0) a response, in nats, from one sample a prompt; needs temperature 1."""
    level: float = 0.95
    """Of the bootstrap intervals, which resample base questions."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness for the first and the last policy; needs the extra "eval"."""
    lm_eval_path: str = ""
    """Folder of own task files for it."""
    lm_eval_limit: int = 0
    """Examples of each such task; 0: all."""

    def __post_init__(self) -> None:
        positive("evaluate.k", self.k)
        within("evaluate.lm_eval_limit", self.lm_eval_limit, 0, math.inf)
        if self.temperature < 0:
            raise ValueError(f"evaluate.temperature must not be negative, not {self.temperature}")
        if not 0 < self.level < 1:
            raise ValueError(f"evaluate.level is a probability, not {self.level}")


@config
class Recipe:
    """A self-play alignment run."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["alignment"] = "alignment"
    """Kind of run."""
    algorithm: str = "sppo"
    """spin, sppo, sppo-single, sppo-hard, dpo, ipo, sft, or a plug-in's name."""
    iterations: int = 3
    """Rounds of generating, judging and training."""
    seed: int = 0
    """Of everything random: prompts, samples, order of pairs, intervals."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    generate: GenerateConfig = GenerateConfig()
    parity: ParityConfig = ParityConfig()
    judge: JudgeConfig = JudgeConfig()
    pair: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    momentum: MomentumConfig = MomentumConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        for name, count in (
            ("iterations", self.iterations),
            ("prompts.train", self.prompts.train),
            ("prompts.heldout", self.prompts.heldout),
        ):
            positive(name, count)
        if self.prompts.fresh and self.prompts.train < self.iterations:
            raise ValueError(
                f"prompts.train = {self.prompts.train} leaves some of the {self.iterations} "
                "iterations without a prompt; raise it, or set prompts.fresh = false"
            )
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name becomes a folder: no slash, no leading dot, not {self.name!r}")
        chosen = algorithm(self.algorithm)
        self._check_pairs(chosen)
        folded = self.momentum.realised == "reference" and self.momentum.active
        if folded and not chosen.folds:
            raise ValueError(
                f"momentum.realised = 'reference' is not exact for {self.algorithm} (its loss does "
                "not cancel the normaliser); use 'weights'"
            )

    def _check_pairs(self, chosen: Algorithm) -> None:
        rule = self.pair.rule or chosen.rule
        if (rule == REAL_GENERATED) == chosen.needs_judge:
            raise ValueError(
                f"pair.rule = {rule!r} does not fit {self.algorithm}, which uses {chosen.rule!r}"
            )
        if rule == "all" and not chosen.per_response:
            raise ValueError(
                f"pair.rule = 'all' gives each response its own win probability, which "
                f"{self.algorithm} does not read; use 'best-worst' or 'random-pair'"
            )
        if rule != REAL_GENERATED:
            pair_rule(rule)
