"""The recipe of a language-model alignment run. Imports no torch.

Values that may change from one iteration to the next take a number or a list; a list's last entry
stays for the iterations after it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from sparring.launch.config import Config, at, config
from sparring.launch.stages import LaunchConfig

Schedule = float | tuple[float, ...]


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, not {value}")


@config
class ModelConfig:
    """The policy to start from."""

    path: str = "smollm2"
    """A folder in the Hugging Face layout, a hub id, or "smollm2": SmolLM2-135M-Instruct."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of generation and log-probabilities. Weights are always stored as float32."""


@config
class PromptsConfig:
    """Where prompts come from."""

    source: str = "constraints"
    """"constraints" (questions with a verifiable constraint), "chitchat" (human conversations), a
    JSONL or parquet file, or the id of a data set on the hub."""
    train: int = 300
    """Training prompts in all."""
    heldout: int = 160
    """Prompts that no iteration trains on; none of their base questions is trained on either."""
    fresh: bool = True
    """Give each iteration its own share of the prompts (SPPO, APO), or all to each (SPIN)."""
    max_tokens: int = 512
    """Longest prompt in tokens; longer ones are an error, not cut."""


@config
class GenerateConfig:
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
    template: Literal["chat", "instruction"] = "chat"
    """The model's chat template, or SPIN's "### Instruction:" text. Training sees the same ids."""
    chunk: int = 64
    """Prompts a shard. Shards, not ranks, decide which prompts share a batch, so that results do
    not depend on the number of ranks."""
    max_batch: int = 128
    """Responses that the engine decodes at once."""
    memory: float = 0.0
    """vLLM's key-value cache: GiB on a CPU (0: 2), share of the GPU's memory on CUDA (0: 0.9)."""

    def __post_init__(self) -> None:
        _positive("generate.k", self.k)
        _positive("generate.max_new_tokens", self.max_new_tokens)
        _positive("generate.top_p", self.top_p)
        _positive("generate.chunk", self.chunk)
        if self.temperature < 0:
            raise ValueError(f"generate.temperature must not be negative, not {self.temperature}")


@config
class JudgeConfig:
    """Who says which response is better."""

    name: str = "verifier"
    """"verifier" (rules, then relevance), "pairrm", "reward-model", or a plug-in's name."""
    path: str = ""
    """Folder or hub id of the judge's weights, for judges that have some."""
    options: dict[str, str | bool | int | float] = field(default_factory=dict)
    """Settings of the judge by name."""
    chunk: int = 64
    """Prompts a shard."""


@config
class PairConfig:
    """How judged responses become training pairs."""

    rule: Literal["", "best-worst", "real-generated", "random"] = ""
    """Empty: the algorithm's own. "random" is the control: best and worst, labelled by a coin."""
    convention: Literal["pairwise", "pairwise-one-order", "mean-probability", "aggregated"] = (
        "pairwise"
    )
    """How judge logits become win probabilities; "aggregated" is the SPPO repository's."""
    min_margin: float = 0.0
    """Drop pairs whose two win probabilities differ by no more than this."""
    mix_previous: bool | None = None
    """Train on the previous iteration's pairs too (SPIN); default: as the algorithm does."""
    max_response_tokens: int = 256
    """Where a given (human) response is cut, for real-generated pairs."""


@config
class TrainConfig:
    """One iteration's training."""

    beta: Schedule = 1e-3
    """β = 1/η: DPO's and IPO's β, SPIN's λ, SPPO's 1/η. SPPO's paper: η = 1e3."""
    link: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    """SPIN's ℓ."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """The papers use RMSprop."""
    lr: Schedule = 5e-7
    """Peak learning rate. The papers' 5e-7 is for 7B models; 2e-5 suits SmolLM2-135M."""
    beta1: float = 0.9
    beta2: float = 0.95
    """AdamW's second moment; RMSprop's smoothing."""
    weight_decay: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.1
    """Share of the schedule over which the learning rate rises from 0."""
    epochs: Schedule = 1
    """Passes over the pairs."""
    schedule_epochs: float = 0
    """Passes the schedule is laid out for; 0: `epochs`. SPPO's paper: 18, stopping after 1."""
    batch: int = 64
    """Pairs an optimizer step, over all ranks."""
    micro_batch: int = 4
    """Pairs a rank's forward pass."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    max_length: int = 1024
    """Longest prompt and response in tokens; longer pairs are dropped and counted, not cut."""
    gradient_checkpointing: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the forward pass; weights and optimizer stay float32."""
    zero: int = -1
    """DeepSpeed ZeRO stage 0 to 3; -1: plain torch on one rank, stage 2 on several."""
    offload: bool = False
    """Keep the optimizer in host memory (ZeRO 2 and 3)."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. The result is merged."""
    lora_alpha: float = 16.0
    save_every: int = 50
    """Optimizer steps between checkpoints inside the epoch; 0: none."""
    logits_chunk: int = 1024
    """Response tokens whose logits are held at once."""

    def __post_init__(self) -> None:
        for name in ("batch", "micro_batch", "max_length", "logits_chunk"):
            _positive(f"train.{name}", getattr(self, name))
        for name in ("beta", "lr", "epochs"):
            value = getattr(self, name)
            for one in value if isinstance(value, tuple) else (value,):
                _positive(f"train.{name}", one)
        if not 0 <= self.warmup < 1:
            raise ValueError(f"train.warmup is a share from 0 to below 1, not {self.warmup}")
        if self.zero not in (-1, 0, 1, 2, 3):
            raise ValueError(f"train.zero is a ZeRO stage 0 to 3, or -1, not {self.zero}")
        if self.offload and self.zero not in (2, 3):
            raise ValueError("train.offload needs train.zero 2 or 3")


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


@config
class EvaluateConfig:
    """What is measured after each iteration, on held-out prompts."""

    k: int = 2
    """Responses a prompt."""
    temperature: float = 1.0
    kl: bool = True
    """Estimate KL(π̂_t ‖ π_0) a response, in nats."""
    level: float = 0.95
    """Of the bootstrap intervals, which resample base questions."""


@config
class Recipe:
    """A self-play alignment run."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["alignment"] = "alignment"
    algorithm: str = "sppo"
    """spin, sppo, sppo-single, sppo-hard, dpo, ipo, sft, or a plug-in's name."""
    iterations: int = 3
    seed: int = 0
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig = JudgeConfig()
    pair: PairConfig = PairConfig()
    train: TrainConfig = TrainConfig()
    momentum: MomentumConfig = MomentumConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        from sparring.alignment.algorithms import algorithm

        _positive("iterations", self.iterations)
        chosen = algorithm(self.algorithm)
        folded = self.momentum.realised == "reference" and self.momentum.alpha != 0
        if folded and not chosen.folds:
            raise ValueError(
                f"momentum.realised = 'reference' is not exact for {self.algorithm} (its loss does "
                "not cancel the normaliser); use 'weights'"
            )


def resolved(section: Config, iteration: int) -> Config:
    """A section with every schedule replaced by its value at an iteration (0-based)."""
    values = {
        f.name: at(getattr(section, f.name), iteration)
        for f in dataclasses.fields(section)  # type: ignore[arg-type]
    }
    return dataclasses.replace(section, **values)  # type: ignore[type-var]
