"""States of methods: saved whole or not at all, gone on from under equal settings only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def check_settings(mine: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse a state of other settings.

    Args:
        mine: settings here.
        found: settings that the state was made under.

    Raises:
        ValueError: they differ; each difference is named.
    """
    differ = [k for k in {**mine, **found} if mine.get(k) != found.get(k)]
    if differ:
        raise ValueError(
            "the state is of other settings: "
            + ", ".join(f"{k} = {found.get(k)!r}, here {mine.get(k)!r}" for k in differ)
        )


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Replace a state as a whole, so that one killed half-way is never read."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
