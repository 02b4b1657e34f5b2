"""Transformers that predict clean text from noised text, in Hugging Face's format.

With a source: an encoder of it, a decoder that sees all of the noised text (no causal mask) and
attends to the source, and a length head; places are learnt. Without: ModernBERT's encoder of the
noised text, with rotary places.

Shape legend: B rows, N target positions, S source positions, H width, K target symbols, L lengths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ModernBertConfig, ModernBertModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from sparring.diffusion.dndm.config import ProcessConfig, SamplerConfig, TextModelConfig
from sparring.diffusion.dndm.noise import Noise, absorbing, uniform, unigram
from sparring.diffusion.dndm.schedules import Schedule, as_schedule
from sparring.diffusion.dndm.vocabulary import MASK, PAD, SPECIAL, Vocabularies
from sparring.launch.config import plain
from sparring.launch.errors import SparringError
from sparring.launch.weights import read_network


class TextDenoiserConfig(PreTrainedConfig):  # type: ignore[misc]
    """What `TextDenoiser` is, and what noise it was trained to undo."""

    model_type = "sparring-text-denoiser"

    def __init__(
        self,
        vocab_size: int = 8,
        source_vocab_size: int = 0,
        max_target: int = 64,
        max_source: int = 64,
        network: dict[str, Any] | None = None,
        process: dict[str, Any] | None = None,
        symbol_counts: Sequence[int] = (),
        vocabulary_digest: str = "",
        **kwargs: Any,
    ) -> None:
        """
        Args:
            vocab_size: K, special symbols among them.
            source_vocab_size: of the source; 0 if there is none.
            max_target, max_source: longest sequences.
            network: `TextModelConfig` as a table.
            process: `ProcessConfig` as a table.
            symbol_counts: of target symbols in training, for unigram noise.
            vocabulary_digest: of the vocabularies that it was trained with.
            kwargs: transformers' own.
        """
        self.vocab_size, self.source_vocab_size = vocab_size, source_vocab_size
        self.max_target, self.max_source = max_target, max_source
        self.network = network or plain(TextModelConfig())
        self.process = process or plain(ProcessConfig())
        self.symbol_counts = list(symbol_counts)
        self.vocabulary_digest = vocabulary_digest
        kwargs.setdefault("pad_token_id", PAD)
        super().__init__(**kwargs)

    @property
    def shape(self) -> TextModelConfig:
        """`network`, as what it is."""
        return TextModelConfig(**self.network)

    @property
    def diffusion(self) -> ProcessConfig:
        """`process`, as what it is."""
        return ProcessConfig(**{**self.process, "beta": tuple(self.process["beta"])})

    @property
    def steps(self) -> float:
        """T; infinity for continuous time."""
        return self.diffusion.steps or math.inf

    @property
    def schedule(self) -> Schedule:
        """alpha."""
        return named_schedule(self.diffusion.schedule, self.diffusion.beta)

    @property
    def noise(self) -> Noise:
        """q_noise: never padding or another special symbol, but for the mask."""
        kind = self.diffusion.noise
        if kind == "absorbing":
            return absorbing(self.vocab_size, MASK)
        if kind == "uniform":
            return uniform(self.vocab_size, range(len(SPECIAL), self.vocab_size))
        counts = torch.tensor(self.symbol_counts, dtype=torch.float64)
        counts[: len(SPECIAL)] = 0
        return unigram(counts)


def named_schedule(name: str, beta: tuple[float, float]) -> Schedule:
    """A schedule by its name in a recipe."""
    return as_schedule(name, *(beta if name == "beta" else ()))


def sampling_schedule(settings: SamplerConfig, config: TextDenoiserConfig) -> Schedule:
    """Of a sampler's transition times: its own, or that of the network's training."""
    if settings.schedule:
        return named_schedule(settings.schedule, settings.beta)
    return config.schedule


@dataclass
class Denoised(ModelOutput):  # type: ignore[misc]
    """What `TextDenoiser` returns."""

    logits: Tensor | None = None
    """(B, N, K) of x_0."""
    length_logits: Tensor | None = None
    """(B, L) of target length - source length + offsets; None without a source."""


class EncoderLayer(GradientCheckpointingLayer, nn.TransformerEncoderLayer):  # type: ignore[misc]
    """torch's, whose activations can be computed again in the backward pass."""


class DecoderLayer(GradientCheckpointingLayer, nn.TransformerDecoderLayer):  # type: ignore[misc]
    """torch's, whose activations can be computed again in the backward pass."""


def rotary_encoder(shape: TextModelConfig, longest: int) -> ModernBertModel:
    """ModernBERT's layers (arXiv 2412.13663) for embedded symbols.

    A network of one sequence must learn what stands beside what before it learns anything else.
    With learnt places it stays at the frequencies of single symbols for hundreds of steps; with
    rotary ones, and every other layer looking at a window only, it does not.

    Args:
        shape: of the network.
        longest: N at most.
    """
    kinds = [
        "sliding_attention" if shape.window and not i % 2 else "full_attention"
        for i in range(shape.layers)
    ]
    model = ModernBertModel(
        ModernBertConfig(
            vocab_size=1,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.feedforward,
            layer_types=kinds,
            local_attention=2 * shape.window,
            max_position_embeddings=longest,
            embedding_dropout=shape.dropout,
            attention_dropout=shape.dropout,
            mlp_dropout=shape.dropout,
            **dict.fromkeys(
                (f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")), None
            ),
        )
    )
    # Symbols are embedded by their owner, with the time and the mask of noise.
    del model.embeddings.tok_embeddings
    return model


class TextDenoiser(PreTrainedModel):  # type: ignore[misc]
    """p_theta(x_0 | x_t, t, source)."""

    config_class = TextDenoiserConfig
    base_model_prefix = "denoiser"
    supports_gradient_checkpointing = True

    def __init__(self, config: TextDenoiserConfig) -> None:
        super().__init__(config)
        shape = config.shape
        width = shape.hidden
        self.tokens = nn.Embedding(config.vocab_size, width)
        if config.source_vocab_size:  # before the others: a seed's network follows from the order
            self.places = nn.Embedding(config.max_target, width)
        if shape.time:
            self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        if shape.schedule_conditioning:
            self.noisy = nn.Embedding(2, width)
        self.decoder: nn.Module
        if config.source_vocab_size:
            layer: dict[str, Any] = {
                "d_model": width,
                "nhead": shape.heads,
                "dim_feedforward": shape.feedforward,
                "dropout": shape.dropout,
                "activation": "gelu",
                "batch_first": True,
                "norm_first": True,
                # A key's bias has no gradient but rounding, which Adam would make steps of.
                "bias": False,
            }
            self.source_tokens = nn.Embedding(config.source_vocab_size, width)
            self.source_places = nn.Embedding(config.max_source, width)
            self.encoder = nn.TransformerEncoder(
                EncoderLayer(**layer),
                shape.encoder_layers,
                norm=nn.LayerNorm(width),
                enable_nested_tensor=False,
            )
            self.decoder = nn.TransformerDecoder(
                DecoderLayer(**layer), shape.layers, norm=nn.LayerNorm(width)
            )
            self.lengths = nn.Linear(width, 2 * shape.offsets + 1)
        else:
            self.decoder = rotary_encoder(shape, config.max_target)
        self.head = nn.Linear(width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal embeddings; Xavier matrices, layer by layer (torch copies one layer's draw).

        With the usual 0.02 for embeddings, places drown in the residual stream, and aligning two
        sequences by them takes many times as many steps.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode(self, source_BS: Tensor) -> Tensor:
        """(B, S, H) what the decoder attends to."""
        places = torch.arange(source_BS.shape[1], device=source_BS.device)
        embedded = self.source_tokens(source_BS) + self.source_places(places)
        return self.encoder(embedded, src_key_padding_mask=source_BS == PAD)  # type: ignore[no-any-return]

    def length_logits(self, memory_BSH: Tensor, source_BS: Tensor) -> Tensor:
        """(B, L)"""
        real = (source_BS != PAD)[..., None].to(memory_BSH.dtype)
        logits: Tensor = self.lengths((memory_BSH * real).sum(1) / real.sum(1))
        return logits

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        source: Tensor | None = None,
        memory: Tensor | None = None,
        noisy: Tensor | None = None,
    ) -> Denoised:
        """
        Args:
            x: (B, N) x_t, padded at the right.
            t: (B,) real times in (0, 1].
            source: (B, S), where the network has one; or fewer rows, which x repeats.
            memory: (B, S, H) `encode(source)` if known; else it is computed.
            noisy: (B, N) bool, which tokens are noise, if it was trained to be told.

        Raises:
            ValueError: it has a source and was given none, or the like for `noisy`.
        """
        shape = self.config.shape
        if (noisy is not None) != shape.schedule_conditioning:
            raise ValueError(
                "the network was trained with"
                + ("" if shape.schedule_conditioning else "out")
                + " the mask of noisy tokens (model.schedule_conditioning)"
            )
        if (source is not None) != bool(self.config.source_vocab_size):
            raise ValueError("the network needs a source exactly if it was trained with one")
        h = self.tokens(x)
        if shape.time:
            waves = self._waves(t, shape.hidden).to(h.dtype)
            h = h + self.time(waves)[:, None]
        if noisy is not None:
            h = h + self.noisy(noisy.long())
        if source is None:
            seen = self.decoder(inputs_embeds=h, attention_mask=(x != PAD).long())
            return Denoised(logits=self.head(seen.last_hidden_state))
        h = h + self.places(torch.arange(x.shape[1], device=x.device))
        if memory is None:
            memory = self.encode(source)
        lengths = self.length_logits(memory, source)
        times = len(x) // len(source)  # coupled times share their source
        h = self.decoder(
            h,
            memory.repeat(times, 1, 1),
            tgt_key_padding_mask=x == PAD,
            memory_key_padding_mask=(source == PAD).repeat(times, 1),
        )
        return Denoised(logits=self.head(h), length_logits=lengths)

    @staticmethod
    def _waves(t_B: Tensor, width: int) -> Tensor:
        """(B, H) sines and cosines of 1000 t, with wavelengths from 2 pi to 10^4 times that."""
        half = width // 2
        rate = torch.exp(
            -math.log(1e4) * torch.arange(half, device=t_B.device, dtype=torch.float32) / half
        )
        angle = 1000 * t_B.float()[:, None] * rate
        return torch.cat([angle.sin(), angle.cos()], 1)

    @property
    def denoiser(self) -> Any:
        """What samplers take."""

        def call(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            logits: Tensor = self(x, t, **cond).logits
            return logits

        return call


def load(folder: Path, vocabularies: Vocabularies | None = None) -> TextDenoiser:
    """A trained network, in evaluation mode.

    Raises:
        SparringError: the folder holds none, or one of another vocabulary.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SparringError(f"{folder} is no network: it has no config.json")
    config = TextDenoiserConfig.from_pretrained(str(folder))
    if config.model_type != TextDenoiserConfig.model_type or not config.vocabulary_digest:
        raise SparringError(f"{path} is not of a network made by train-text-diffusion")
    if vocabularies is not None and vocabularies.digest != config.vocabulary_digest:
        raise SparringError(
            f"{folder} was trained with another vocabulary ({config.vocab_size} symbols, digest "
            f"{config.vocabulary_digest}) than the data has ({len(vocabularies.target)} symbols, "
            f"digest {vocabularies.digest}); use the text-data that it was trained on"
        )
    return read_network(TextDenoiser, folder, config=config)  # type: ignore[no-any-return]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(B, N) integer, padded at the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
