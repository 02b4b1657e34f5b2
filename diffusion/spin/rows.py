"""Typed rows of the image loop."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A real image with its caption, resized and cropped."""

    image_id: str
    caption: str
    png: bytes
    height: int
    """Before resizing; SDXL is told."""
    width: int
    top: int = 0
    """Where the crop begins, in the resized image; SDXL is told."""
    left: int = 0


@dataclass(frozen=True)
class Caption:
    """A picture without its pixels, read from the same file."""

    image_id: str
    caption: str
    height: int
    width: int
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class Sample:
    """An image that an iterate made for a picture's caption."""

    image_id: str
    caption: str
    k: int
    """Number of the sample under this caption."""
    png: bytes


@dataclass(frozen=True)
class Encoded:
    """Latents of a real image, and of one that the opponent made."""

    image_id: str
    caption: str
    winner: bytes
    """Latents, float32, little-endian; the shape is in shape.json."""
    loser: bytes
    """The same; empty where there is no opponent's image."""
    size: tuple[int, ...]
    """SDXL's, see `told_size`."""


def told_size(row: Picture | Caption, height: int, width: int) -> tuple[int, ...]:
    """SDXL's: original height and width, top and left of the crop, height and width in pixels."""
    return row.height, row.width, row.top, row.left, height, width
