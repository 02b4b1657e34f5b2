"""IGSO(3): where Brownian motion on SO(3) is after the time eps^2, as density, score and draws.

In FrameDiff's convention (arXiv 2302.02277, §3.1): R = R_0 exp(v) with density f(|v|, eps) relative
to the uniform distribution, a function of the angle omega = |v| alone,

    f(omega, eps) = sum_l (2 l + 1) exp(-l (l + 1) eps^2 / 2) sin((l + 1/2) omega) / sin(omega / 2)

so that E[tr R] = 3 exp(-eps^2); eps is sqrt(2) times that of Leach et al. The series needs a
thousand terms at eps = 0.1 and cancels to nothing where f is small. Poisson's summation turns it
into images of the angle at 2 pi n, which need seven terms and lose no digits where eps <= 2:

    f = sqrt(pi) (eps / sqrt 2)^-3 exp(eps^2 / 8 - omega^2 / (2 eps^2)) A / (2 sin(omega / 2))
    A = sum_n (-1)^n (omega - 2 pi n) exp(-2 pi n (pi n - omega) / eps^2)

Above 2 the series needs four. So nothing is tabulated or interpolated over eps: all is computed
in float64 where it is asked for, on the device of what is given.

Shape legend: ... any, B samples, N residues, K cells of a grid of angles.
"""

from __future__ import annotations

import math

import roma
import torch
from torch import Tensor

IMAGES = 3
"""|n| of the images: the next one is below 1e-25 of the sum where eps <= WIDE."""
WIDE = 2.0
"""Radians: above it the series is used."""
TERMS = 4
"""l of the series: the next one is below 1e-24 where eps > WIDE."""
SMALL = 1e-3
"""Radians: below it score / angle, an even function, is taken as constant; the error is 1e-9."""
UNIFORM = 8.0
"""eps of the uniform distribution: the first term of the series is 1e-27."""
CELLS = 512
"""K, over ten eps or 0 to pi: the distribution function is right to 1e-4."""
NORM_CELLS = 64
"""K of a mean over angles, whose integrand is smooth and even at both ends: right to 1e-12."""


def log_density(angle: Tensor, eps: Tensor | float) -> Tensor:
    """log f(omega, eps), relative to the uniform distribution (its log density is 0).

    Args:
        angle: (...) omega in [0, pi].
        eps: (...) broadcast with it, > 0.

    Returns:
        (...) float64.
    """
    angle, eps = _doubles(angle, eps)
    # A and the sine both vanish at 0; their quotient is even and smooth.
    omega = angle.clamp_min(1e-5)
    images, _ = _images(omega, eps.clamp_max(WIDE))
    narrow = (
        0.5 * math.log(math.pi)
        - 3 * (eps / math.sqrt(2)).log()
        + eps**2 / 8
        - angle**2 / (2 * eps**2)
        + (images / (2 * (omega / 2).sin())).log()
    )
    if not bool((eps > WIDE).any()):  # saves half of the time, for it is rare
        return narrow
    series, _ = _series(angle, eps.clamp_min(WIDE))
    return torch.where(eps > WIDE, series.log(), narrow)


def angle_density(angle: Tensor, eps: Tensor | float) -> Tensor:
    """(...) density of omega on [0, pi], f (1 - cos omega) / pi, per radian."""
    angle, eps = _doubles(angle, eps)
    return log_density(angle, eps).exp() * (1 - angle.cos()) / math.pi


def score_over_angle(angle: Tensor, eps: Tensor | float) -> Tensor:
    """(d log f / d omega) / omega: what a rotation vector is multiplied by to get its score.

    It tends to -(1 / eps^2 - 1 / 12) at 0 if eps is small, so that the score is that of a Gaussian.

    Args:
        angle: (...) omega in [0, pi].
        eps: (...) broadcast with it, > 0.

    Returns:
        (...) float64, 1 / rad^2.
    """
    angle, eps = _doubles(angle, eps)
    omega = angle.clamp_min(SMALL)
    images, slope = _images(omega, eps.clamp_max(WIDE))
    narrow = (slope / images - 0.5 / (omega / 2).tan()) / omega - 1 / eps**2
    if not bool((eps > WIDE).any()):
        return narrow
    series, series_slope = _series(omega, eps.clamp_min(WIDE))
    return torch.where(eps > WIDE, series_slope / (series * omega), narrow)


def score(vector: Tensor, eps: Tensor | float) -> Tensor:
    """Gradient of log f along the body's axes: of delta -> log f(|log(exp(v) exp(delta))|) at 0.

    Args:
        vector: (..., 3) v = log(R_0^T R), radians.
        eps: (...) broadcast with the angles.

    Returns:
        (..., 3) 1 / rad, of vector's number type.
    """
    angle = torch.linalg.vector_norm(vector, dim=-1)
    factor = score_over_angle(angle, eps)
    return (factor[..., None] * vector).to(vector.dtype)


def log_rotation(rotation: Tensor) -> Tensor:
    """(..., 3) rotation vector, at most pi long, of rotations (..., 3, 3)."""
    vector: Tensor = roma.rotmat_to_rotvec(rotation)
    return vector


def exp_rotation(vector: Tensor) -> Tensor:
    """(..., 3, 3) rotation by a rotation vector (..., 3) in radians."""
    rotation: Tensor = roma.rotvec_to_rotmat(vector)
    return rotation


def sample(gaussian: Tensor, eps: Tensor) -> Tensor:
    """Rotation vectors of IGSO(3), by inverting the distribution function of the angle.

    The direction is that of the Gaussian, and the angle has the quantile that the Gaussian's length
    has among lengths: v is eps z if eps is small, and as smooth a function of z always.

    Args:
        gaussian: (B, N, 3) standard normal z.
        eps: (B,) > 0; UNIFORM and more for uniform rotations.

    Returns:
        (B, N, 3) v in radians, of gaussian's number type.
    """
    z = gaussian.double()
    length = torch.linalg.vector_norm(z, dim=-1)
    quantile = torch.erf(length / math.sqrt(2)) - math.sqrt(2 / math.pi) * length * torch.exp(
        -(length**2) / 2
    )
    # A batch at one time, as in sampling, needs one row.
    widths, row = torch.unique(eps.double(), return_inverse=True)
    edges, distribution = (table[row] for table in _distribution(widths))
    cell = torch.searchsorted(distribution, quantile).clamp(1, CELLS)
    low, high = distribution.gather(-1, cell - 1), distribution.gather(-1, cell)
    part = ((quantile - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    angle = edges[:, 1:2] * (cell - 1 + part)
    vector: Tensor = z * (angle / length.clamp_min(1e-300))[..., None]
    return vector.to(gaussian.dtype)


def score_norm(eps: Tensor) -> Tensor:
    """lambda_R = sqrt(E|score|^2 / 3): root mean square of a score's component, 1 / rad.

    Args:
        eps: (...) > 0.

    Returns:
        (...) float64; 1 / eps if eps is small.
    """
    widths, row = torch.unique(eps.double(), return_inverse=True)
    middles, width = _middles(widths[:, None], NORM_CELLS)
    square = (score_over_angle(middles, widths[:, None]) * middles) ** 2
    mean = (square * angle_density(middles, widths[:, None])).sum(-1) * width[:, 0]
    norm: Tensor = (mean / 3).sqrt()[row]
    return norm


def _distribution(eps_B: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K + 1) edges of cells of angles and the distribution function there, from 0 to 1."""
    middles, width = _middles(eps_B[:, None], CELLS)
    sums = angle_density(middles, eps_B[:, None]).cumsum(-1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], -1)
    edges = width * torch.arange(CELLS + 1, device=width.device)
    return edges, sums / sums[:, -1:]


def _middles(eps: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """(..., K) middles of cells and their width (..., 1), for eps (..., 1)."""
    width = (10 * eps).clamp_max(math.pi) / cells
    return width * (torch.arange(cells, device=eps.device) + 0.5), width


def _images(omega: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """A and dA / d omega."""
    total, slope = omega, torch.ones_like(omega)
    for n in (*range(-IMAGES, 0), *range(1, IMAGES + 1)):
        image = omega - 2 * math.pi * n
        factor = (-1) ** n * torch.exp(-2 * math.pi * n * (math.pi * n - omega) / eps**2)
        total = total + factor * image
        slope = slope + factor * (1 + image * 2 * math.pi * n / eps**2)
    return total, slope


def _series(omega: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """f and df / d omega; the character of l is 1 + 2 sum_{m <= l} cos(m omega)."""
    character = total = torch.ones_like(omega * eps)
    slope = change = torch.zeros_like(total)
    for order in range(1, TERMS + 1):
        character = character + 2 * (order * omega).cos()
        change = change - 2 * order * (order * omega).sin()
        factor = (2 * order + 1) * torch.exp(-order * (order + 1) * eps**2 / 2)
        total, slope = total + factor * character, slope + factor * change
    return total, slope


def _doubles(angle: Tensor, eps: Tensor | float) -> tuple[Tensor, Tensor]:
    return angle.double(), torch.as_tensor(eps, dtype=torch.float64, device=angle.device)
