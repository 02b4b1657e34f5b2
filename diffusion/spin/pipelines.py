"""Text-to-image pipelines of diffusers: loading, checking, the network, latents, saving.

Shapes: B images, C channels, H and W of latents.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from sparring.diffusion.spin.layouts import Layout, layout_of
from sparring.diffusion.spin.process import Process
from sparring.launch import artifacts
from sparring.launch.errors import SparringError

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


def load(
    path: Path | str,
    *,
    dtype: str = "float32",
    scheduler: str = "own",
    network: bool = True,
    revision: str | None = None,
) -> Any:
    """A pipeline without progress bars or safety checker.

    Args:
        path: folder, or hub id.
        dtype: of the weights.
        scheduler: a name from `SCHEDULERS`, or "own".
        network: False leaves the trained network out; the path must be a folder then.
        revision: branch, tag or commit of a hub id.

    Raises:
        SparringError: nothing that diffusers can load, a kind of pipeline that is not in `LAYOUTS`,
            or a scheduler that cannot sample with this model.
    """
    # They warn of a missing torchvision, and of every component that another class could hold.
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    import diffusers

    left_out = _left_out(Path(path))
    trained = "" if network else layout_of(Path(path)).denoiser
    if trained:
        left_out[trained] = None
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            str(path), dtype=getattr(torch, dtype), revision=revision, **left_out
        )
    except Exception as error:  # diffusers passes on what any component raises
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SparringError(f"{path} is no pipeline that diffusers can load: {first}") from error
    layout_of(pipeline)
    if trained:  # Stable Diffusion 3 without its T5 still asks the network's settings for a width
        settings = json.loads((Path(path) / trained / "config.json").read_text())
        setattr(pipeline, trained, SimpleNamespace(config=SimpleNamespace(**settings)))
    pipeline.set_progress_bar_config(disable=True)
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None  # it blackens images, which would then be trained on
    if scheduler != "own":
        pipeline.scheduler = _other_scheduler(pipeline.scheduler, scheduler)
    return pipeline


def _left_out(folder: Path) -> dict[str, Any]:
    """Components that a folder was saved without; some pipelines want to hear it again."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    return {
        name: None for name, kind in json.loads(index.read_text()).items() if kind == [None] * 2
    }


def _other_scheduler(own: Any, name: str) -> Any:
    import diffusers

    if Process.of(own).target == "flow":
        raise SparringError(
            f"generate.scheduler = {name!r} is of another process than this model's, a flow; "
            'generate.scheduler = "own" takes the model\'s'
        )
    # DDIM and DDPM clip x_0 to [-1, 1] unless told not to, and latents are larger than that.
    quiet = {"clip_sample": False, "thresholding": False}
    return getattr(diffusers, SCHEDULERS[name]).from_config({**quiet, **own.config})


def check(pipeline: Any) -> None:
    """Refuse a pipeline that could not be trained, before hours are spent on its images.

    Raises:
        SparringError: the scheduler's process is not known, the autoencoder takes neither grey nor
            colour, or the network takes other latents than it makes (an inpainting model).
    """
    Process.of(pipeline.scheduler)
    image_channels(pipeline.vae)
    network = getattr(pipeline, layout_of(pipeline).denoiser)
    taken, made = int(network.config.in_channels), int(pipeline.vae.config.latent_channels)
    if taken != made:
        raise SparringError(
            f"the network takes {taken} channels and the autoencoder makes {made}; only plain "
            "text-to-image models can be trained, not inpainting or depth models"
        )


def image_channels(vae: Any) -> int:
    """Channels of an autoencoder's images.

    Raises:
        SparringError: neither 1 nor 3.
    """
    channels = int(vae.config.in_channels)
    if channels not in (1, 3):
        raise SparringError(f"the autoencoder takes images of {channels} channels, not 1 or 3")
    return channels


@contextmanager
def told_sizes(pipeline: Any, sizes: Sequence[tuple[int, ...]]) -> Iterator[None]:
    """Sampling in which SDXL's network is told each image's own size and crop.

    The pipeline's call takes one size for all images of a batch.

    Args:
        sizes: an image each, see `Encoded.size`.
    """

    def tell(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        also = named.get("added_cond_kwargs") or {}
        if "time_ids" in also:
            ids = torch.tensor(sizes).to(also["time_ids"])
            passes = len(also["time_ids"]) // len(ids)  # two with guidance
            named = {**named, "added_cond_kwargs": {**also, "time_ids": ids.repeat(passes, 1)}}
        return args, named

    network = getattr(pipeline, layout_of(pipeline).denoiser)
    hook = network.register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def to_latents(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """What the network works on: the mean of the encoder's law, shifted and scaled."""
    if vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # SDXL's overflows, and diffusers upcasts it for decoding too
    encoded = vae.encode(pixels_BCHW.to(device=vae.device, dtype=vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scaled: Tensor = (latents - shift) * vae.config.scaling_factor
    return scaled.float()


class Denoiser(nn.Module):
    """A pipeline's network with one calling convention: `network(x_t, t, conditions)`.

    Wrapping makes a step one forward call, which is what DeepSpeed hooks.
    """

    def __init__(self, network: Any, layout: Layout) -> None:
        super().__init__()
        self.model = network
        self._call = layout.call

    @staticmethod
    def load(path: Path) -> Denoiser:
        """The network of a pipeline's folder alone, in float32."""
        return Denoiser(_network(path), layout_of(path))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The prediction, (B, C, H, W).

        Args:
            x_BCHW: noisy latents.
            t_B: time steps in the network's units (0 to 999, or 1000 sigma of a flow).
            conditions: see `Conditions`.
        """
        return self._call(self.model, x_BCHW, t_B, conditions)


def _network(path: Path) -> Any:
    from diffusers.models import AutoModel

    return AutoModel.from_pretrained(
        str(path), subfolder=layout_of(path).denoiser, dtype=torch.float32
    )


def save_with_network(state: Mapping[str, Tensor], like: Path, output: Path) -> None:
    """Write a pipeline's folder that is `like` with other weights of the network."""
    name = layout_of(like).denoiser
    network = _network(like)
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
    from diffusers import DiffusionPipeline

    try:
        # The files that a pipeline loads, not all variants that its repository has.
        return Path(DiffusionPipeline.download(name))
    except (OSError, ValueError) as error:
        raise SparringError(
            f"{name!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from None
