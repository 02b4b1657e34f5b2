"""Whether structures can be real: whole chains without clashes.

The limits of the physicality filter of BioEmu (Lewis et al. 2025): neighbouring CA within 4.5 Å,
C-N bonds within 2.0 Å, and no two atoms of residues that are not neighbours within 1.0 Å; N, CA, C
and O are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import atoms_array

CA_CA, C_N, CLASH = 0.45, 0.20, 0.10
"""nm."""


def sound(rows: Sequence[Conformation]) -> list[bool]:
    """Whether each structure of one chain keeps the limits; coordinates must be finite."""
    atoms = np.stack([atoms_array(row)[:, :4] for row in rows]).astype(np.float64)
    count, size = atoms.shape[:2]
    good = np.isfinite(atoms).all((1, 2, 3))
    steps = np.linalg.norm(np.diff(atoms[:, :, 1], axis=1), axis=-1)
    bonds = np.linalg.norm(atoms[:, 1:, 0] - atoms[:, :-1, 2], axis=-1)
    good &= (steps < CA_CA).all(1) & (bonds < C_N).all(1)
    flat = atoms.reshape(count, -1, 3)
    owner = np.repeat(np.arange(size), atoms.shape[2])
    apart = np.abs(owner[:, None] - owner) > 1
    for number in np.flatnonzero(good):
        near = np.linalg.norm(flat[number][:, None] - flat[number], axis=-1)
        good[number] = not (near[apart] < CLASH).any()
    return [bool(g) for g in good]
