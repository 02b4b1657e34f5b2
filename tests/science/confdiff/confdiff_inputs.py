"""Inputs that several of ConfDiff's tests take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparring.launch.cli import main
from sparring.launch.rows import read_rows
from sparring.science.confdiff.dataset import CONFORMATIONS
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.tangent import Tangent


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Of float64, from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frames(*shape: int, seed: int = 0) -> Frames:
    return Frames(exp_rotation(2 * normal(*shape, 3, seed=seed)), normal(*shape, 3, seed=seed + 1))


def draws(*shape: int, seed: int = 5) -> Tangent:
    return Tangent(normal(*shape, 3, seed=seed), normal(*shape, 3, seed=seed + 1))


def everyone(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """The exit code of a command, and what it wrote to standard error."""
    capsys.readouterr()
    code = main([str(word) for word in arguments])
    return code, capsys.readouterr().err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rows(folder: Path) -> list[Conformation]:
    return read_rows(folder / CONFORMATIONS, Conformation)
