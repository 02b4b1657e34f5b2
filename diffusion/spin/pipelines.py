"""Text-to-image pipelines of diffusers: loading, captions as conditions, the network, saving.

Shapes: B images, C channels, H and W of latents, L tokens of a caption, D their features.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparring.launch import artifacts
from sparring.launch.errors import SparringError

Conditions = dict[str, Tensor]
"""`caption` (B, L, D); SDXL and Stable Diffusion 3 also `pooled` (B, P); SDXL `size` (B, 6)."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
DENOISERS = ("unet", "transformer")


def load(
    path: Path | str, *, dtype: str = "float32", scheduler: str = "own", **options: Any
) -> Any:
    """A pipeline without progress bars or safety checker.

    Args:
        path: folder, or hub id.
        dtype: of the weights.
        scheduler: a name from `SCHEDULERS`, or "own". A flow model's own is kept, since the others
            are of another process.
        options: for diffusers' `from_pretrained`: revision, or components to leave out (None).

    Raises:
        SparringError: nothing that diffusers can load, or no text-to-image pipeline.
    """
    # They warn of a missing torchvision, and of every component that another class could hold.
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    import diffusers

    options = _left_out(Path(path)) | options
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(path), dtype=getattr(torch, dtype), **options
        )
    except Exception as error:  # diffusers passes on what any component raises
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparringError(f"{path} is no pipeline that diffusers can load: {first}") from error
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it blackens images, which would then be trained on
    denoiser_name(pipeline)
    if scheduler != "own" and not is_flow(pipeline):
        kind = getattr(diffusers, SCHEDULERS[scheduler])
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline


def _left_out(folder: Path) -> dict[str, Any]:
    """Components that a folder was saved without; some pipelines want to hear it again."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    return {
        name: None for name, kind in json.loads(index.read_text()).items() if kind == [None] * 2
    }


def denoiser_name(pipeline: Any) -> str:
    """Name of the component that is trained: "unet" or "transformer"."""
    for name in DENOISERS:
        if getattr(pipeline, name, None) is not None and hasattr(pipeline, "encode_prompt"):
            return name
    raise SparringError(
        f"{type(pipeline).__name__} has no {' or '.join(DENOISERS)} that captions steer; "
        "text-to-image pipelines like Stable Diffusion, SDXL and Stable Diffusion 3 do"
    )


def is_flow(pipeline: Any) -> bool:
    """Whether the process is x_t = (1 - t) x_0 + t eps (Stable Diffusion 3 and its kin)."""
    return "FlowMatch" in type(pipeline.scheduler).__name__


@torch.no_grad()
def encode_captions(pipeline: Any, captions: Sequence[str]) -> Conditions:
    """Conditions of captions from the pipeline's own text encoders, float32 on the CPU."""
    options: dict[str, Any] = {"device": pipeline.text_encoder.device, "num_images_per_prompt": 1}
    if denoiser_name(pipeline) == "transformer":
        options |= {"prompt_2": None, "prompt_3": None}
    found = pipeline.encode_prompt(
        prompt=list(captions), do_classifier_free_guidance=False, **options
    )
    conditions = {"caption": found[0].float().cpu()}
    if len(found) == 4:  # caption, its negative, pooled, its negative
        conditions["pooled"] = found[2].float().cpu()
    return conditions


def needs_size(pipeline: Any) -> bool:
    """Whether the network is told the image's size and crop (SDXL's time ids)."""
    network = getattr(pipeline, denoiser_name(pipeline))
    return getattr(network.config, "addition_embed_type", None) == "text_time"


def longest_caption(pipeline: Any) -> int:
    """Tokens that the first text encoder reads, its own two included."""
    return int(pipeline.tokenizer.model_max_length)


@torch.no_grad()
def to_latents(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """What the network works on: the mean of the encoder's law, shifted and scaled."""
    encoded = vae.encode(pixels_BCHW.to(device=vae.device, dtype=vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = (latents - shift) * vae.config.scaling_factor
    return scaled.float()


class Denoiser(nn.Module):
    """A pipeline's network with one calling convention: `network(x_t, t, conditions)`.

    Wrapping makes a step one forward call, which is what DeepSpeed hooks.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.model = network
        self._is_unet = hasattr(network.config, "cross_attention_dim") and hasattr(
            network, "conv_in"
        )

    def forward(self, x_BCHW: Tensor, t_B: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The prediction, (B, C, H, W).

        Args:
            x_BCHW: noisy latents.
            t_B: time steps in the network's units (0 to 999, or 1000 sigma of a flow).
            conditions: see `Conditions`.
        """
        caption = conditions["caption"]
        if not self._is_unet:
            return self.model(  # type: ignore[no-any-return]
                hidden_states=x_BCHW,
                timestep=t_B,
                encoder_hidden_states=caption,
                pooled_projections=conditions["pooled"],
            ).sample
        extra: dict[str, Any] = {}
        if "pooled" in conditions:
            also = {"text_embeds": conditions["pooled"], "time_ids": conditions["size"]}
            extra["added_cond_kwargs"] = also
        return self.model(x_BCHW, t_B, encoder_hidden_states=caption, **extra).sample  # type: ignore[no-any-return]


def load_network(path: Path) -> Any:
    """The network of a pipeline's folder alone, in float32."""
    from diffusers.models import AutoModel

    for name in DENOISERS:
        if (path / name / "config.json").is_file():
            return AutoModel.from_pretrained(str(path), subfolder=name, dtype=torch.float32)
    raise SparringError(f"{path} has no {' or '.join(DENOISERS)} folder")


def save_with_network(state: Mapping[str, Tensor], like: Path, output: Path) -> None:
    """Write a pipeline's folder that is `like` with other weights of the network."""
    name = next(name for name in DENOISERS if (like / name).is_dir())
    network = load_network(like)
    network.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    network.save_pretrained(output / name)
    for path in like.iterdir():
        if path.name in (name, artifacts.MANIFEST, artifacts.WORK) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, output / path.name, dirs_exist_ok=True)
        elif path.name == "model_index.json":
            shutil.copyfile(path, output / path.name)


def locate(name: str) -> Path:
    """The folder of a hub id, fetched if need be.

    Raises:
        SparringError: no such folder, and the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise SparringError(
            f"{name!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from None
