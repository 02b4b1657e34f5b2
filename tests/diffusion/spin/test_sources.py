"""Images with captions: where they come from, how they are fitted, and what is refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_images import squares

from sparring.diffusion.spin import collect, encode, pictures
from sparring.diffusion.spin.config import ImagesConfig
from sparring.diffusion.spin.rows import Picture, Sample
from sparring.diffusion.spin.sources import SOURCES, Found, pick_a_pic, source
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context


def collected(folder: Path, config: ImagesConfig) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    context = Context(World(), folder, 0, lambda: False, lambda **_: None)
    return collect.run(config, {}, folder, context)


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., Path]:
    """A folder of images, captions in text files or in metadata.jsonl."""

    def make(*, table: bool) -> Path:
        folder = tmp_path / ("table" if table else "texts")
        folder.mkdir()
        lines = []
        for name, caption, image in squares(9):
            image.save(folder / f"{name}.png")
            if table:
                lines.append(json.dumps({"file_name": f"{name}.png", "text": caption}))
            else:
                (folder / f"{name}.txt").write_text(caption + "\n")
        if table:
            (folder / "metadata.jsonl").write_text("\n".join(lines))
        return folder

    return make


def rows_of(folder: Path, part: str) -> list[Picture]:
    return read_rows(folder / f"{part}.parquet", Picture)


@pytest.mark.parametrize("table", [True, False])
def test_a_local_folder(local: Callable[..., Path], table: bool, tmp_path: Path) -> None:
    config = ImagesConfig(source=str(local(table=table)), size=16, train=6, heldout=3)
    assert collected(tmp_path / "out", config)["train"] == 6
    rows = [
        r for p in ("train", "heldout") for r in read_rows(tmp_path / f"out/{p}.parquet", Picture)
    ]
    assert len({row.image_id for row in rows}) == 9
    assert all("square on white" in row.caption for row in rows)
    assert {(row.height, row.width, row.top, row.left) for row in rows} == {(16, 20, 0, 2)}


def test_a_saved_data_set(tmp_path: Path) -> None:
    import datasets

    table = {"image": [i for *_, i in squares(4)], "title": [c for _, c, _ in squares(4)]}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "saved"))
    config = ImagesConfig(
        source=str(tmp_path / "saved"), caption_column="title", size=16, train=3, heldout=1
    )
    assert len(list(source(config))) == 4
    with pytest.raises(SparringError, match="has no column 'text'; it has image, title"):
        list(source(ImagesConfig(source=str(tmp_path / "saved"))))
    with pytest.raises(SparringError, match=r"has no splits, so images\.heldout_split = 'test'"):
        list(source(ImagesConfig(source=str(tmp_path / "saved"), heldout_split="test")))


def png(image: Image.Image) -> dict[str, Any]:
    return {"bytes": pictures.to_png(image), "path": None}


def test_a_broken_image_of_a_data_set_is_named_and_a_missing_caption_left_out(
    tmp_path: Path,
) -> None:
    import datasets

    good = [png(image) for *_, image in squares(4)]
    table = {
        "image": [*good, {"bytes": b"no image", "path": None}],
        "text": ["one", None, "three", "four", "five"],
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "saved"))
    config = ImagesConfig(source=str(tmp_path / "saved"), size=16, train=3, heldout=1)
    with pytest.raises(SparringError, match=r"row 4 of .*saved is not a readable image"):
        collected(tmp_path / "out", config)
    datasets.Dataset.from_dict(
        {key: column[:4] for key, column in table.items()}, features=features
    ).save_to_disk(str(tmp_path / "whole"))
    config = ImagesConfig(source=str(tmp_path / "whole"), size=16, train=2, heldout=1)
    figures = collected(tmp_path / "kept", config)
    assert figures["without_caption"] == 1
    kept = [row for part in ("train", "heldout") for row in rows_of(tmp_path / "kept", part)]
    assert {row.caption for row in kept} == {"one", "three", "four"}


def test_pick_a_pic_with_a_split_to_hold_out(tmp_path: Path) -> None:
    """A saved set of several splits: winners alone, and no held-out caption is trained on."""
    import datasets

    red, blue = (pictures.to_png(image) for *_, image in (squares(1)[0], squares(3)[2]))

    def split(captions: list[str]) -> datasets.Dataset:
        labels = [(1.0, 0.0, 0.5)[n % 3] for n in range(len(captions))]
        columns = {"jpg_0": [red] * len(captions), "jpg_1": [blue] * len(captions)}
        return datasets.Dataset.from_dict({**columns, "label_0": labels, "caption": captions})

    saved = {"train": split(["a", "b", "b", "c", "d", "b"]), "test_unique": split(["b", "b", "b"])}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    options = {
        "source": str(tmp_path / "saved"), "adapter": "pick-a-pic", "caption_column": "caption",
        "size": 16, "train": 0, "heldout": 1, "heldout_by": "caption",
    }  # fmt: skip
    config = ImagesConfig(**options, heldout_split="test_unique")
    figures = collected(tmp_path / "out", config)
    assert (figures["train"], figures["captions_in_both"]) == (3, 0)
    assert [row.caption for row in rows_of(tmp_path / "out", "train")] == ["a", "c", "d"]
    winners = [
        np.asarray(pictures.from_png(r.png, "w")) for r in rows_of(tmp_path / "out", "train")
    ]
    warm = [bool(a[..., 0].mean() > a[..., 2].mean()) for a in winners]
    assert warm == [True, True, False]  # rows 0, 3 and 4 of the split: labels 1, 1 and 0
    with pytest.raises(SparringError, match="has no split 'none'; it has train, test_unique"):
        list(source(ImagesConfig(**options, heldout_split="x", split="none")))
    with pytest.raises(ValueError, match=r"images\.split too: 'train'"):
        ImagesConfig(heldout_split="train")
    bare = saved["train"].remove_columns("label_0")
    bare.save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(
        SparringError, match="has no column 'label_0'; it has jpg_0, jpg_1, caption"
    ):
        list(source(ImagesConfig(**{**options, "source": str(tmp_path / "bare")})))


def test_images_that_are_not_chosen_are_not_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opened: list[int] = []

    def twenty(config: ImagesConfig) -> Iterator[Found]:
        for n in range(20):

            def image(n: int = n) -> Image.Image:
                opened.append(n)
                return Image.new("RGB", (16, 16))

            yield Found(f"i{n}", f"caption {n % 7}", image)

    monkeypatch.setitem(SOURCES, "digits", twenty)
    collected(tmp_path / "some", ImagesConfig(size=16, train=3, heldout=2))
    assert len(opened) == len(set(opened)) == 5
    by_caption = ImagesConfig(size=16, train=0, heldout=3, heldout_by="caption")
    figures = collected(tmp_path / "captions", by_caption)
    held = [row.caption for row in rows_of(tmp_path / "captions", "heldout")]
    trained = [row.caption for row in rows_of(tmp_path / "captions", "train")]
    assert len(set(held)) == len(held) == 3
    assert not set(held) & set(trained)
    assert figures["captions"] == 4
    with pytest.raises(SparringError, match="7 can be held out and 0 trained on"):
        collected(
            tmp_path / "many", ImagesConfig(size=16, train=1, heldout=8, heldout_by="caption")
        )


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    found = list(source(ImagesConfig(source="digits")))
    data = load_digits()
    assert len(found) == 1797
    assert found[5][1] == "a photo of the digit five"
    np.testing.assert_allclose(np.asarray(found[5].open()) / 255 * 16, data.images[5], atol=0.04)


def test_icons_have_names_in_words() -> None:
    pytest.importorskip("fugue_icons", reason="needs the package fugue-icons")
    found = {name: (caption, read) for name, caption, read in source(ImagesConfig(source="icons"))}
    assert len(found) > 3000
    caption, read = found["icon-wand--pencil"]
    image = read()
    assert caption == "an icon of wand with pencil"
    assert image.size == (16, 16)
    assert np.asarray(image)[..., 3].max() == 255


def test_pick_a_pic_takes_the_winner_and_leaves_ties_out() -> None:
    labels = {0.0: "jpg_1", 0.5: None, 1.0: "jpg_0", None: None}
    assert {label: pick_a_pic(label) for label in labels} == labels


def test_fitting_keeps_shapes_and_says_where_it_cut() -> None:
    wide = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1)))
    square, top, left = pictures.fitted(wide, 10, 1, "center")
    assert (square.size, top, left) == ((10, 10), 0, 5)
    assert abs(float(np.asarray(square).mean()) - np.asarray(wide).mean()) < 3
    small = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    padded, *_ = pictures.fitted(small, 8, 3, "pad")
    assert padded.size == (8, 8)
    assert set(map(tuple, np.asarray(padded).reshape(-1, 3))) == {(255, 127, 127)}
    deep = Image.fromarray(np.tile(np.arange(16, dtype=np.uint16) * 4369, (16, 1)))
    assert deep.mode == "I;16"
    found, *_ = pictures.fitted(Image.open(io.BytesIO(pictures.to_png(deep))), 16, 1, "center")
    assert np.asarray(found)[0].tolist() == [17 * n for n in range(16)]
    array = pictures.pixels([square, square], 1)
    assert array.shape == (2, 1, 10, 10)
    assert -1 <= array.min() < array.max() <= 1


def test_broken_input_is_named(
    local: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = local(table=True)
    config = ImagesConfig(source=str(folder), size=16, train=6, heldout=3)
    with pytest.raises(SparringError, match="has 9 images, of which 3 can be held out and 6 trai"):
        collected(tmp_path / "few", ImagesConfig(source=str(folder), train=8, heldout=3))
    (folder / "s004.png").write_bytes(b"no image")
    with pytest.raises(SparringError, match=r"s004.png is not a readable image"):
        collected(tmp_path / "broken", config)
    (folder / "s004.png").unlink()
    with pytest.raises(SparringError, match=r"s004.png: no such image"):
        collected(tmp_path / "gone", config)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], "", '{"file_name": ']))
    with pytest.raises(SparringError, match=r"metadata.jsonl, line 3 is no JSON"):
        collected(tmp_path / "json", config)
    (folder / "metadata.jsonl").write_text('"s000.png"')
    with pytest.raises(SparringError, match=r"metadata.jsonl, line 1 must be an object"):
        collected(tmp_path / "json", config)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "title": "t"}))
    with pytest.raises(SparringError, match="has no column 'text'; it has file_name, title"):
        collected(tmp_path / "column", config)
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], lines[0], *lines[1:4]]))
    with pytest.raises(SparringError, match="'s000' comes twice"):
        collected(tmp_path / "twice", ImagesConfig(source=str(folder), train=2, heldout=1))
    with pytest.raises(SparringError, match="is no folder, no data set"):
        collected(tmp_path / "none", ImagesConfig(source="./nowhere"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(SparringError, match=r"bomb is not a readable image: Image size"):
        pictures.from_png(pictures.to_png(Image.new("L", (16, 16))), "bomb")


def test_pairs_are_of_the_same_caption_and_never_none(pictures: Path, tmp_path: Path) -> None:
    rows = read_rows(pictures / "train.parquet", Picture)
    folder = tmp_path / "generated"
    folder.mkdir()

    def given(samples: list[Sample]) -> dict[str, Path]:
        write_rows(folder / "samples.parquet", Sample, samples)
        return {"images": pictures, "generated": folder}

    same = [Sample(r.image_id, r.caption, 0, r.png) for r in rows]
    other = Sample(rows[0].image_id, rows[0].caption, 0, rows[1].png)
    pairs, equal = encode.paired(given([*same[1:], other]))
    assert equal == len(rows) - 1
    assert [(row.image_id, sample and sample.png) for row, sample in pairs] == [
        (rows[0].image_id, rows[1].png)
    ]
    with pytest.raises(SparringError, match="no pair to train on"):
        encode.paired(given(same))
    with pytest.raises(SparringError, match="'alien', which is not among"):
        encode.paired(given([Sample("alien", "c", 0, rows[0].png)]))
