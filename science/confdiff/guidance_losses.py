"""Losses of what turns q_0, the base model, into p_0 ~ q_0 e^(-k E): pure functions, unreduced.

With E_t(x_t) = -log E[e^(-k E(x_0)) | x_t], log p_t = log q_t - E_t + const. Two estimators that
agree (tests/science/confdiff/test_guidance_losses.py):

    contrastive energy prediction   fits E_t   (Lu et al., arXiv 2304.12824; ConfDiff's Energy)
    weighted score matching         fits F_t = grad E_t (as in arXiv 2503.04975; ConfDiff's Force
                                    has the same target, by importance sampling in a batch), with
                                    the slope of an energy that is learnt beside it

Weights e^(-k E) may be large, so callers divide them by their mean over the *data set*: a constant,
which moves no minimum. Dividing by the mean of a batch does.

Shape legend: B samples, G groups, K samples of a group, N residues.
"""

from __future__ import annotations

from torch import Tensor

from sparring.science.confdiff.config import GAS_CONSTANT
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.losses import masked_mean, tangent_dot
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Tangent


def boltzmann_weights(energies: Tensor) -> Tensor:
    """e^(-k E) over its mean over the data set, without overflow.

    Args:
        energies: (D,) k E of all of the data, without unit: U (1 / (R T_low) - 1 / (R T_high)) to
            go from one temperature to another.

    Returns:
        (D,) float64 with mean 1.

    Raises:
        ValueError: an energy that is not finite.
    """
    if not bool(energies.isfinite().all()):
        bad = int((~energies.isfinite()).sum())
        raise ValueError(f"{bad} of {len(energies)} energies are not finite; leave these rows out")
    shares: Tensor = (-energies.double()).softmax(0) * len(energies)
    return shares


def contrastive_energy_loss(energies: Tensor, weights: Tensor) -> Tensor:
    """L_CEP = - sum_i w_i log(e^(-f_i) / sum_j e^(-f_j)) / K, at its least if f = E_t + const.

    That holds for each K >= 2 if weights are those of the data set: given the K noisy samples,
    w_i has the mean e^(-E_t(x_i)). The authors divide by the batch's sum, which is right for large
    K alone.

    Args:
        energies: (G, K) f(x_t, t); a group's samples share their chain and t.
        weights: (G, K) e^(-k E(x_0)), over its mean over the data set.

    Returns:
        (G,) nats.

    Raises:
        ValueError: a group of one, from which there is nothing to learn.
    """
    if energies.shape[-1] < 2:
        raise ValueError("a group needs two samples or more, of one chain and with one t")
    log_share = (-energies).log_softmax(-1)
    return -(weights.to(log_share) * log_share).mean(-1)


def force_loss(
    force: Tangent,
    base_score: Tangent,
    conditional_score: Tangent,
    weights: Tensor,
    expected: Tensor,
    t: Tensor,
    mask: Tensor,
    process: Process,
) -> Tensor:
    """w |h|^2 - 2 (w - c) h d, d = s_q(x_t) - grad log q(x_t | x_0); least if h = F_t.

    With c = 0 that is weighted score matching, w |d - h|^2 but for a constant: h is the mean of d
    over p(x_0 | x_t) ~ q(x_0 | x_t) w(x_0), s_q - s_p. As E[d | x_t] = 0, any c(x_t) leaves this
    minimum where it is; near c = E[w | x_t] the noise of d is multiplied by w - c in place of w.
    (With c = 0 a guide would also learn the error of a base model that is not s_q.) In units of the
    scores, translations and rotations together.

    Args:
        force: (B, N, 3) h, 1/nm and 1/rad.
        base_score: (B, N, 3) s_q(x_t), of the trained base model, without gradient.
        conditional_score: (B, N, 3) `Process.score_given`.
        weights: (B,) e^(-k E(x_0)), over its mean over the data set.
        expected: (B,) c, an estimate of E[w | x_t], without gradient.
        t: (B,).
        mask: (B, N) bool.
        process: whose scales.

    Returns:
        (B,)
    """
    noise = base_score.plus(conditional_score, -1.0)
    w, apart = (v.to(force.translation)[:, None, None] for v in (weights, weights - expected))
    return tangent_dot(force, force.times(w).plus(noise, -2 * apart), t, mask, process)


def consistency_loss(
    force: Tangent, slope: Tangent, t: Tensor, mask: Tensor, process: Process
) -> Tensor:
    """|h - grad f|^2: at the common minimum of h and f both are F_t = grad E_t.

    So it moves no minimum, whatever its weight. A value is far easier to learn from weights than a
    gradient, whose noise is that of the scores; h takes from f what f has already learnt.

    Args:
        force: (B, N, 3) h, 1/nm and 1/rad.
        slope: (B, N, 3) grad f, of :func:`mean_weight_loss`'s energy, without gradient.
        t: (B,).
        mask: (B, N) bool.
        process: whose scales.

    Returns:
        (B,), in units of the scores.
    """
    apart = force.plus(slope, -1.0)
    return tangent_dot(apart, apart, t, mask, process)


def mean_weight_loss(energy: Tensor, weights: Tensor) -> Tensor:
    """e^(-f) + w f, at its least if e^(-f) = E[w | x_t], f = E_t; 1 if f = 0 and w has its mean.

    Poisson's likelihood, whose slope grows with w only, where a square's grows with w e^(-f).

    Args:
        energy: (B,) f(x_t, t).
        weights: (B,) e^(-k E(x_0)), over its mean over the data set.

    Returns:
        (B,)
    """
    return (-energy).exp() + weights.to(energy) * energy


def anchor_target(
    base_score: Tangent, forces: Tensor, frames: Frames, temperature: float, mask: Tensor
) -> Tangent:
    """s_q - f / (R T_target), (B, N, 3): its mean with weights w given x_0 is F_0.

    For s_q = E[f | x] / (R T_data) and s_p = E[w f | x] / E[w | x] / (R T_target) at t = 0, and
    F_0 = s_q - s_p: the mean force, not that of one structure.

    Args:
        base_score: (B, N, 3) s_q of frames.
        forces: (B, N, 6) simulated forces f = -grad U in kJ/mol/nm and torques in kJ/mol, along
            the laboratory's axes.
        frames: (B, N) clean frames.
        temperature: T_target in K.
        mask: (B, N) bool.
    """
    reduced = (forces / (GAS_CONSTANT * temperature)).to(base_score.translation)
    # Torques act about each body's own axes.
    torque = (reduced[..., None, 3:] @ frames.rotations.to(reduced))[..., 0, :]
    simulated = Tangent(reduced[..., :3], torque).projected(mask)
    return base_score.plus(simulated, -1.0)


def force_anchor_loss(force: Tangent, target: Tangent, mask: Tensor, weights: Tensor) -> Tensor:
    """w mean_i |F_0 - target|^2 at t = 0, where F_0 = grad (k E): ConfDiff's anchor by MD's forces.

    With the target of :func:`anchor_target` and weights w it is least at F_0. Forces of single
    structures are very noisy: give this a low weight, or none; :func:`force_loss` alone is exact.

    Args:
        force: (B, N, 3) F_0, 1/nm and 1/rad.
        target: (B, N, 3) in the same units, torques along the body's axes.
        mask: (B, N) bool.
        weights: (B,) e^(-k E(x_0)), over its mean over the data set.

    Returns:
        (B,) 1/nm^2 plus 1/rad^2.
    """
    apart = force.plus(target, -1.0)
    square = apart.translation.square().sum(-1) + apart.rotation.square().sum(-1)
    mean = masked_mean(square, mask)
    return weights.to(mean) * mean
