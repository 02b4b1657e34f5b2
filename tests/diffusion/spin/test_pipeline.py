"""A recipe's chain of steps, and two iterations of it through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_images import squares

from sparring.diffusion.spin.config import ImageModelConfig, ImageRecipe, ImageTrainConfig
from sparring.diffusion.spin.pipeline import build_steps
from sparring.launch import artifacts
from sparring.launch.cli import main
from sparring.launch.stages import Step


def steps(**options: Any) -> dict[str, Step]:
    return {step.name: step for step in build_steps(ImageRecipe(name="r", **options))}


def inputs(chain: dict[str, Step], name: str) -> dict[str, str]:
    return dict(chain[name].inputs)


def test_every_iteration_plays_the_one_before() -> None:
    chain = steps(train=ImageTrainConfig(beta=(1.0, 2.0, 3.0)))
    assert inputs(chain, "start/encode-images") == {"model": "image-model", "images": "images"}
    previous = "start/train-images"
    for t in range(3):
        generated, encoded = f"iter{t}/generate-images", f"iter{t}/encode-images"
        assert inputs(chain, generated) == {"model": previous, "images": "images"}
        assert inputs(chain, encoded) == {
            "model": previous, "images": "images", "generated": generated,
        }  # fmt: skip
        # No opponent is named: it is the model that training starts from.
        assert inputs(chain, f"iter{t}/train-images") == {"model": previous, "encoded": encoded}
        assert chain[f"iter{t}/train-images"].config.beta == t + 1
        assert chain[f"iter{t}/train-images"].config.loss == "spin"
        previous = f"iter{t}/train-images"
        assert inputs(chain, f"heldout{t + 1}/generate-images")["model"] == previous
    assert inputs(chain, "heldout3/evaluate-images") == {
        "images": "images",
        "current": "heldout3/generate-images",
        "base": "heldout0/generate-images",
        "previous": "heldout2/generate-images",
    }
    assert "base" not in inputs(chain, "heldout0/evaluate-images")
    # Losers of an iteration have noise of their own, held-out images the same in all.
    assert len({chain[f"iter{t}/generate-images"].seed for t in range(3)}) == 3
    assert len({chain[f"heldout{t}/generate-images"].seed for t in range(4)}) == 1


def test_a_frozen_reference_stays_the_start_while_the_losers_are_new() -> None:
    chain = steps(algorithm="frozen-reference", model=ImageModelConfig(path="a/b"))
    assert "start/train-images" not in chain
    assert "opponent" not in inputs(chain, "iter0/train-images")
    for t in (1, 2):
        given = inputs(chain, f"iter{t}/train-images")
        assert (given["model"], given["opponent"]) == (f"iter{t - 1}/train-images", "image-model")
        assert inputs(chain, f"iter{t}/generate-images")["model"] == f"iter{t - 1}/train-images"


def test_one_iteration_kept_going_has_its_first_losers_and_opponent() -> None:
    chain = steps(algorithm="one-iteration")
    made = ["iter0/generate-images", "iter0/encode-images"]
    trained = [f"iter{t}/train-images" for t in range(3)]
    assert [name for name in chain if "iter" in name] == [*made, *trained]
    for t in (1, 2):
        assert inputs(chain, f"iter{t}/train-images") == {
            "model": f"iter{t - 1}/train-images",
            "encoded": "iter0/encode-images",
            "opponent": "start/train-images",
        }
    # What it shares with the others is the same step, so that it need not be made again.
    spin, frozen = steps(), steps(algorithm="frozen-reference")
    for name in ("iter0/train-images", "heldout1/evaluate-images", "start/train-images"):
        assert chain[name] == spin[name] == frozen[name]


def test_sft_goes_on_with_the_real_images_alone() -> None:
    chain = steps(algorithm="sft-diffusion")
    assert not any(name.startswith("iter") and "generate" in name for name in chain)
    model = "start/train-images"
    for t in range(3):
        given = {"model": model, "encoded": "start/encode-images"}
        assert inputs(chain, f"iter{t}/train-images") == given
        assert chain[f"iter{t}/train-images"].config.loss == "sft"
        model = f"iter{t}/train-images"
    other = steps(algorithm="sft-diffusion", model=ImageModelConfig(path="a/b"))
    assert inputs(other, "iter0/train-images")["model"] == "image-model"
    assert inputs(other, "start/encode-images")["model"] == "image-model"


RECIPE = """\
name = "tiny"
pipeline = "images"
algorithm = "{algorithm}"
iterations = 2
images = {{ source = "{images}", size = 16, train = 4, heldout = 2 }}
model = {{ path = "{model}" }}
generate = {{ steps = 1, guidance = 2.0, batch = 4 }}
evaluate = {{ scorers = ["tiny_images:redness"] }}

[train]
steps = 2
batch = 4
micro_batch = 4
lr = 1e-2
schedule = "constant"
warmup = 0.0
beta = 20.0
lora_rank = {rank}

[launch]
inline = ["image-model", "generate-images", "encode-images", "train-images", "evaluate-images"]
"""


@pytest.mark.parametrize(
    ("name", "algorithm", "rank"), [("sd", "frozen-reference", 0), ("sdxl", "spin-diffusion", 2)]
)
def test_two_iterations_of_a_run(
    name: str, algorithm: str, rank: int, layout: Callable[[str], Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for stem, caption, image in squares(6):
        image.save(images / f"{stem}.png")
        (images / f"{stem}.txt").write_text(caption)
    recipe = tmp_path / "tiny.toml"
    text = RECIPE.format(algorithm=algorithm, images=images, model=layout(name), rank=rank)
    recipe.write_text(text)
    run = tmp_path / "run"
    assert main(["run", str(recipe), "--out", str(run)]) == 0
    starts = []
    for t in range(2):
        lines = (run / f"iter{t}" / "train-images" / "metrics.jsonl").read_text().splitlines()
        starts.append(json.loads(lines[0]))
    assert starts[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    if algorithm == "spin-diffusion":  # the iterate before, adapters merged, is the new opponent
        assert starts[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert starts[1]["accuracy"] == 0
    else:  # the model has moved away from the start, which stays the opponent
        assert abs(starts[1]["loss"] - np.log(2)) > 1e-4
    first, second = (artifacts.read(run / f"iter{t}" / "train-images") for t in range(2))
    assert first is not None
    assert second is not None
    assert second.manifest["inputs"]["model"] == first.digest
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(run / "iter1" / "train-images")
    assert type(loaded).__name__.startswith("StableDiffusion")
    report = (run / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert "redness win rate base" in report
    assert "<th>real images</th>" in report
    assert report.count("<svg") >= 3
