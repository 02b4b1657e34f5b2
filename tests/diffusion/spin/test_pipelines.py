"""Layouts of pipelines: what their networks are given, how they sample, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_images import WORDS, sdxl, stable_diffusion

from sparring.diffusion.spin import encode, generate, pipelines, start
from sparring.diffusion.spin.config import ImageModelConfig
from sparring.diffusion.spin.layouts import encode_captions, layout_of
from sparring.diffusion.spin.pictures import from_png
from sparring.diffusion.spin.rows import Sample
from sparring.diffusion.spin.stages import EncodeImagesStage, GenerateImagesStage
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows
from sparring.launch.stages import Context

SIZE = (20, 30, 1, 2, 16, 16)
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def context(folder: Path) -> Context:
    (folder / "work").mkdir(parents=True, exist_ok=True)
    return Context(World(), folder / "work", 0, lambda: False, lambda **_: None)


def made(model: Path, images: Path, out: Path, **options: Any) -> Path:
    """Images of generate-images."""
    config = GenerateImagesStage(**{"steps": 1, "guidance": 2.0, "batch": 4, **options})
    inputs = {"model": model, "images": images}
    generate.run(config, inputs, out, context(out))
    generate.finish(config, inputs, out, context(out))
    return out


def encoded(model: Path, images: Path, out: Path) -> Path:
    inputs = {"model": model, "images": images}
    encode.run(EncodeImagesStage(), inputs, out, context(out))
    encode.finish(EncodeImagesStage(), inputs, out, context(out))
    return out


@NUMPY
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sd-flow"])
def test_the_network_is_called_as_its_pipeline_calls_it(
    name: str, layout: Callable[[str], Path]
) -> None:
    """With and without a caption: what sampling sees is what training sees."""
    pipeline = pipelines.load(layout(name))
    network = getattr(pipeline, layout_of(pipeline).denoiser)
    seen: list[tuple[Any, ...]] = []

    def record(_: Any, args: Any, named: Any, output: Any) -> None:
        x, t = (args[0] if args else named["hidden_states"]), named.get("timestep")
        seen.append((x, args[1] if t is None else t, output[0]))

    hook = network.register_forward_hook(record, with_kwargs=True)
    with pipelines.told_sizes(pipeline, [SIZE]), torch.no_grad():
        pipeline(
            prompt=WORDS[:1], num_inference_steps=1, guidance_scale=3.0, height=16, width=16,
            output_type="latent", **layout_of(pipeline).sampling,
        )  # fmt: skip
    hook.remove()
    x, t, expected = seen[0]
    conditions = encode_captions(pipeline, WORDS[:1], batch=2)  # none, then the caption, as in seen
    conditions["size"] = torch.tensor([SIZE] * 2, dtype=torch.float32)
    with torch.no_grad():
        denoiser = pipelines.Denoiser(network, layout_of(pipeline))
        found = denoiser(x, t.expand(2), conditions)
    assert float((expected[0] - expected[1]).abs().max()) > 1e-6  # the caption plays a part
    torch.testing.assert_close(found, expected[:, :4], atol=1e-5, rtol=1e-4)


def test_dropped_captions_are_what_guidance_takes(
    layout: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """SDXL's published pipeline has zeros for no caption, others the features of ""."""
    kept = load_file(encoded(layout("sdxl"), pictures, tmp_path / "xl") / "captions.safetensors")
    assert not kept["caption"][0].any()
    assert not kept["pooled"][0].any()
    assert kept["caption"][1:].any()
    plain = pipelines.load(layout("sd"))
    length = plain.tokenizer.model_max_length
    empty = plain.tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        expected = plain.text_encoder(empty.input_ids)[0]
    torch.testing.assert_close(encode_captions(plain, [], 1)["caption"], expected)


def test_a_loser_is_made_under_its_winners_size_and_crop(
    layout: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import UNet2DConditionModel

    told: list[torch.Tensor] = []
    plain = UNet2DConditionModel.get_aug_embed

    def get_aug_embed(self: Any, **named: Any) -> Any:
        told.append(named["added_cond_kwargs"]["time_ids"])
        return plain(self, **named)

    monkeypatch.setattr(UNet2DConditionModel, "get_aug_embed", get_aug_embed)
    made(layout("sdxl"), pictures, tmp_path / "train")
    assert {len(ids) for ids in told} == {8}
    assert {tuple(row) for ids in told for row in ids.tolist()} == {(16, 20, 0, 2, 16, 16)}
    told.clear()
    made(layout("sdxl"), pictures, tmp_path / "heldout", part="heldout")
    assert {tuple(row) for ids in told for row in ids.tolist()} == {(16, 16, 0, 0, 16, 16)}


@NUMPY
@pytest.mark.parametrize("name", ["ddpm", "euler", "dpm"])
def test_schedulers_by_name(
    name: str, layout: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """Each makes images that depend on the seed, neither black nor white."""
    folder = made(layout("sd"), pictures, tmp_path / name, scheduler=name, steps=4)
    rows = read_rows(folder / "samples.parquet", Sample)
    assert len({row.png for row in rows}) == len(rows) == 12
    levels = np.stack([np.asarray(from_png(row.png, row.image_id)) for row in rows])
    assert 20 < levels.mean() < 235


def test_another_scheduler_does_not_begin_to_clip() -> None:
    """Latents are larger than 1; only a model whose own scheduler clips them is clipped."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    for own, expected in ((EulerDiscreteScheduler(), False), (DDIMScheduler(), True)):
        for name in ("ddim", "ddpm"):
            found = pipelines._other_scheduler(own, name)
            assert found.config.clip_sample is expected
            assert found.config.thresholding is False


def test_a_flow_keeps_its_scheduler(layout: Callable[[str], Path]) -> None:
    with pytest.raises(SparringError, match=r"'ddim' is of another process .*scheduler = \"own\""):
        pipelines.load(layout("sd3"), scheduler="ddim")


def bring(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    """image-model of a folder."""
    return start.run(ImageModelConfig(path=str(path), **options), {}, out, context(out))


def test_only_what_can_be_trained_is_brought_in(
    layout: Callable[[str], Path], tmp_path: Path
) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    small = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(small, DDPMScheduler()).save_pretrained(tmp_path / "uncaptioned")
    with pytest.raises(SparringError, match="DDPMPipeline cannot be trained here; StableDiff"):
        bring(tmp_path / "uncaptioned", tmp_path / "a")
    inpainting = sdxl()
    inpainting.unet.register_to_config(in_channels=9)
    inpainting.unet.conv_in = torch.nn.Conv2d(9, 8, 3, padding=1)
    inpainting.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(SparringError, match="takes 9 channels and the autoencoder makes 4"):
        bring(tmp_path / "inpainting", tmp_path / "b")
    found = bring(layout("sd"), tmp_path / "v", target="v")
    assert found["target"] == "v"
    kept = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert kept["prediction_type"] == "v_prediction"


def test_an_autoencoder_must_take_grey_or_colour(pictures: Path, tmp_path: Path) -> None:
    pipeline = stable_diffusion()
    pipeline.vae.register_to_config(in_channels=4)
    pipeline.vae.encoder.conv_in = torch.nn.Conv2d(4, 8, 3, padding=1)
    pipeline.save_pretrained(tmp_path / "four")
    with pytest.raises(SparringError, match="takes images of 4 channels, not 1 or 3"):
        encoded(tmp_path / "four", pictures, tmp_path / "out")


def test_numbers_that_are_not_finite_are_refused_where_they_arise(
    pictures: Path, tmp_path: Path
) -> None:
    def broken(name: str, parameter: Callable[[Any], torch.Tensor]) -> Path:
        pipeline = stable_diffusion()
        with torch.no_grad():
            parameter(pipeline).fill_(float("nan"))
        pipeline.save_pretrained(tmp_path / name)
        return tmp_path / name

    decoder = broken("decoder", lambda p: p.vae.decoder.conv_out.bias)
    with pytest.raises(SparringError, match="image generated for 's000' is not finite"):
        made(decoder, pictures, tmp_path / "images")
    encoder = broken("encoder", lambda p: p.vae.encoder.conv_in.bias)
    with pytest.raises(SparringError, match="latents of the real image 's000' are not finite"):
        encoded(encoder, pictures, tmp_path / "latents")
    texts = broken("texts", lambda p: p.text_encoder.final_layer_norm.bias)
    with pytest.raises(SparringError, match=r"features of 4 captions are not finite, the first ''"):
        encoded(texts, pictures, tmp_path / "captions")
