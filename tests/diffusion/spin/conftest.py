"""Small image sets and pipelines that the tests of the image loop share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_images import LAYOUTS, squares

from sparring.diffusion.spin.pictures import picture
from sparring.diffusion.spin.rows import Picture
from sparring.launch.rows import write_rows


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of `images`: 12 training and 6 held-out pictures, 16 x 16."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, part in (("train", squares(12)), ("heldout", squares(6, seed=1))):
        rows = [picture(i, c, image, size=16, channels=3, crop="center") for i, c, image in part]
        write_rows(folder / f"{name}.parquet", Picture, rows)
    return folder


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny pipeline by its layout's name, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "pipeline"
            LAYOUTS[name]().save_pretrained(made[name])
        return made[name]

    return make
