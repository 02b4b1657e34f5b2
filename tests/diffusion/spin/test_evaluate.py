"""Scorers and distances against closed forms and known cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import clip_folder, squares

from sparring.diffusion.spin import evaluate
from sparring.diffusion.spin.config import ImageEvaluateConfig
from sparring.diffusion.spin.distances import (
    Features,
    coverage,
    frechet_distance,
    kernel_distance,
)
from sparring.diffusion.spin.pictures import Opened, pixels, thumbnails
from sparring.diffusion.spin.rows import Picture, Sample
from sparring.diffusion.spin.scorers import Clip, build_scorer
from sparring.diffusion.spin.stages import EVALUATE_IMAGES
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, LaunchConfig, Step, content_key

REAL = [(image, caption) for _, caption, image in squares(90)]


def test_frechet_distance_of_gaussians_is_its_closed_form() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40_000, 2)), rng.normal(size=(40_000, 2))
    # Diagonal covariances: |m|^2 + sum (s - t)^2.
    found = frechet_distance(a * [1.0, 2.0], b * [3.0, 1.0] + [1.0, -2.0])
    assert found == pytest.approx(1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2, rel=0.03)
    # Rotated, so that covariances do not commute with the axes.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    moved = (b * [3.0, 1.0] + [1.0, -2.0]) @ turn
    assert frechet_distance((a * [1.0, 2.0]) @ turn, moved) == pytest.approx(found, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_unbiased_and_sees_what_differs() -> None:
    rng = np.random.default_rng(0)

    def sets(size: int, shift: float = 0.0, count: int = 200) -> list[float]:
        return [
            kernel_distance(rng.normal(size=(size, 4)), rng.normal(size=(size, 4)) + shift)
            for _ in range(count)
        ]

    same = sets(20)
    # Frechet's distance of two such sets of 20 is about 0.8 on average.
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert np.std(same) > 0.01
    # Unscaled, from its definition, pair by pair.
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(7, 2)) * 2 + 1
    scale = np.sqrt(np.mean(x**2))
    k = lambda a, b: (a @ b / 2 / scale**2 + 1) ** 3  # noqa: E731
    expected = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    expected += sum(k(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    expected -= 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(1000 * x, 1000 * y) == pytest.approx(expected, rel=1e-12)
    assert min(sets(200, 0.5, 20)) > max(sets(200, 0.0, 20))


def test_coverage_falls_when_kinds_are_forgotten() -> None:
    rng = np.random.default_rng(1)
    centres = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    real = np.concatenate([c + rng.normal(size=(50, 2)) for c in centres])
    everything = np.concatenate([c + rng.normal(size=(50, 2)) for c in centres])
    one_kind = centres[0] + rng.normal(size=(200, 2))
    assert coverage(real, everything) > 0.9
    assert coverage(real, one_kind) == pytest.approx(0.25, abs=0.02)
    with pytest.raises(ValueError, match="neighbours must be from 1 to 199, not 200"):
        coverage(real, everything, neighbours=200)


def test_features_are_principal_components() -> None:
    rng = np.random.default_rng(2)
    data = rng.normal(size=(200, 3)) @ np.diag([5.0, 1.0, 0.1])
    found = Features(data, components=2)(data)
    assert found.shape == (200, 2)
    variances = np.linalg.eigvalsh(np.cov(data, rowvar=False))[::-1][:2]
    np.testing.assert_allclose(found.var(0, ddof=1), variances, rtol=1e-9)


def test_the_classifier_knows_the_captions() -> None:
    scorer: Any = build_scorer("classifier", REAL)
    images = [image for _, _, image in squares(12, seed=5)]
    captions = [caption for _, caption, _ in squares(12, seed=5)]
    wrong = captions[1:] + captions[:1]
    assert np.mean(scorer.right(images, captions)) > 0.9
    assert np.mean(scorer.score(images, captions)) > np.mean(scorer.score(images, wrong)) + 1
    with pytest.raises(SparringError, match="'a grey square' is none of them"):
        scorer.score(images[:1], ["a grey square"])
    with pytest.raises(SparringError, match="at least two captions with several images each"):
        build_scorer("classifier", [(image, f"caption {n}") for n, (image, _) in enumerate(REAL)])


def test_clip_and_pickscore_are_scaled_cosines(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    scorer: Any = build_scorer(f"pickscore:{folder}", REAL)
    assert scorer.name == "pickscore"
    images, captions = [i for i, _ in REAL[:3]], [c for _, c in REAL[:3]]
    found = scorer.score(images, captions)
    model, processor = scorer._model, scorer._processor
    given = processor(text=captions, images=images, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = model(**given)
    i, t = out.image_embeds.numpy(), out.text_embeds.numpy()
    cosine = (i * t).sum(1) / np.linalg.norm(i, axis=1) / np.linalg.norm(t, axis=1)
    np.testing.assert_allclose(found, np.exp(model.logit_scale.item()) * cosine, rtol=1e-4)
    one_by_one = Clip("clip", str(folder), batch=1).score(images, captions)
    np.testing.assert_allclose(found, one_by_one, rtol=1e-4)


def test_the_aesthetic_score_is_linear_in_clips_features(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = clip_folder(tmp_path / "clip")
    head = tmp_path / "head.safetensors"
    save_file({"weight": torch.arange(12.0)[None], "bias": torch.tensor([5.0])}, head)
    images = [image for image, _ in REAL[:2]]
    one: Any = build_scorer(f"aesthetic:{folder}|{head}", REAL)
    save_file({"weight": 2 * torch.arange(12.0)[None], "bias": torch.tensor([6.0])}, head)
    two: Any = build_scorer(f"aesthetic:{folder}|{head}", REAL)
    first, second = (np.array(s.score(images, ["", ""])) for s in (one, two))
    np.testing.assert_allclose(second, 2 * (first - 5) + 6, rtol=1e-5)


def test_a_scorer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"scorer 'pickscore' cannot be loaded from"):
        build_scorer(f"pickscore:{tmp_path}", REAL)
    with pytest.raises(SparringError, match=r"scorer 'beauty' is none of classifier, clip"):
        build_scorer("beauty", REAL)
    clip = clip_folder(tmp_path / "clip")
    with pytest.raises(SparringError, match=r"scorer 'aesthetic' cannot be loaded from 'x'"):
        build_scorer(f"aesthetic:{clip}|x", REAL)
    torch.save({"weight": torch.zeros(1, 12)}, tmp_path / "head.pth")
    with pytest.raises(SparringError, match=r"head.pth' \(a safetensors file with weight and bias"):
        build_scorer(f"aesthetic:{clip}|{tmp_path / 'head.pth'}", REAL)


def test_cost_does_not_grow_with_the_size_of_images() -> None:
    large = [image.resize((640, 512)) for image, _ in REAL[:3]]
    found = thumbnails(large)
    assert found.shape == (3, 3 * 26 * 32)
    means = [np.asarray(image).mean() / 127.5 - 1 for image in large]
    np.testing.assert_allclose(found.mean(1), means, atol=0.01)
    small = thumbnails(image for image, _ in REAL[:3])
    np.testing.assert_array_equal(small, pixels([i for i, _ in REAL[:3]], 3).reshape(3, -1))


def test_images_are_opened_as_they_are_asked_for() -> None:
    seen: list[int] = []

    def see(number: int) -> int:
        seen.append(number)
        return -number

    opened = Opened([1, 2, 3, 4], see)
    assert len(opened[1:3]) == 2
    assert not seen
    assert list(opened[1:3]) == [-2, -3]
    assert seen == [2, 3]


def test_axes_are_found_from_some_of_many_images(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(pictures / "train.parquet", Picture)
    monkeypatch.setattr(evaluate, "_FITTED", 5)
    fitted: list[int] = []

    class Counted(Features):
        def __init__(self, real_ND: Any) -> None:
            fitted.append(len(real_ND))
            super().__init__(real_ND)

    monkeypatch.setattr(evaluate, "Features", Counted)
    write_rows(
        tmp_path / "samples.parquet",
        Sample,
        [Sample(r.image_id, r.caption, 0, r.png) for r in rows],
    )
    inputs = {"images": pictures, "current": tmp_path}
    context = Context(World(), tmp_path, 0, lambda: False, lambda **_: None)
    evaluate.run(ImageEvaluateConfig(scorers=()), inputs, tmp_path, context)
    assert fitted == [4]  # every third of twelve


def test_a_scorers_files_are_part_of_the_stages_key(tmp_path: Path) -> None:
    config = ImageEvaluateConfig(
        scorers=("classifier", "clip", "aesthetic:/clip|/head", "tiny_images:redness")
    )
    assert config.scorer_files == ("", "", "/clip", "/head", "tiny_images:redness")
    assert set(EVALUATE_IMAGES.reads) == {"scorer_files"}
    head = tmp_path / "head.safetensors"
    step = Step("e", EVALUATE_IMAGES, ImageEvaluateConfig(scorers=(f"aesthetic:/clip|{head}",)), {})
    keys = set()
    for content in (b"one", b"two"):
        head.write_bytes(content)
        keys.add(content_key(step, {}, LaunchConfig()))
    assert len(keys) == 2


def test_win_rates_compare_the_same_caption_and_number(pictures: Path, tmp_path: Path) -> None:
    # Training images themselves, so that the classifier is right about what they show.
    train = read_rows(pictures / "train.parquet", Picture)
    by_name = {row.caption.split()[1]: row.png for row in train}

    def samples(name: str, colours: list[str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            Sample(f"s{n}", "a red square on white", 0, by_name[c]) for n, c in enumerate(colours)
        ]
        write_rows(folder / "samples.parquet", Sample, rows)
        return folder

    inputs = {
        "images": pictures,
        "current": samples("current", ["red", "red", "blue", "green"]),
        "base": samples("base", ["blue", "red", "blue", "red"]),
    }
    config = ImageEvaluateConfig(scorers=("tiny_images:redness", "classifier"))
    context = Context(World(), tmp_path, 0, lambda: False, lambda **_: None)
    figures = evaluate.run(config, inputs, tmp_path, context)
    mean, low, high = figures["redness_win_rate_base"]
    assert mean == pytest.approx((1 + 0.5 + 0.5 + 0) / 4)
    assert low < mean < high
    assert figures["accuracy"][0] == 0.5
    assert figures["accuracy_real"] == pytest.approx(5 / 6)  # of six real held-out squares
    inputs["base"] = samples("short", ["blue"])
    with pytest.raises(SparringError, match="have images for other captions"):
        evaluate.run(config, inputs, tmp_path, context)
