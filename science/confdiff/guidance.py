"""Score functions: of networks, mixed, and guided by an energy or a force.

    mixture    gamma s_cond + (1 - gamma) s_uncond              ConfDiff, arXiv 2403.14088, §3.2
    guided     s - eta grad E_t                                 ibid., §3.3

Only eta = 1 with the exact E_t of the same q_0 samples q_0 e^(-k E); a mixture has another q_0 than
its parts, so that with gamma < 1 guidance is an approximation. On a line with q_0 = N(0, 1) and
k E = (x - 1.5)^2 / 2, that is N(0.75, 0.5); eta = 2 gives N(1.125, 0.298), not the N(1.0, 0.333) of
the doubled energy, and E_0's gradient at all times N(1.006, 0.337). For another eta, weigh the
samples (smc.py).

Shape legend: B samples, N residues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.heads import EnergyNetwork, ForceNetwork
from sparring.science.confdiff.network import ConformationNetwork
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.solvers import ScoreFunction
from sparring.science.confdiff.tangent import Score, Tangent, moved_along

EnergyFunction = Callable[[Frames, float], Tensor]
"""(x_t, t) -> E_t (B,), without unit."""
ForceFunction = Callable[[Frames, float], Tangent]
"""(x_t, t) -> F_t = grad E_t, (B, N, 3) in 1/nm and 1/rad."""


@dataclass(frozen=True, kw_only=True)
class Chains:
    """What networks are told of B chains beside their frames and the time."""

    mask: Tensor
    """(B, N) bool: which residues are there."""
    index: Tensor
    """(B, N) integers: numbers of residues in their chain."""
    aatype: Tensor | None = None
    """(B, N) integers, 0 to 20."""
    node: Tensor | None = None
    """(B, N, node_dim) pretrained features of residues."""
    edge: Tensor | None = None
    """(B, N, N, edge_dim) those of pairs."""

    def inputs(self, config: object) -> dict[str, Tensor | None]:
        """Keyword arguments of a network with this configuration: what it was trained with."""
        return {
            "mask": self.mask,
            "index": self.index,
            "aatype": self.aatype if getattr(config, "sequence", False) else None,
            "node": self.node if getattr(config, "node_dim", 0) else None,
            "edge": self.edge if getattr(config, "edge_dim", 0) else None,
        }


@dataclass(frozen=True)
class NetworkScore:
    """The score that a base model means by its prediction of x_0: that of q(x_t | x_0)."""

    network: ConformationNetwork
    process: Process
    chains: Chains

    def __call__(self, x: Frames, t: float) -> Score:
        """With x0 and torsions."""
        out = self.network(*_inputs(x, t), **self.chains.inputs(self.network.config))
        x0 = Frames(out.rotations, out.translations).to(x.rotations.dtype)
        score = self.process.score_given(x, x0, t, self.chains.mask)
        return Score(score.translation, score.rotation, x0, out.torsions)


@dataclass(frozen=True)
class NetworkEnergy:
    """E_t of an energy network."""

    network: EnergyNetwork
    chains: Chains

    def __call__(self, x: Frames, t: float) -> Tensor:
        """(B,)"""
        energy: Tensor = self.network(*_inputs(x, t), **self.chains.inputs(self.network.config))
        return energy


@dataclass(frozen=True)
class NetworkForce:
    """F_t of a force network, without motion of the centre."""

    network: ForceNetwork
    chains: Chains

    def __call__(self, x: Frames, t: float) -> Tangent:
        """(B, N, 3)"""
        out = self.network(*_inputs(x, t), **self.chains.inputs(self.network.config))
        return Tangent(out.translation, out.rotation).projected(self.chains.mask)


@dataclass(frozen=True)
class Mixture:
    """gamma s_cond + (1 - gamma) s_uncond, translations and rotations; x0 is the conditional's.

    Args:
        conditional: the score with the sequence.
        unconditional: that without; it is not called if gamma = 1.
        gamma: 1 is the conditional model alone; the paper pools 0.5 to 1.
    """

    conditional: ScoreFunction
    unconditional: ScoreFunction
    gamma: float

    def __call__(self, x: Frames, t: float) -> Score:
        """The mixed score."""
        score = self.conditional(x, t)
        if self.gamma == 1:
            return score
        other = self.unconditional(x, t)
        mixed = score.times(self.gamma).plus(other, 1 - self.gamma)
        return Score(mixed.translation, mixed.rotation, score.x0, score.torsions)


@dataclass(frozen=True)
class ForceGuidance:
    """s - eta F_t, translations and rotations, F_t with its magnitude.

    Args:
        score: of the base model.
        force: F_t = grad E_t (MD's force has the other sign).
        eta: 1 for p_0 ~ q_0 e^(-k E); see the top of this file.
    """

    score: ScoreFunction
    force: ForceFunction
    eta: float = 1.0

    def __call__(self, x: Frames, t: float) -> Score:
        """The guided score; x0 and torsions are the base model's at the guided x_t."""
        score = self.score(x, t)
        return score if self.eta == 0 else score.moved(self.force(x, t), -self.eta)


@dataclass(frozen=True)
class EnergyGradient:
    """F_t as the gradient of E_t: along T, and along the body's axes for R.

    Args:
        energy: E_t.
        mask: (B, N) bool; the motion of the centre is taken out.
    """

    energy: EnergyFunction
    mask: Tensor

    def __call__(self, x: Frames, t: float) -> Tangent:
        """(B, N, 3)"""
        with torch.enable_grad():
            step = no_step(x)
            energy = self.energy(moved_along(x, step), t)
            return slope(energy, step, self.mask)


def no_step(x: Frames) -> Tangent:
    """(B, N, 3) zeros that ask for a gradient: `moved_along` them, a function of x has a slope."""
    zeros = torch.zeros_like(x.translations)
    return Tangent(zeros.clone().requires_grad_(), zeros.requires_grad_())


def slope(energy: Tensor, step: Tangent, mask: Tensor) -> Tangent:
    """grad E along the step it was computed with: along T, and along the body's axes for R.

    Args:
        energy: (B,), each a function of its own sample alone.
        step: of :func:`no_step`.
        mask: (B, N) bool; the motion of the centre is taken out.
    """
    # An energy of translations alone has no gradient along rotations, and the reverse.
    gradients = torch.autograd.grad(
        energy.sum(),
        (step.translation, step.rotation),
        allow_unused=True,
        materialize_grads=True,
    )
    return Tangent(*gradients).projected(mask)


def energy_guidance(
    score: ScoreFunction, energy: EnergyFunction, mask: Tensor, eta: float = 1.0
) -> ForceGuidance:
    """s - eta grad E_t of an energy; see :class:`ForceGuidance`."""
    return ForceGuidance(score, EnergyGradient(energy, mask), eta)


def _inputs(x: Frames, t: float) -> tuple[Tensor, Tensor, Tensor]:
    time = torch.full(x.translations.shape[:1], t, dtype=torch.float64, device=x.rotations.device)
    return x.rotations, x.translations, time
