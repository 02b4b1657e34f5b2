"""Pipelines of diffusers that can be trained: what each makes of a caption, how its network is
called.

A pipeline that is not in `LAYOUTS` is refused by its name. To add one: how its `encode_prompt`
answers, and the arguments of its network.

Shapes: B images, C channels, H and W of latents, L tokens of a caption, D their features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.launch.errors import SparringError

Conditions = dict[str, Tensor]
"""`caption` (B, L, D) and `size` (B, 6), see `Encoded.size`; SDXL and Stable Diffusion 3 also
`pooled` (B, P), PixArt `mask` (B, L)."""

Encoder = Callable[[Any, list[str]], tuple[Conditions, Conditions]]
Call = Callable[[Any, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Layout:
    """One kind of pipeline."""

    denoiser: str
    """Component that is trained."""
    encode: Encoder
    """``encode(pipeline, captions)``: conditions of captions, and those that guidance takes for no
    caption."""
    call: Call
    """``call(network, x_BCHW, t_B, conditions)``: the prediction (B, C, H, W)."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Options of the pipeline's own call, so that it reads captions as `encode` does."""


def _encoded(pipeline: Any, captions: list[str], **options: Any) -> tuple[Tensor, ...]:
    found = pipeline.encode_prompt(
        prompt=captions,
        device=pipeline.text_encoder.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        **options,
    )
    return tuple(tensor.float().cpu() for tensor in found)


def _plain(pipeline: Any, captions: list[str]) -> tuple[Conditions, Conditions]:
    caption, none = _encoded(pipeline, captions)
    return {"caption": caption}, {"caption": none}


def _pooled(**options: Any) -> Encoder:
    def encode(pipeline: Any, captions: list[str]) -> tuple[Conditions, Conditions]:
        caption, none, pooled, none_pooled = _encoded(pipeline, captions, **options)
        return {"caption": caption, "pooled": pooled}, {"caption": none, "pooled": none_pooled}

    return encode


def _masked(pipeline: Any, captions: list[str]) -> tuple[Conditions, Conditions]:
    caption, mask, none, none_mask = _encoded(pipeline, captions)
    return {"caption": caption, "mask": mask}, {"caption": none, "mask": none_mask}


def _unet(network: Any, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    return network(x, t, encoder_hidden_states=given["caption"]).sample  # type: ignore[no-any-return]


def _unet_with_sizes(network: Any, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    also = {"text_embeds": given["pooled"], "time_ids": given["size"]}
    return network(  # type: ignore[no-any-return]
        x, t, encoder_hidden_states=given["caption"], added_cond_kwargs=also
    ).sample


def _joint(network: Any, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    return network(  # type: ignore[no-any-return]
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=given["caption"],
        pooled_projections=given["pooled"],
    ).sample


def _cross(network: Any, x: Tensor, t: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    also: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if network.use_additional_conditions:  # PixArt-alpha at 1024 pixels
        side = given["size"][:, 4:]
        also = {"resolution": side, "aspect_ratio": side[:, :1] / side[:, 1:]}
    made = network(
        x,
        encoder_hidden_states=given["caption"],
        encoder_attention_mask=given["mask"],
        timestep=t,
        added_cond_kwargs=also,
    ).sample
    return made[:, : x.shape[1]]  # type: ignore[no-any-return]  # the rest is a variance


_PIXART = Layout("transformer", _masked, _cross,
                 {"clean_caption": False, "use_resolution_binning": False})  # fmt: skip
LAYOUTS = {
    "StableDiffusionPipeline": Layout("unet", _plain, _unet),
    "StableDiffusionXLPipeline": Layout("unet", _pooled(), _unet_with_sizes),
    "StableDiffusion3Pipeline": Layout(
        "transformer", _pooled(prompt_2=None, prompt_3=None), _joint
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": _PIXART,
}


def layout_of(pipeline: Any) -> Layout:
    """The layout of a pipeline, or of a folder that holds one.

    Raises:
        SparringError: a kind of pipeline that is not in `LAYOUTS`, or no pipeline.
    """
    name = type(pipeline).__name__
    if isinstance(pipeline, Path):
        index = pipeline / "model_index.json"
        if not index.is_file():
            raise SparringError(f"{pipeline} is no pipeline of diffusers: no {index.name}")
        name = str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    if name not in LAYOUTS:
        raise SparringError(f"{name} cannot be trained here; {', '.join(LAYOUTS)} can")
    return LAYOUTS[name]


@torch.no_grad()
def encode_captions(pipeline: Any, captions: Sequence[str], batch: int) -> Conditions:
    """Conditions of no caption, then of all captions, in float32 on the CPU.

    "No caption" is what the pipeline's guidance takes: SDXL's zeros, the empty text elsewhere.

    Args:
        batch: captions a forward pass.
    """
    encode = layout_of(pipeline).encode
    texts = [list(captions[start : start + batch]) for start in range(0, len(captions), batch)]
    parts = [encode(pipeline, [""])[1], *(encode(pipeline, text)[0] for text in texts)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
