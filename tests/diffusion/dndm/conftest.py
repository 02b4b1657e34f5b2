"""Makes tiny_law and its neighbours importable; toy texts, and trainings on them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toy_text import TrainRun, toy_rows, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("toy") / "data", toy_rows())


@pytest.fixture
def new_run(tmp_path: Path, data: Path) -> Callable[..., TrainRun]:
    return lambda name, **options: TrainRun(tmp_path / name, data, **options)
