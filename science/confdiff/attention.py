"""Layers on residues: attention to points in space, and what stands around it.

Invariant point attention is AlphaFold 2's algorithm 22 (Jumper et al. 2021, supplement 1.8.2), with
FrameDiff's narrower pair values (arXiv 2302.02277, appendix I). Linear maps whose bias would only
shift all logits of a softmax have none: its gradient would be rounding, which Adam makes steps of.

Shape legend: B samples, N residues, C width of nodes, Z of edges, H heads, D channels, P points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparring.science.confdiff.sizes import NetworkSize


def linear(inputs: int, outputs: int, gain: float = 1.0, *, bias: bool = True) -> nn.Linear:
    """A linear map that keeps variance, times gain; a small one where a residual path ends."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.gain = gain  # type: ignore[assignment]
    initialise(layer)
    return layer


def initialise(module: nn.Module) -> None:
    """Start values of one module: normal matrices with variance gain^2 / inputs, no bias."""
    if isinstance(module, nn.Linear):
        gain = float(getattr(module, "gain", 1.0))  # type: ignore[arg-type]
        nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def exact(like: Tensor) -> torch.autocast:
    """No autocast on that tensor's device: for geometry, which half precision would blur."""
    return torch.autocast(like.device.type, enabled=False)


class Mlp(nn.Sequential):
    """Two hidden layers with SiLU."""

    def __init__(self, inputs: int, hidden: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__(
            linear(inputs, hidden),
            nn.SiLU(),
            linear(hidden, hidden),
            nn.SiLU(),
            linear(hidden, outputs, gain),
        )


class InvariantPointAttention(nn.Module):
    """Attention by content, by pair, and by distance between points that residues carry along.

    Logits of head h between residues i and j (algorithm 22, line 7), with points in nm:

        sqrt(1/3) (q_i k_j / sqrt D + b_ij
                   - gamma_h sqrt(2 / (9 P)) / 2 sum_p |x_i q_ip - x_j k_jp|^2)

    Points are read in the frame of i, so the output stays as it is if all frames move together.
    """

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.size = size
        heads, pair = size.heads, size.edge // 4
        points = 2 * size.query_points + size.value_points
        self.scalars = linear(size.node, heads * 3 * size.channels, bias=False)
        self.points = linear(size.node, heads * points * 3)
        self.pair_bias = linear(size.edge, heads, bias=False)
        self.pair_values = linear(size.edge, pair)
        # softplus makes it 1.
        self.point_weights = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))
        self.out = linear(heads * (size.channels + pair + 4 * size.value_points), size.node, 0.3)

    def forward(
        self, node: Tensor, edge: Tensor, rotations: Tensor, translations: Tensor, mask: Tensor
    ) -> Tensor:
        """
        Args:
            node: (B, N, C).
            edge: (B, N, N, Z).
            rotations, translations: (B, N, 3, 3) and (B, N, 3) nm; may be wider numbers than node.
            mask: (B, N) bool; residues attend to those that are there.

        Returns:
            (B, N, C).
        """
        size = self.size
        q, k, v = self.scalars(node).unflatten(-1, (size.heads, -1)).chunk(3, -1)
        local = self.points(node).unflatten(-1, (size.heads, -1, 3)).to(rotations.dtype)
        with exact(local):
            placed = torch.einsum("bixy,bihpy->bihpx", rotations, local)
        placed = placed + translations[:, :, None, None]
        ends = [size.query_points, size.query_points, size.value_points]
        query_points, key_points, value_points = torch.split(placed, ends, -2)

        logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(size.channels)
        logits = logits + self.pair_bias(edge).movedim(-1, 1)
        apart = ((query_points[:, :, None] - key_points[:, None]) ** 2).sum((-1, -2))
        weights = nn.functional.softplus(self.point_weights) * math.sqrt(
            1 / (18 * size.query_points)
        )
        logits = (logits - (weights * apart).movedim(-1, 1)) * math.sqrt(1 / 3)
        logits = logits.masked_fill(~mask[:, None, None], torch.finfo(logits.dtype).min)
        share = logits.softmax(-1)

        scalars = torch.einsum("bhij,bjhd->bihd", share.to(v.dtype), v)
        pairs = torch.einsum("bhij,bijz->bihz", share.to(v.dtype), self.pair_values(edge))
        with exact(placed):
            points = torch.einsum("bhij,bjhpx->bihpx", share.to(placed.dtype), value_points)
            points = points - translations[:, :, None, None]
            points = torch.einsum("biyx,bihpy->bihpx", rotations, points)
        lengths = (points.square().sum(-1) + 1e-8).sqrt()
        found = [scalars, pairs, points.flatten(-2).to(v.dtype), lengths.to(v.dtype)]
        mixed: Tensor = self.out(torch.cat(found, -1).flatten(-2))
        return mixed


class TransformerLayer(nn.Module):
    """Attention among residues and a two-layer map, each after a LayerNorm and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = linear(width, 3 * width, bias=False)
        self.out = linear(width, width, 0.3)
        self.transition = nn.Sequential(
            nn.LayerNorm(width), linear(width, width), nn.ReLU(), linear(width, width, 0.3)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, N, width) of the same shape; mask (B, N) bool."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        changed: Tensor = x + self.transition(x)
        return changed
