"""Pictures: from files to square arrays of one size, and back to PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparring.diffusion.spin.rows import Picture
from sparring.launch.errors import SparringError

Crop = Literal["center", "pad"]
Row = TypeVar("Row")
Seen = TypeVar("Seen")


class Opened(Sequence[Seen], Generic[Row, Seen]):
    """What rows hold, opened as it is asked for, so that only PNG bytes stay in memory.

    Args:
        rows: with an image each.
        see: opens one.
    """

    def __init__(self, rows: Sequence[Row], see: Callable[[Row], Seen]) -> None:
        self._rows, self._see = rows, see

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Seen: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Seen]: ...
    def __getitem__(self, place: int | slice) -> Seen | Sequence[Seen]:
        if isinstance(place, slice):
            return Opened(self._rows[place], self._see)
        return self._see(self._rows[place])


def to_png(image: Image.Image) -> bytes:
    """PNG bytes, the same for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(data: bytes, where: str) -> Image.Image:
    """An image from the bytes of any format that Pillow reads.

    Raises:
        SparringError: it is not a readable image; `where` names it.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise SparringError(f"{where} is not a readable image: {error}") from None
    return image


def fitted(
    image: Image.Image, size: int, channels: int, crop: Crop
) -> tuple[Image.Image, int, int]:
    """A square image, with where the crop begins: top, left.

    Args:
        size: pixels of a side.
        channels: 1 for grey, 3 for colour; transparency is put on white, and grey of 16 bits is
            scaled to 8.
        crop: "center" scales the shorter side to `size` and cuts the longer one; "pad" puts a
            smaller image on a background of its corner's colour.
    """
    if image.mode.startswith("I"):  # Pillow would clip it: nearly all of it is white then
        image = Image.fromarray(
            (np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8)
        )
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if crop == "pad" and max(image.size) <= size:
        corner: Any = image.getpixel((0, 0))
        background = Image.new(image.mode, (size, size), corner)
        background.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return background, 0, 0
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - size) // 2, (width - size) // 2
    return image.crop((left, top, left + size, top + size)), top, left


def picture(
    image_id: str, caption: str, image: Image.Image, *, size: int, channels: int, crop: Crop
) -> Picture:
    """A row from an image of any size."""
    square, top, left = fitted(image, size, channels, crop)
    return Picture(image_id, caption, to_png(square), image.height, image.width, top, left)


def pixels(images: Iterable[Image.Image], channels: int) -> NDArray[np.float32]:
    """(B, C, H, W) in [-1, 1].

    Raises:
        SparringError: images of several sizes.
    """
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.asarray(image.convert(mode), dtype=np.float32) for image in images]
    shapes = {array.shape[:2] for array in arrays}
    if len(shapes) > 1:
        raise SparringError(f"images must have one size, not {sorted(shapes)}")
    stacked = np.stack(arrays)
    return (stacked[:, None] if channels == 1 else stacked.transpose(0, 3, 1, 2)) / 127.5 - 1


def thumbnails(images: Iterable[Image.Image], side: int = 32) -> NDArray[np.float32]:
    """(B, 3 H W) in [-1, 1] of images that are shrunk until no side is longer than `side`.

    For figures of how pictures look as a whole, whose cost must not grow with their size.
    """

    def small(image: Image.Image) -> Image.Image:
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        return image.convert("RGB").resize((width, height), Image.Resampling.BOX)

    shrunk = pixels((small(image) for image in images), 3)
    return shrunk.reshape(len(shrunk), -1)


def grid(rows: Sequence[Sequence[Image.Image]], scale: int = 1, gap: int = 2) -> Image.Image:
    """Images in rows and columns on white, each enlarged by a whole number."""
    height, width = (side * scale for side in (rows[0][0].height, rows[0][0].width))
    columns = max(map(len, rows))
    canvas = Image.new(
        "RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white"
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            large = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(large, (c * (width + gap), r * (height + gap)))
    return canvas
