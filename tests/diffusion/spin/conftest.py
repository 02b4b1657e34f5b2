"""Small image sets and pipelines that the tests of the image loop share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import LAYOUTS, WORDS, squares, stable_diffusion

from sparring.diffusion.spin.pictures import picture
from sparring.diffusion.spin.process import retargeted
from sparring.diffusion.spin.rows import Picture
from sparring.diffusion.spin.small import tokenizer
from sparring.launch.rows import write_rows


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of `images`: 12 training and 6 held-out pictures, 16 x 16."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, part in (("train", squares(12)), ("heldout", squares(6, seed=1))):
        rows = [picture(i, c, image, size=16, channels=3, crop="center") for i, c, image in part]
        write_rows(folder / f"{name}.parquet", Picture, rows)
    return folder


def pixart() -> Any:
    """A DiT with a T5, whose network predicts a variance too."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    words = tokenizer(WORDS)
    torch.manual_seed(6)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(T5Config(vocab_size=len(words), **sizes)),
        vae=stable_diffusion().vae,
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
        ),
        scheduler=DPMSolverMultistepScheduler(),
    )


def flow_unet() -> Any:
    """Stable Diffusion whose network predicts the flow."""
    pipeline = stable_diffusion()
    pipeline.scheduler = retargeted(pipeline.scheduler, "flow")
    return pipeline


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny pipeline by its layout's name, made once."""
    kinds = {**LAYOUTS, "pixart": pixart, "sd-flow": flow_unet}
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pipeline"
            kinds[name]().save_pretrained(made[name])
        return made[name]

    return make
