"""Sizes of networks on frames. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

AMINO_ACIDS = 21
"""Types of residue that a network with a sequence knows: the 20, and the unknown one."""


@dataclass(frozen=True, kw_only=True)
class NetworkSize:
    """Widths and depths of a trunk; the defaults are the paper's (ConfDiff's configuration)."""

    node: int = 256
    """Width of a residue's features."""
    edge: int = 128
    """Width of a pair's features; a multiple of 4."""
    skip: int = 64
    """Width of the initial features that each block's transformer sees again."""
    blocks: int = 4
    """Blocks of attention, transformer and frame update."""
    heads: int = 4
    """Of point attention and of transformers."""
    channels: int = 256
    """Scalar width of a head of point attention."""
    query_points: int = 8
    """Points a head and residue that attention measures distances between."""
    value_points: int = 12
    """Points a head and residue that attention moves."""
    layers: int = 2
    """Of a block's transformer."""
    waves: int = 64
    """Width of the embeddings of time, residue number, distance and amino acid; even."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"size.{name} must be at least 1, not {value}")
        if self.edge % 4 or self.waves % 2 or (self.node + self.skip) % self.heads:
            raise ValueError(
                f"edge {self.edge} must be a multiple of 4, waves {self.waves} even, and node + "
                f"skip {self.node + self.skip} a multiple of heads {self.heads}"
            )


SIZES = {
    "tiny": NetworkSize(
        node=64,
        edge=32,
        skip=16,
        blocks=3,
        channels=16,
        query_points=4,
        value_points=8,
        layers=1,
        waves=32,
    ),
    "base": NetworkSize(node=128, edge=64, skip=32, channels=32, value_points=8, layers=1),
    "paper": NetworkSize(),
}
"""About 0.37, 1.8 and 12.4 million parameters."""
