"""Tiny pipelines in the layouts of Stable Diffusion, SDXL and Stable Diffusion 3, and images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparring.diffusion.spin.small import tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}
WORDS = [f"a {name} square on white" for name in COLOURS]


def squares(count: int, seed: int = 0) -> list[tuple[str, str, Image.Image]]:
    """Images of a coloured square somewhere, with captions."""
    rng = np.random.default_rng(seed)
    found = []
    for n in range(count):
        name, colour = list(COLOURS.items())[n % 3]
        image = Image.new("RGB", (20, 16), "white")
        x, y = (int(v) for v in rng.integers(0, 8, size=2))
        image.paste(colour, (x, y, x + 8, y + 8))
        found.append((f"s{n:03d}", f"a {name} square on white", image))
    return found


def _clip(kind: str, hidden: int, seed: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer(WORDS)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=hidden,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(seed)
    return (CLIPTextModelWithProjection if kind == "projected" else CLIPTextModel)(config)


def _vae(channels: int = 4, shift: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=shift,
        sample_size=16,
    )


def _unet(cross: int, **options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def stable_diffusion(prediction: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip("plain", 16, 3),
        tokenizer=tokenizer(WORDS),
        unet=_unet(16),
        scheduler=DDIMScheduler(
            prediction_type=prediction, clip_sample=False, steps_offset=1, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip("plain", 16, 3),
        text_encoder_2=_clip("projected", 16, 4),
        tokenizer=tokenizer(WORDS),
        tokenizer_2=tokenizer(WORDS),
        unet=_unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(5)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(shift=0.06),
        text_encoder=_clip("projected", 16, 3),
        text_encoder_2=_clip("projected", 16, 4),
        text_encoder_3=None,
        tokenizer=tokenizer(WORDS),
        tokenizer_2=tokenizer(WORDS),
        tokenizer_3=None,
    )


LAYOUTS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sd-v": lambda: stable_diffusion("v_prediction"),
    "sdxl": sdxl,
    "sd3": stable_diffusion_3,
}


class Redness:
    """A scorer of one's own: the mean of red less that of blue."""

    name = "redness"

    def score(self, images: Any, prompts: Any) -> list[float]:
        arrays = [np.asarray(image.convert("RGB"), dtype=float) for image in images]
        return [float(a[..., 0].mean() - a[..., 2].mean()) for a in arrays]


def redness(real: Any) -> Redness:
    return Redness()


def clip_folder(folder: Path) -> Path:
    """A random CLIP with processor, as PickScore is published."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    words = tokenizer(WORDS)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = {**size, "num_attention_heads": 2, "vocab_size": len(words), "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 16}  # fmt: skip
    vision = {**size, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    CLIPProcessor(image_processor=processor, tokenizer=words).save_pretrained(folder)
    return folder
