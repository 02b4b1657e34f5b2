"""Where images with captions come from. A source is a function to (id, caption, image) in order."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparring.diffusion.spin.config import ImagesConfig
from sparring.diffusion.spin.pictures import from_png
from sparring.launch.errors import SparringError

Found = tuple[str, str, Image.Image]
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits(config: ImagesConfig) -> Iterator[Found]:
    """scikit-learn's 1797 handwritten digits, 8 x 8, with captions in words."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for n, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        grey = Image.fromarray(np.round(image * 255 / 16).astype(np.uint8), mode=None)
        yield f"digit-{n:04d}", f"a photo of the digit {_DIGITS[int(label)]}", grey


def icons(config: ImagesConfig) -> Iterator[Found]:
    """fugue-icons: 3570 icons of 16 x 16 by Yusuke Kamiyamane (CC BY 3.0), named in words."""
    spec = importlib.util.find_spec("fugue_icons")
    if spec is None or not spec.submodule_search_locations:
        raise SparringError(
            'images.source = "icons" needs the package fugue-icons: pip install --no-deps '
            "fugue-icons"
        )
    folder = Path(spec.submodule_search_locations[0]) / "static"
    sheet = Image.open(folder / "fugue-icons.png").convert("RGBA")
    places: Mapping[str, list[int]] = json.loads((folder / "fugue-icons.json").read_text())
    for name, (x, y) in sorted(places.items()):
        words = " ".join(name.replace("--", " with ").replace("-", " ").split())
        yield f"icon-{name}", f"an icon of {words}", sheet.crop((x, y, x + 16, y + 16))


def folder(config: ImagesConfig) -> Iterator[Found]:
    """A folder of image files, captions in metadata.jsonl (file_name and the caption's column, as
    the datasets library has it), or in a text file of the same name beside each image."""
    root = Path(config.source)
    table = root / "metadata.jsonl"
    if table.is_file():
        lines = table.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        for row in rows:
            for column in ("file_name", config.caption_column):
                if column not in row:
                    raise SparringError(f"{table} has no {column!r}; it has {', '.join(row)}")
            path = root / row["file_name"]
            yield path.stem, str(row[config.caption_column]), _opened(path)
        return
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in _SUFFIXES):
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise SparringError(
                f"{path} has no caption: write one into {caption.name} beside it, or all of them "
                f"into {table.name}"
            )
        yield path.stem, caption.read_text(encoding="utf-8").strip(), _opened(path)


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise SparringError(f"{path}: no such image")
    return from_png(path.read_bytes(), str(path))


def hub(config: ImagesConfig) -> Iterator[Found]:
    """A data set of the hub, or a folder that the datasets library saved."""
    import datasets

    try:
        local = Path(config.source)
        if (local / "dataset_info.json").is_file():
            data = datasets.load_from_disk(str(local))
        else:
            data = datasets.load_dataset(config.source, split=config.split)
    except Exception as error:  # the library raises its own, its network's and the system's
        raise SparringError(f"images.source {config.source!r} cannot be loaded: {error}") from error
    for n, row in enumerate(data):
        image_column, caption_column = config.image_column, config.caption_column
        if config.adapter == "pick-a-pic":
            winner = pick_a_pic(row)
            if winner is None:
                continue
            image_column = winner
        for column in (image_column, caption_column):
            if column not in row:
                raise SparringError(
                    f"{config.source} has no column {column!r}; it has {', '.join(row)}"
                )
        yield f"{n:07d}", str(row[caption_column]), _image(row[image_column], n, config.source)


def _image(value: Any, row: int, source: str) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    data = value["bytes"] if isinstance(value, Mapping) else value
    return from_png(data, f"row {row} of {source}")


def pick_a_pic(row: Mapping[str, Any]) -> str | None:
    """Column of the image that people preferred in Pick-a-Pic v2; None for a tie."""
    label = row["label_0"]
    return None if label == 0.5 else "jpg_0" if label > 0.5 else "jpg_1"


SOURCES: dict[str, Callable[[ImagesConfig], Iterator[Found]]] = {"digits": digits, "icons": icons}


def source(config: ImagesConfig) -> Iterator[Found]:
    """All images of a recipe's source, in its own order.

    Raises:
        SparringError: it cannot be read; a broken file or a missing column is named.
    """
    if config.source in SOURCES:
        return SOURCES[config.source](config)
    path = Path(config.source)
    if path.is_dir() and not (path / "dataset_info.json").is_file():
        return folder(config)
    if not path.exists() and (config.source[:1] in "./~" or config.source.count("/") != 1):
        raise SparringError(
            f"images.source {config.source!r} is no folder, no data set (owner/name), and none of "
            f"{', '.join(SOURCES)}"
        )
    return hub(config)
