"""The trunk: from noised frames to features of residues and pairs, and to frames that are cleaner.

FrameDiff's score network (arXiv 2302.02277, §4), which ConfDiff takes (arXiv 2403.14088, §3.1):
blocks of invariant point attention, a transformer, an update of each frame in its own axes, and an
update of pairs. ConfDiff knows a sequence only through a pretrained network's features; here the
types of amino acids are embedded too, so that none is needed.

Only tensors pass between modules, for ZeRO-3's hooks look into nothing else.

Shape legend: B samples, N residues, C width of nodes, Z of edges, W waves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparring.science.confdiff.attention import (
    InvariantPointAttention,
    Mlp,
    TransformerLayer,
    exact,
    linear,
)
from sparring.science.confdiff.frames import turned
from sparring.science.confdiff.sizes import AMINO_ACIDS, NetworkSize

FARTHEST = 5.0
"""nm: distances between CA are embedded by Gaussians from 0 to here."""


def waves(values: Tensor, width: int, longest: float) -> Tensor:
    """(..., W) sines and cosines with wavelengths from 2 pi to 2 pi longest."""
    half = width // 2
    steps = torch.arange(half, device=values.device, dtype=torch.float64)
    angle = values.double()[..., None] * torch.exp(-math.log(longest) * steps / half)
    return torch.cat([angle.sin(), angle.cos()], -1)


def bumps(distance: Tensor, width: int) -> Tensor:
    """(..., W) Gaussians of distances (...) in nm, as wide as they are apart."""
    centres = torch.linspace(0, FARTHEST, width, device=distance.device, dtype=distance.dtype)
    apart = FARTHEST / (width - 1)
    return torch.exp(-(((distance[..., None] - centres) / apart) ** 2) / 2)


def poses(rotations: Tensor, translations: Tensor) -> Tensor:
    """(B, N, N, 12) where each residue sees each other one: place and axes in its own frame.

    Distances alone tell no orientation, and bumps as wide as 0.16 nm no bond. Places (nm) are
    u 10 / (1 + |u|), with the resolution of ångströms near by and bounded far away.
    """
    with exact(rotations):
        apart = translations[:, None] - translations[:, :, None]
        place = torch.einsum("biyx,bijy->bijx", rotations, apart)
        axes = torch.einsum("biyx,bjyz->bijxz", rotations, rotations).flatten(-2)
    place = place * 10 / (1 + torch.linalg.vector_norm(place, dim=-1, keepdim=True))
    return torch.cat([place, axes], -1)


class Embedder(nn.Module):
    """Initial features of residues and pairs.

    Args:
        size: widths.
        sequence: embed amino acids.
        node_dim, edge_dim: widths of a pretrained network's features; 0 for none.
    """

    def __init__(self, size: NetworkSize, sequence: bool, node_dim: int, edge_dim: int) -> None:
        super().__init__()
        self.size = size
        inputs = 2 * size.waves + node_dim
        if sequence:
            self.amino_acids = nn.Embedding(AMINO_ACIDS, size.waves)
            inputs += size.waves
        if node_dim:
            self.node_norm = nn.LayerNorm(node_dim)
        if edge_dim:
            self.edge_norm = nn.LayerNorm(edge_dim)
        self.node = Mlp(inputs, size.node, size.node)
        self.node_out = nn.LayerNorm(size.node)
        self.first = linear(size.node, size.edge, bias=False)
        self.second = linear(size.node, size.edge, bias=False)
        self.edge = Mlp(3 * size.waves + 12 + edge_dim + size.edge, size.edge, size.edge)
        self.edge_out = nn.LayerNorm(size.edge)

    def forward(
        self,
        rotations: Tensor,
        translations: Tensor,
        t: Tensor,
        index: Tensor,
        aatype: Tensor | None,
        node: Tensor | None,
        edge: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(B, N, C) and (B, N, N, Z); arguments as those of :class:`Trunk`."""
        width, dtype = self.size.waves, self.first.weight.dtype
        time = waves(1000 * t, width, 1e4)[:, None].expand(-1, index.shape[1], -1)
        parts = [time, waves(index, width, 2e3)]
        if aatype is not None:
            parts.append(self.amino_acids(aatype))
        if node is not None:
            parts.append(self.node_norm(node.to(dtype)))
        nodes = self.node_out(self.node(torch.cat([part.to(dtype) for part in parts], -1)))

        apart = translations[:, :, None] - translations[:, None]
        parts = [
            time[:, :, None].expand(-1, -1, index.shape[1], -1),
            waves(index[:, :, None] - index[:, None], width, 2e3),
            bumps(torch.linalg.vector_norm(apart, dim=-1), width),
            poses(rotations, translations),
            self.first(nodes)[:, :, None] + self.second(nodes)[:, None],
        ]
        if edge is not None:
            parts.append(self.edge_norm(edge.to(dtype)))
        edges = self.edge_out(self.edge(torch.cat([part.to(dtype) for part in parts], -1)))
        return nodes, edges


class Mixer(nn.Module):
    """What a block does to residues: point attention, transformer, transition."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.node)
        self.attention = InvariantPointAttention(size)
        self.skip = linear(size.node, size.skip)
        wide = size.node + size.skip
        self.layers = nn.ModuleList(TransformerLayer(wide, size.heads) for _ in range(size.layers))
        self.narrow = linear(wide, size.node, 0.3)
        self.transition = nn.Sequential(
            nn.LayerNorm(size.node), Mlp(size.node, size.node, size.node, 0.3)
        )

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        rotations: Tensor,
        translations: Tensor,
        mask: Tensor,
        initial: Tensor,
    ) -> Tensor:
        """(B, N, C) from node (B, N, C), with the embedder's node features in `initial`."""
        node = node + self.attention(self.norm(node), edge, rotations, translations, mask)
        wide = torch.cat([node, self.skip(initial)], -1)
        for layer in self.layers:
            wide = layer(wide, mask)
        node = node + self.narrow(wide)
        changed: Tensor = node + self.transition(node)
        return changed * mask[..., None]


class FrameUpdate(nn.Module):
    """Moves each frame in its own axes: algorithm 23 of AlphaFold 2, in units of the noise.

    At small t a prediction is x_t but for a hundredth of what moves at large t, and losses in units
    of the score see errors as large as it: EDM's preconditioning (arXiv 2206.00364, §5).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        # Not zero at the start: rotation losses need an axis between R_t and the prediction.
        self.six = nn.Sequential(nn.LayerNorm(width), linear(width, 6, 0.1))

    def forward(
        self, node: Tensor, rotations: Tensor, translations: Tensor, mask: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, N, 3, 3) and (B, N, 3)."""
        moves = (self.six(node) * mask[..., None]).to(rotations.dtype)
        turn, shift = (
            move * size[:, None]
            for move, size in zip(moves.chunk(2, -1), noise.chunk(2, -1), strict=True)
        )
        with exact(rotations):
            return rotations @ quaternion_rotation(turn), translations + turned(rotations, shift)


def quaternion_rotation(vector: Tensor) -> Tensor:
    """(..., 3, 3) rotation of the quaternion (1, b, c, d) / its length, for (..., 3) b, c, d."""
    square = vector.square().sum(-1)[..., None, None]
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    return torch.eye(3).to(vector) + 2 * (cross + cross @ cross) / (1 + square)


class EdgeUpdate(nn.Module):
    """Updates pairs by both residues: FrameDiff's edge transition."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        half = size.node // 2
        self.narrow = linear(size.node, half)
        self.mlp = Mlp(size.edge + 2 * half, size.edge + half, size.edge)
        self.norm = nn.LayerNorm(size.edge)

    def forward(self, node: Tensor, edge: Tensor) -> Tensor:
        """(B, N, N, Z)."""
        short = self.narrow(node)
        first = short[:, :, None].expand(-1, -1, short.shape[1], -1)
        second = short[:, None].expand(-1, short.shape[1], -1, -1)
        updated: Tensor = self.norm(edge + self.mlp(torch.cat([edge, first, second], -1)))
        return updated


class Block(nn.Module):
    """Mixer, frame update, edge update; the last two only where something reads what they do."""

    def __init__(self, size: NetworkSize, *, moves: bool, edges: bool) -> None:
        super().__init__()
        self.mixer = Mixer(size)
        self.frames = FrameUpdate(size.node) if moves else None
        self.edges = EdgeUpdate(size) if edges else None

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        rotations: Tensor,
        translations: Tensor,
        mask: Tensor,
        initial: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """New node, edge, rotations, translations."""
        node = self.mixer(node, edge, rotations, translations, mask, initial)
        if self.frames is not None:
            rotations, translations = self.frames(node, rotations, translations, mask, noise)
        if self.edges is not None:
            edge = self.edges(node, edge)
        return node, edge, rotations, translations


class Trunk(nn.Module):
    """Embedder and blocks.

    Args:
        size: widths and depths.
        sequence: embed amino acids.
        node_dim, edge_dim: widths of a pretrained network's features; 0 for none.
        moves: whether the last block moves frames. What nobody reads is left out, so that every
            parameter has a gradient (DeepSpeed and DDP want it); nor does it update pairs.
    """

    def __init__(
        self, size: NetworkSize, sequence: bool, node_dim: int, edge_dim: int, *, moves: bool
    ) -> None:
        super().__init__()
        self.embedder = Embedder(size, sequence, node_dim, edge_dim)
        last = size.blocks - 1
        self.blocks = nn.ModuleList(
            Block(size, moves=i < last or moves, edges=i < last) for i in range(size.blocks)
        )
        self.gradient_checkpointing = False
        # Set by transformers' gradient_checkpointing_enable.
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def forward(
        self,
        rotations: Tensor,
        translations: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor,
        index: Tensor,
        aatype: Tensor | None,
        node: Tensor | None,
        edge: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            rotations, translations: (B, N, 3, 3) and (B, N, 3) nm of x_t.
            t: (B,) in (0, 1].
            noise: (B, 2) of x_t: sigma in radians and std in nm, the units of what moves.
            mask: (B, N) bool.
            index: (B, N) numbers of residues in their chain.
            aatype: (B, N) amino acids, 0 to 20; exactly if `sequence`.
            node, edge: (B, N, node_dim) and (B, N, N, edge_dim); exactly if these are not 0.

        Returns:
            node (B, N, C), edge (B, N, N, Z), rotations, translations, and the embedder's node.
        """
        initial, pairs = self.embedder(rotations, translations, t, index, aatype, node, edge)
        nodes = initial = initial * mask[..., None]
        for block in self.blocks:
            inputs = (nodes, pairs, rotations, translations, mask, initial, noise)
            if self.gradient_checkpointing and self.training:
                assert self._gradient_checkpointing_func is not None
                outputs = self._gradient_checkpointing_func(block.__call__, *inputs)
            else:
                outputs = block(*inputs)
            nodes, pairs, rotations, translations = outputs
        return nodes, pairs, rotations, translations, initial
