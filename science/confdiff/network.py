"""A network that predicts clean frames and torsions of noised frames, in Hugging Face's format.

Shape legend: B samples, N residues, C width of nodes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from sparring.launch.errors import SparringError
from sparring.launch.weights import read_network
from sparring.science.confdiff.attention import initialise, linear
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.rows import TORSIONS
from sparring.science.confdiff.sizes import SIZES, NetworkSize
from sparring.science.confdiff.trunk import Trunk

WEIGHTS = "model.safetensors"


class ConformationConfig(PreTrainedConfig):  # type: ignore[misc]
    """What a network on frames is, and what noise it was trained on."""

    model_type = "sparring-conformation"

    def __init__(
        self,
        size: dict[str, Any] | None = None,
        sequence: bool = True,
        node_dim: int = 0,
        edge_dim: int = 0,
        process: dict[str, Any] | None = None,
        head_blocks: int = 1,
        train_trunk: bool = True,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            size: `NetworkSize` as a table; the tiny one by default.
            sequence: embed amino acids; off for the unconditional model of a mixture.
            node_dim, edge_dim: widths of pretrained features of residues and pairs; 0 for none.
            process: `Process` as a table; the paper's by default.
            head_blocks: blocks of attention in each head of energy and force networks.
            train_trunk: whether those train their trunk too.
            kwargs: transformers' own.
        """
        self.size = size or dataclasses.asdict(SIZES["tiny"])
        self.sequence, self.node_dim, self.edge_dim = sequence, node_dim, edge_dim
        self.process = process or dataclasses.asdict(Process())
        self.head_blocks, self.train_trunk = head_blocks, train_trunk
        super().__init__(**kwargs)

    @property
    def shape(self) -> NetworkSize:
        """`size`, as what it is."""
        return NetworkSize(**self.size)

    @property
    def diffusion(self) -> Process:
        """`process`, as what it is."""
        return Process(**self.process)

    def trunk(self, *, moves: bool) -> Trunk:
        """A new trunk."""
        return Trunk(self.shape, self.sequence, self.node_dim, self.edge_dim, moves=moves)


class FrameModel(PreTrainedModel):  # type: ignore[misc]
    """What networks on frames share: how they start, and what they ask of their input."""

    config_class = ConformationConfig
    base_model_prefix = "trunk"
    main_input_name = "rotations"
    supports_gradient_checkpointing = True
    trunk: Trunk

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module)

    def features(
        self,
        rotations: Tensor,
        translations: Tensor,
        t: Tensor,
        mask: Tensor,
        index: Tensor,
        aatype: Tensor | None,
        node: Tensor | None,
        edge: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The trunk's output; arguments as those of :meth:`ConformationNetwork.forward`.

        Geometry is in float32 where weights or autocast are in half precision: a nanometre in
        bfloat16 is right to half an ångström.

        Raises:
            ValueError: amino acids or pretrained features that the network has no place for, or
                none where it was trained with them.
        """
        config = self.config
        for name, wanted, given in (
            ("aatype", config.sequence, aatype),
            ("node", config.node_dim, node),
            ("edge", config.edge_dim, edge),
        ):
            if (given is not None) != bool(wanted):
                raise ValueError(
                    f"the network was trained with{'' if wanted else 'out'} {name}, and was given "
                    f"{'one' if given is not None else 'none'}"
                )
            if given is not None and name != "aatype" and given.shape[-1] != wanted:
                raise ValueError(f"{name} features are {given.shape[-1]} wide, not {wanted}")
        exact = torch.promote_types(self.dtype, torch.float32)
        rotations, translations = rotations.to(exact), translations.to(exact)
        process = self.config.diffusion
        noise = torch.stack([process.sigma(t), process.std(t)], -1).to(rotations)
        return self.trunk(  # type: ignore[no-any-return]
            rotations, translations, t, noise, mask, index, aatype, node, edge
        )


@dataclass
class Denoised(ModelOutput):  # type: ignore[misc]
    """What `ConformationNetwork` returns."""

    rotations: Tensor | None = None
    """(B, N, 3, 3) predicted R_0."""
    translations: Tensor | None = None
    """(B, N, 3) nm, predicted T_0, in the same place and orientation as x_t."""
    torsions: Tensor | None = None
    """(B, N, 7, 2) sine and cosine of torsions in the order of rows.TORSIONS."""


class TorsionHead(nn.Module):
    """Torsions of residues: AlphaFold 2's algorithm 20, lines 11 to 14."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width = size.node
        self.last, self.first = linear(width, width), linear(width, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.ReLU(), linear(width, width), nn.ReLU(), linear(width, width, 0.3))
            for _ in range(2)
        )
        self.out = nn.Sequential(nn.ReLU(), linear(width, 2 * len(TORSIONS)))

    def forward(self, node: Tensor, initial: Tensor) -> Tensor:
        """(B, N, 7, 2) of unit length from (B, N, C) features at the end and at the start."""
        hidden = self.last(node) + self.first(initial)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        pairs = self.out(hidden).unflatten(-1, (len(TORSIONS), 2))
        pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))
        unit: Tensor = pairs * (pairs.square().sum(-1, keepdim=True) + 1e-8).rsqrt()
        return unit


class ConformationNetwork(FrameModel):
    """E[x_0 | x_t, sequence], as frames relative to x_t, so that they move as x_t moves."""

    def __init__(self, config: ConformationConfig) -> None:
        super().__init__(config)
        self.trunk = config.trunk(moves=True)
        self.torsions = TorsionHead(config.shape)
        self.post_init()

    def forward(
        self,
        rotations: Tensor,
        translations: Tensor,
        t: Tensor,
        *,
        mask: Tensor,
        index: Tensor,
        aatype: Tensor | None = None,
        node: Tensor | None = None,
        edge: Tensor | None = None,
    ) -> Denoised:
        """
        Args:
            rotations: (B, N, 3, 3) of x_t.
            translations: (B, N, 3) nm of x_t.
            t: (B,) in (0, 1].
            mask: (B, N) bool, which residues are there; others change nothing.
            index: (B, N) integers, numbers of residues in their chain.
            aatype: (B, N) integers 0 to 20 (20: unknown), if the network has `sequence`.
            node: (B, N, node_dim) pretrained features of residues, if it has a node_dim.
            edge: (B, N, N, edge_dim) those of pairs, if it has an edge_dim.

        Raises:
            ValueError: see :meth:`features`.
        """
        nodes, _, rotations, translations, initial = self.features(
            rotations, translations, t, mask, index, aatype, node, edge
        )
        return Denoised(
            rotations=rotations,
            translations=translations,
            torsions=self.torsions(nodes, initial),
        )


def load(folder: Path) -> ConformationNetwork:
    """A trained network, in evaluation mode.

    Raises:
        SparringError: the folder holds none.
    """
    return load_as(ConformationNetwork, folder)  # type: ignore[no-any-return]


def load_as(kind: type[FrameModel], folder: Path) -> Any:
    """A trained network of a kind, in evaluation mode.

    Raises:
        SparringError: the folder holds none, or one of another kind.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SparringError(f"{folder} is no network: it has no config.json")
    config = ConformationConfig.from_pretrained(str(folder))
    made = (config.architectures or ["?"])[0]
    if made != kind.__name__:
        raise SparringError(f"{folder} holds a {made}, not a {kind.__name__}")
    return read_network(kind, folder, config=config)
