"""Time-lagged independent components of a reference, and distances of ensembles along them.

Shape legend: S test and R reference structures, N residues. Coordinates are in nm.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparring.launch.errors import SparringError
from sparring.science.confdiff.metrics import (
    Distance,
    Float64,
    FloatArray,
    js_2d,
    js_channels,
    mean_distance,
    pair_distances,
)

TICA_RESIDUES = 64
"""TICA's features are the CA pairs of at most so many residues, evenly spaced: their covariance
matrix would be 28 GB for a chain of 350."""


class TicaModel:
    """Slowest collective variables of a reference trajectory (deeptime's TICA, kinetic map).

    Args:
        reference: CA (R, N, 3) of each continuous trajectory.
        lag: frames.

    Raises:
        SparringError: fewer than three residues; no trajectory longer than the lag; no deeptime.
    """

    def __init__(self, reference: Sequence[FloatArray], lag: int) -> None:
        try:
            from deeptime.decomposition import TICA
        except ModuleNotFoundError:
            raise SparringError('JS-TIC needs deeptime: pip install "sparring[proteins]"') from None
        self._every = -(-reference[0].shape[1] // TICA_RESIDUES) if reference else 1
        usable = [self._features(ca) for ca in reference if len(ca) > lag]
        if lag < 1 or not usable:
            longest = max((len(ca) for ca in reference), default=0)
            raise SparringError(
                f"TICA with a lag of {lag} frames needs a lag of at least 1 and a longer "
                f"trajectory; the longest has {longest} frames"
            )
        if usable[0].shape[1] < 2:
            raise SparringError("TICA in two dimensions needs at least three residues")
        self.model = TICA(lagtime=lag, dim=2, scaling="kinetic_map").fit(usable).fetch_model()
        self.reference = np.concatenate([self(ca) for ca in reference])
        """(R, 2) of all reference structures."""

    def _features(self, ca: FloatArray) -> Float64:
        return pair_distances(ca[:, :: self._every])

    def __call__(self, ca: FloatArray) -> Float64:
        """(S, 2) components of CA (S, N, 3)."""
        components = np.asarray(self.model.transform(self._features(ca)), dtype=np.float64)
        if components.shape[1] < 2:
            raise SparringError(
                "the reference has fewer than two independent slow motions; TICA needs more frames"
            )
        return components

    def js_tic(self, test: FloatArray, log_weights: FloatArray | None = None) -> Distance:
        """JS-TIC: mean of the JS of the first and of the second component."""
        return mean_distance(js_channels(self(test), self.reference, log_weights))

    def js_tic2d(self, test: FloatArray, log_weights: FloatArray | None = None) -> Distance:
        """JS-TIC2D: JS of one histogram of 50 x 50 bins."""
        return js_2d(self(test), self.reference, log_weights)
