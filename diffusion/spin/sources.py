"""Where images with captions come from: in the source's own order, opened only when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparring.diffusion.spin.config import ImagesConfig
from sparring.diffusion.spin.pictures import from_png
from sparring.launch.errors import SparringError
from sparring.launch.packaged import packaged

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SAVED = ("dataset_info.json", "dataset_dict.json")  # by the datasets library: one split, several


class Found(NamedTuple):
    """An image with its caption."""

    image_id: str
    caption: str
    open: Callable[[], Image.Image]
    """Reads the image; a broken one raises SparringError."""


def digits(config: ImagesConfig) -> Iterator[Found]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, with captions in words."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for n, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        grey = np.round(image * 255 / 16).astype(np.uint8)
        caption = f"a photo of the digit {_DIGITS[int(label)]}"
        yield Found(f"digit-{n:04d}", caption, partial(Image.fromarray, grey))


def icons(config: ImagesConfig) -> Iterator[Found]:
    """fugue-icons: 3570 icons of 16 x 16 by Yusuke Kamiyamane (CC BY 3.0), named in words."""
    folder = packaged("fugue_icons", "static", "fugue-icons")
    sheet = Image.open(folder / "fugue-icons.png").convert("RGBA")
    places: Mapping[str, list[int]] = json.loads((folder / "fugue-icons.json").read_text())
    for name, (x, y) in sorted(places.items()):
        words = " ".join(name.replace("--", " with ").replace("-", " ").split())
        icon = partial(sheet.crop, (x, y, x + 16, y + 16))
        yield Found(f"icon-{name}", f"an icon of {words}", icon)


def folder(config: ImagesConfig) -> Iterator[Found]:
    """A folder of image files, captions in metadata.jsonl (file_name and the caption's column, as
    the datasets library has it), or in a text file of the same name beside each image."""
    root = Path(config.source)
    table = root / "metadata.jsonl"
    if table.is_file():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                row = _parsed(line, f"{table}, line {number}")
                _check_columns(row, ["file_name", config.caption_column], table)
                path = root / row["file_name"]
                yield Found(path.stem, _text(row[config.caption_column]), partial(_opened, path))
        return
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES):
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise SparringError(
                f"{path} has no caption: write one into {caption.name} beside it, or all of them "
                f"into {table.name}"
            )
        text = caption.read_text(encoding="utf-8").strip()
        yield Found(path.stem, text, partial(_opened, path))


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SparringError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise SparringError(f"{where} must be an object with file_name and a caption")
    return row


def _text(caption: Any) -> str:
    """A caption; one that is missing is empty, and left out later."""
    return "" if caption is None else str(caption)


def _check_columns(given: Any, wanted: list[str], where: object) -> None:
    for column in wanted:
        if column not in given:
            raise SparringError(f"{where} has no column {column!r}; it has {', '.join(given)}")


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise SparringError(f"{path}: no such image")
    return from_png(path.read_bytes(), str(path))


def data_set(config: ImagesConfig) -> Iterator[Found]:
    """A data set of the hub, or a folder that the datasets library saved.

    Captions are read first, as columns; an image is read when it is opened.
    """
    import datasets

    data = _loaded(config)
    names = ["jpg_0", "jpg_1"] if config.adapter == "pick-a-pic" else [config.image_column]
    labels = ["label_0"] if config.adapter == "pick-a-pic" else []
    _check_columns(data.column_names, [*names, *labels, config.caption_column], config.source)
    images = data.select_columns(names)
    for name in names:
        if isinstance(images.features[name], datasets.Image):
            # Bytes, since the library names no row when an image is broken.
            images = images.cast_column(name, datasets.Image(decode=False))
    chosen: Iterator[str | None] = (names[0] for _ in range(len(data)))
    if labels:
        chosen = map(pick_a_pic, data[labels[0]])
    for n, (caption, column) in enumerate(zip(data[config.caption_column], chosen, strict=True)):
        if column is not None:
            where = f"row {n} of {config.source}"
            image = partial(_row_image, images, n, column, where)
            yield Found(f"{config.split}-{n:07d}", _text(caption), image)


def _loaded(config: ImagesConfig) -> Any:
    import datasets

    try:
        if not (saved := _is_saved(Path(config.source))):
            return datasets.load_dataset(config.source, split=config.split)
        data = datasets.load_from_disk(config.source)
    except Exception as error:  # the library raises its own, its network's and the system's
        raise SparringError(f"images.source {config.source!r} cannot be loaded: {error}") from error
    if saved == _SAVED[0]:
        _refuse_splits(config)
        return data
    if config.split not in data:
        raise SparringError(
            f"{config.source} has no split {config.split!r}; it has {', '.join(data)}"
        )
    return data[config.split]


def _is_saved(path: Path) -> str | None:
    return next((name for name in _SAVED if (path / name).is_file()), None)


def _refuse_splits(config: ImagesConfig) -> None:
    if config.heldout_split:
        raise SparringError(
            f"{config.source} has no splits, so images.heldout_split = {config.heldout_split!r} "
            "names nothing; leave it empty"
        )


def _row_image(images: Any, row: int, column: str, where: str) -> Image.Image:
    value = images[row][column]
    if isinstance(value, Mapping):
        if not value["bytes"]:
            return _opened(Path(str(value["path"])))
        value = value["bytes"]
    if not isinstance(value, bytes):
        raise SparringError(f"{where}: {column!r} is {type(value).__name__}, no image")
    return from_png(value, where)


def pick_a_pic(label: float | None) -> str | None:
    """Column of the image that people preferred in Pick-a-Pic v2, by `label_0`; None for a tie, or
    where nobody was asked."""
    if label is None or label == 0.5:
        return None
    return "jpg_0" if label > 0.5 else "jpg_1"


SOURCES: dict[str, Callable[[ImagesConfig], Iterator[Found]]] = {"digits": digits, "icons": icons}


def source(config: ImagesConfig) -> Iterator[Found]:
    """All images of a recipe's source, in its own order, unopened.

    Raises:
        SparringError: it cannot be read; a missing column or a broken line is named.
    """
    if config.source in SOURCES:
        _refuse_splits(config)
        return SOURCES[config.source](config)
    path = Path(config.source)
    if path.is_dir() and not _is_saved(path):
        _refuse_splits(config)
        return folder(config)
    if not path.exists() and (config.source[:1] in "./~" or config.source.count("/") != 1):
        raise SparringError(
            f"images.source {config.source!r} is no folder, no data set (owner/name), and none of "
            f"{', '.join(SOURCES)}"
        )
    return data_set(config)
