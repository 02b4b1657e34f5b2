"""Where simulations begin without a structure file: phi and psi of each residue.

Shape legend: N residues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.launch.errors import SparringError

STARTS = {"extended": (-120.0, 140.0), "helix": (-57.0, -47.0), "polyproline": (-75.0, 145.0)}
"""Phi and psi in degrees of all residues at the start."""
_TORSIONS = "torsions "


def torsion_start(degrees: Sequence[float]) -> str:
    """The name of a start with phi and psi in degrees of residue after residue."""
    return _TORSIONS + " ".join(f"{value:g}" for value in degrees)


def by_angles(start: str) -> bool:
    """Whether a start is named by angles, and no file."""
    return start in STARTS or start.startswith(_TORSIONS)


def start_angles(sequence: str, start: str) -> tuple[Tensor, Tensor] | None:
    """Phi and psi, each (N,) radians in float64, of a start; None if it is a file.

    Raises:
        SparringError: there are more or fewer angles than the chain has.
    """
    size = len(sequence)
    if start in STARTS:
        degrees = list(STARTS[start]) * size
    elif by_angles(start):
        degrees = [float(word) for word in start.removeprefix(_TORSIONS).split()]
    else:
        return None
    if len(degrees) != 2 * size:
        raise SparringError(
            f"a start by torsions is phi and psi of {size} residues, not {len(degrees)} numbers"
        )
    phi, psi = torch.tensor(degrees, dtype=torch.float64).deg2rad().reshape(size, 2).T
    return phi, psi
