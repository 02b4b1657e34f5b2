"""A small text-to-image pipeline in the layout of Stable Diffusion, with random weights.

Its autoencoder hands pixels through, so that the network works on them; all the rest is Stable
Diffusion's own classes, which diffusers loads like any other pipeline.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

_LENGTH = 12  # tokens of a caption
_VOCABULARY = 4096  # tokens at most
_END = "</w>"  # of a word
_WORDS = re.compile(r"[^\W\d_]+|\d|_|[^\w\s]+")  # as CLIP's tokenizer splits
_SCALE = 0.3  # of latents: the decoder's tanh(z/3)*3 is a straight line there, to 1/300


def passthrough_vae(channels: int) -> Any:
    """An AutoencoderTiny whose decode(encode(x)) is x, to less than a grey level.

    Latents are 0.3 x, and `scaling_factor` makes them x again for the network.
    """
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        encoder_block_out_channels=(channels,),
        decoder_block_out_channels=(channels,),
        num_encoder_blocks=(0,),
        num_decoder_blocks=(0,),
        scaling_factor=1 / _SCALE,
    )

    def linear(convolution: Any, weight: float, bias: float) -> None:
        with torch.no_grad():
            convolution.weight.zero_()
            for c in range(channels):
                convolution.weight[c, c, 1, 1] = weight
            convolution.bias.fill_(bias)

    # The class maps x to (x + 1) / 2 before its encoder, and back after its decoder.
    into, out = vae.encoder.layers, vae.decoder.layers
    linear(into[0], 1.0, 0.0)
    linear(into[1], 2 * _SCALE, -_SCALE)
    linear(out[0], 1 / (2 * _SCALE), 0.5)
    linear(out[-1], 1.0, 0.0)
    return vae


def tokenizer(captions: Iterable[str]) -> Any:
    """A CLIP tokenizer whose vocabulary holds the captions' words; the same for the same words."""
    from transformers import CLIPTokenizer

    words = Counter(word for caption in captions for word in _WORDS.findall(caption.lower()))
    letters = sorted({letter for word in words for letter in word})
    known = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + _END for letter in letters)]
    merges = _merges(words, _VOCABULARY - len(known))
    tokens = dict.fromkeys([*known, *map("".join, merges)])
    vocabulary = {token: n for n, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=_LENGTH)


def _merges(words: Mapping[str, int], most: int) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent first, and by the alphabet where several are.

    The trainer of the tokenizers library takes equals in an order that changes from call to call.
    """
    split = {word: [*word[:-1], word[-1] + _END] for word in words}
    found: list[tuple[str, str]] = []
    while len(found) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        for parts in split.values():
            for n in range(len(parts) - 1, 0, -1):
                if n < len(parts) and (parts[n - 1], parts[n]) == best:
                    parts[n - 1 : n + 1] = ["".join(best)]
    return found


def _tell_words_apart(text_encoder: Any) -> None:
    """Make a random text encoder's features depend on words more than on places.

    As it is initialised all words look alike after the last normalisation, and a small network
    would need thousands of steps to find what a caption says.
    """
    embeddings = getattr(text_encoder, "text_model", text_encoder).embeddings
    with torch.no_grad():
        embeddings.token_embedding.weight.normal_(std=1.0)
        embeddings.position_embedding.weight.normal_(std=0.1)
        for name, parameter in text_encoder.named_parameters():
            if name.endswith(("v_proj.weight", "out_proj.weight")):
                # Each layer then mixes a caption's words into the tokens after them.
                parameter.normal_(std=parameter.shape[1] ** -0.5)


def small_pipeline(
    captions: Iterable[str], *, size: int, channels: int, widths: Sequence[int], seed: int
) -> Any:
    """A StableDiffusionPipeline for images of a size and captions of some words.

    The text encoder stays random: different captions have different features, and that is all
    that the network's attention needs.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    words = tokenizer(captions)
    levels = len(widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=_LENGTH,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        _tell_words_apart(text_encoder)
        unet = UNet2DConditionModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, steps_offset=1, set_alpha_to_one=False
    )
    return StableDiffusionPipeline(
        vae=passthrough_vae(channels),
        text_encoder=text_encoder,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
