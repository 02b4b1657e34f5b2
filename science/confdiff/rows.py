"""What the stages of ConfDiff hand on. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

TORSIONS = ("omega", "phi", "psi", "chi1", "chi2", "chi3", "chi4")
"""Order of a residue's torsions: omega and phi of the bond before it, psi of the one after."""


@dataclass(frozen=True)
class Conformation:
    """One structure of one chain."""

    chain: str
    """Name of the chain (not unique: a trajectory has many rows of one chain)."""
    number: int
    """Number of the structure within the chain's structures."""
    sequence: str
    """One-letter codes of the N residues."""
    capped: bool
    """ACE before the first residue and NME after the last; they are no residues of the sequence."""
    atoms: bytes
    """float32 (N, 14, 3) nm: heavy atoms in the order of residues.ATOMS, NaN where missing."""
    torsions: bytes
    """float32 (N, 7) radians in the order of TORSIONS, NaN where undefined."""
    temperature: float | None = None
    """K, of the simulation that it comes from."""
    energy: float | None = None
    """kJ/mol, potential energy of all atoms (hydrogens too)."""
    energy_kind: str | None = None
    """Of which structure `energy` and `forces` are: "thermal", as simulated; "hydrogens", with
    hydrogens built and minimised. Never comparable with each other."""
    relaxed_energy: float | None = None
    """kJ/mol, with side chains and hydrogens relaxed about the backbone (relaxation.py)."""
    forces: bytes | None = None
    """float32 (N, 6): force on each residue as a rigid body, kJ/mol/nm, and torque about its CA,
    kJ/mol, both in the laboratory's axes and both -dE (physics.py)."""
    log_weight: float | None = None
    """Of a sample that is weighed; None: 0."""
    ancestor: int | None = None
    """Of a sample that was resampled: the number of the one whose start it shares."""
    attempts: int | None = None
    """Of a sample: how often it was drawn until it passed."""
