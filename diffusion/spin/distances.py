"""How far a set of images is from another: Frechet and kernel distance, coverage, on PCA features.

Shapes: N and M images, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]


class Features:
    """Principal components of the real images' thumbnails.

    Stand-in for Inception's, which have to be fetched; distances are comparable within one data set
    and size only.
    """

    def __init__(self, real_ND: Any, components: int = 32) -> None:
        real = np.asarray(real_ND, dtype=np.float64)
        self._mean = real.mean(0)
        _, _, axes = np.linalg.svd(real - self._mean, full_matrices=False)
        self._axes = axes[: min(components, len(real) - 1)]

    def __call__(self, images_MD: Any) -> Array:
        """(M, at most `components`)"""
        centred = np.asarray(images_MD, dtype=np.float64) - self._mean
        return np.asarray(centred @ self._axes.T)


def frechet_distance(a_ND: Array, b_MD: Array) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2), m and S mean and covariance (1706.08500)."""
    gap = a_ND.mean(0) - b_MD.mean(0)
    s_a, s_b = (np.cov(x, rowvar=False) for x in (a_ND, b_MD))
    # tr (S_a S_b)^1/2 from the eigenvalues of the symmetric S_a^1/2 S_b S_a^1/2.
    values, vectors = np.linalg.eigh(s_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ s_b @ root)
    together = np.sqrt(np.maximum(product, 0)).sum()
    return float(gap @ gap + np.trace(s_a) + np.trace(s_b) - 2 * together)


def kernel_distance(real_ND: Array, generated_MD: Array) -> float:
    """Squared distance of means under k(x, y) = (x.y/D + 1)^3, unbiased (arXiv 1801.01401).

    Its mean is 0 for sets of one distribution, whatever their size: Frechet's is not. Features are
    scaled to a mean square of 1 over the real ones. It may be negative.
    """
    scale = np.sqrt((real_ND**2).mean())
    x, y = real_ND / scale, generated_MD / scale

    def kernel(a: Array, b: Array) -> Array:
        return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)

    def among(a: Array) -> float:
        """Mean over pairs of different images."""
        values = kernel(a, a)
        return float((values.sum() - np.trace(values)) / (len(a) * (len(a) - 1)))

    return among(x) + among(y) - 2 * float(kernel(x, y).mean())


def coverage(real_ND: Array, generated_MD: Array, neighbours: int = 5) -> float:
    """Share of real images that have a generated one nearer than their 5th real neighbour.

    Falls when the generator forgets kinds of images (arXiv 2002.09797).
    """
    if not 0 < neighbours < len(real_ND):
        raise ValueError(f"neighbours must be from 1 to {len(real_ND) - 1}, not {neighbours}")
    radius = np.sort(cdist(real_ND, real_ND), axis=1)[:, neighbours]  # column 0 is the image itself
    theirs = cdist(real_ND, generated_MD).min(1)
    return float((theirs <= radius).mean())
