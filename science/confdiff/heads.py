"""Networks for what turns the base model's q_t into p_t: the energy E_t, or its gradient F_t.

ConfDiff (arXiv 2403.14088, §3.3) reads both from a trunk that starts as the base model's. Unlike in
the authors' code, forces are R_i v_i with v_i invariant, so that they turn with the frames and stay
as they are when all frames move; they keep their length; and there is a torque for each rotation.

Shape legend: B samples, N residues, C width of nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sparring.launch.errors import SparringError
from sparring.science.confdiff.attention import Mlp
from sparring.science.confdiff.frames import turned
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork, FrameModel
from sparring.science.confdiff.sizes import NetworkSize
from sparring.science.confdiff.trunk import Mixer


class Head(nn.Module):
    """Blocks of attention at the frames of x_t, then one map for each residue.

    Args:
        size: of the trunk.
        blocks: how many; without any, a trunk that is not trained could not tell directions.
        outputs: width.
    """

    def __init__(self, size: NetworkSize, blocks: int, outputs: int) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(Mixer(size) for _ in range(blocks))
        self.norm = nn.LayerNorm(size.node)
        self.out = Mlp(size.node, size.node, outputs, 0.1)

    def forward(
        self,
        node: Tensor,
        edge: Tensor,
        rotations: Tensor,
        translations: Tensor,
        mask: Tensor,
        initial: Tensor,
    ) -> Tensor:
        """(B, N, outputs), 0 where masked."""
        for mixer in self.mixers:
            node = mixer(node, edge, rotations, translations, mask, initial)
        found: Tensor = self.out(self.norm(node)) * mask[..., None]
        return found


class GuidanceModel(FrameModel):
    """A trunk that may stay as the base model's, and heads."""

    def __init__(self, config: ConformationConfig) -> None:
        super().__init__(config)
        self.trunk = config.trunk(moves=False)

    @classmethod
    def from_base(
        cls, base: ConformationNetwork, *, head_blocks: int = 1, train_trunk: bool = True
    ) -> Self:
        """A network with the trunk of a base model, and new heads.

        Args:
            base: the trained model; the guided one, so that features mean the same.
            head_blocks: blocks of attention in each head.
            train_trunk: go on training the trunk; the authors do not.

        Raises:
            SparringError: the base model's trunk is not that of its configuration.
        """
        config = ConformationConfig(
            **{
                name: getattr(base.config, name)
                for name in ("size", "sequence", "node_dim", "edge_dim", "process")
            },
            head_blocks=head_blocks,
            train_trunk=train_trunk,
        )
        made = cls(config)
        # The last block's frame update has no place here: heads read features at x_t's own frames.
        wanted = made.trunk.state_dict()
        given = {k: v for k, v in base.trunk.state_dict().items() if k in wanted}
        if missing := sorted(set(wanted) - set(given)):
            raise SparringError(f"the base model's trunk has no {missing[0]}; train it anew")
        made.trunk.load_state_dict(given)
        made.to(base.dtype)
        return made

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers', which forgets what is not to be trained."""
        found = super().from_pretrained(*args, **kwargs)
        (found[0] if isinstance(found, tuple) else found).freeze()
        return found

    def freeze(self) -> None:
        """Take the trunk out of training if the configuration says so."""
        if not self.config.train_trunk:
            self.trunk.requires_grad_(False)


class EnergyNetwork(GuidanceModel):
    """E_t(x_t) up to a constant of t and chain, without unit; it changes under no motion of all.

    A sum over residues, not the authors' mean: energies of parts add up, so that one network is
    right for short and long chains.
    """

    def __init__(self, config: ConformationConfig) -> None:
        super().__init__(config)
        self.energy = Head(config.shape, config.head_blocks, 1)
        self.post_init()
        self.freeze()

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
    ) -> Tensor:
        """(B,); arguments as those of `ConformationNetwork.forward`."""
        exact = torch.promote_types(self.dtype, torch.float32)
        nodes, pairs, _, _, initial = self.features(
            rotations, translations, t, mask, index, aatype, node, edge
        )
        places = (rotations.to(exact), translations.to(exact))
        found: Tensor = self.energy(nodes, pairs, *places, mask, initial)
        return found.to(exact).sum((-1, -2))


@dataclass
class Forces(ModelOutput):  # type: ignore[misc]
    """What `ForceNetwork` returns."""

    translation: Tensor | None = None
    """(B, N, 3) 1/nm of F_t along the laboratory's axes."""
    rotation: Tensor | None = None
    """(B, N, 3) 1/rad of F_t along each body's axes."""
    energy: Tensor | None = None
    """(B,) E_t, without unit: e^(-E_t) is the mean of weights given x_t, which training needs."""


class ForceNetwork(GuidanceModel):
    """F_t = grad E_t as (1 - t) lambda(t) v, v invariant and of the size of 1; 0 at t = 1.

    lambda are the scores' scales (`Process.score_scale`), so that a loss in units of the scores has
    as much gradient at small t as at large. E_t has a head of its own, which the force's noise then
    disturbs less. Signed as the gradient of the energy: guidance takes it
    away from the score, so that MD's force, minus a gradient, would be its negative.
    """

    def __init__(self, config: ConformationConfig) -> None:
        super().__init__(config)
        self.force = Head(config.shape, config.head_blocks, 6)
        self.energy = Head(config.shape, config.head_blocks, 1)
        self.process = config.diffusion
        self.post_init()
        self.freeze()

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
    ) -> Forces:
        """Arguments as those of `ConformationNetwork.forward`."""
        exact = torch.promote_types(self.dtype, torch.float32)
        nodes, pairs, _, _, initial = self.features(
            rotations, translations, t, mask, index, aatype, node, edge
        )
        rotations, translations = rotations.to(exact), translations.to(exact)
        inputs = (nodes, pairs, rotations, translations, mask, initial)
        early = (1 - t.to(exact))[:, None, None]
        force, torque = (early * self.force(*inputs).to(exact)).chunk(2, -1)
        energy = early * self.energy(*inputs).to(exact)
        scales = [scale.to(force)[:, None, None] for scale in self.process.score_scale(t)]
        return Forces(
            translation=scales[0] * turned(rotations, force),
            rotation=scales[1] * torque,
            energy=energy.sum((-1, -2)),
        )
