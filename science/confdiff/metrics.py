"""Distances between ensembles by their histograms, validity of structures, and weights.

Definitions are those of ConfDiff's evaluation (arXiv 2403.14088), of which two differ from common
use: JS is the Jensen-Shannon *distance*, the root of the divergence in nats, at most
sqrt(ln 2) = 0.8326; and histograms span the reference's range, so test samples outside are not
counted. Each JS comes with its hit rate, the share of test samples inside.

Shape legend: S test and R reference structures, N residues, C channels. Coordinates are in nm.
`log_weights` (S,) weight the test structures, up to a common constant; None is all alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import rel_entr

from sparring.launch.errors import SparringError

FloatArray = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]

BINS = 50
PSEUDO_COUNT = 1e-6
_FLAT = 1e-9
CLASH = 0.30
"""nm: two CA radii of 0.17 less 0.04 of overlap."""
CA_BREAK = 0.42
"""nm: 0.38 between neighbouring CA and 0.04 more."""
PEPTIDE_BREAK = 0.14
"""nm of C-N."""
CONTACT = 1.0
"""nm between CA."""
_BLOCK = 256


class Distance(NamedTuple):
    """A Jensen-Shannon distance, mean over its channels."""

    js: float
    """In [0, 0.8326]."""
    hit_rate: float
    """Share of the test's weight inside the reference's range, mean over channels, in [0, 1]."""


def normalised(log_weights: FloatArray | None, count: int) -> Float64:
    """(S,) weights that sum to 1.

    Raises:
        SparringError: not `count` numbers, or none of them finite, or NaN.
    """
    if log_weights is None:
        return np.full(count, 1 / count)
    logs = np.asarray(log_weights, dtype=np.float64)
    if logs.shape != (count,) or np.isnan(logs).any() or not np.isfinite(logs.max()):
        raise SparringError(
            f"log_weights must be {count} numbers, not NaN and not all -inf; got shape {logs.shape}"
        )
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def effective_sample_size(log_weights: FloatArray) -> float:
    """Kish's 1 / sum w^2 of normalised weights, as a share of their number, in (0, 1]."""
    weights = normalised(log_weights, len(log_weights))
    return float(1 / (weights**2).sum() / len(weights))


def weighted_mean(values: FloatArray, log_weights: FloatArray | None = None) -> float:
    """Mean over structures of values (S,), as of energies in kJ/mol."""
    return float(normalised(log_weights, len(values)) @ np.asarray(values, dtype=np.float64))


def js_channels(
    test: FloatArray,
    reference: FloatArray,
    log_weights: FloatArray | None = None,
    limits: tuple[float, float] | None = None,
    bins: int = BINS,
) -> tuple[Float64, Float64]:
    """JS distance and hit rate of each channel.

    Args:
        test: (S, C).
        reference: (R, C).
        log_weights: (S,).
        limits: range of the histograms; without it the reference's.
        bins: of each histogram.

    Returns:
        (C,) distances and (C,) hit rates.
    """
    test, reference = np.asarray(test, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    _check(test, reference)
    weights = normalised(log_weights, len(test))
    js, hits = np.empty(test.shape[1]), np.empty(test.shape[1])
    for channel in range(test.shape[1]):
        spanned = reference[:, channel]
        low, high = limits or (spanned.min(), spanned.max())
        if high - low < _FLAT:  # numpy widens a range of nothing so, but not one of rounding
            low, high = low - 0.5, high + 0.5
        counts, edges = np.histogram(spanned, bins, range=(low, high))
        mine, _ = np.histogram(test[:, channel], edges, weights=weights)
        hits[channel] = mine.sum()
        js[channel] = _js(len(test) * mine, counts)
    return js, hits


def _js(test_counts: FloatArray, counts: FloatArray) -> float:
    p, q = (np.asarray(c, dtype=np.float64).ravel() + PSEUDO_COUNT for c in (test_counts, counts))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / 2
    # scipy's jensenshannon takes the root of rounding errors below zero: NaN for equal histograms.
    return float(np.sqrt(max(divergence, 0.0)))


def _check(test: FloatArray, reference: FloatArray) -> None:
    if test.ndim != 2 or reference.ndim != 2 or test.shape[1] != reference.shape[1]:
        raise SparringError(
            f"test {test.shape} and reference {reference.shape} must have the same channels; are "
            "they the same chain?"
        )
    for name, array in (("test", test), ("reference", reference)):
        if not len(array):
            raise SparringError(f"the {name} ensemble is empty")
        if not np.isfinite(array).all():
            bad = int(np.argmin(np.isfinite(array).all(axis=1)))
            raise SparringError(f"structure {bad} of the {name} ensemble is not finite; drop it")


def mean_distance(channels: tuple[Float64, Float64]) -> Distance:
    """Of what `js_channels` gives, the mean over channels."""
    return Distance(float(channels[0].mean()), float(channels[1].mean()))


def pair_distances(ca: FloatArray, separation: int = 1) -> Float64:
    """(S, pairs) nm between CA (S, N, 3) of residues |i - j| >= separation.

    Raises:
        SparringError: the chain is too short for any pair.
    """
    ca = np.asarray(ca, dtype=np.float64)
    size = ca.shape[1]
    i, j = np.triu_indices(size, separation)
    if not len(i):
        raise SparringError(
            f"a chain of {size} residues has no pair {separation} apart; this metric needs "
            f"at least {separation + 1} residues"
        )
    found = np.empty((len(ca), len(i)))
    for start in range(0, len(ca), _BLOCK):  # vectors take three times the room, twice
        block = ca[start : start + _BLOCK]
        found[start : start + _BLOCK] = np.linalg.norm(block[:, i] - block[:, j], axis=-1)
    return found


def js_pwd(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None
) -> Distance:
    """JS-PwD: mean over CA pairs with |i - j| >= 3 of the JS of their distance.

    Args:
        test: (S, N, 3) CA.
        reference: (R, N, 3) CA.
        log_weights: (S,).

    Raises:
        SparringError: fewer than four residues; other chains; structures that are not finite.
    """
    return mean_distance(
        js_channels(pair_distances(test, 3), pair_distances(reference, 3), log_weights)
    )


def centre_distances(ca: FloatArray) -> Float64:
    """(S, N) nm from each CA to the mean of all."""
    ca = np.asarray(ca, dtype=np.float64)
    return np.asarray(np.linalg.norm(ca - ca.mean(axis=1, keepdims=True), axis=-1))


def radius_of_gyration(ca: FloatArray) -> Float64:
    """(S,) nm, of CA (S, N, 3)."""
    return np.asarray(np.sqrt((centre_distances(ca) ** 2).mean(axis=1)))


def js_rg_per_residue(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None
) -> Distance:
    """ConfDiff's JS-Rg: mean over residues of the JS of CA's distance to the centre.

    Not comparable with :func:`js_rg`. Arguments as js_pwd.
    """
    return mean_distance(
        js_channels(centre_distances(test), centre_distances(reference), log_weights)
    )


def js_rg(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None
) -> Distance:
    """The usual JS-Rg (Str2Str): JS of one number a structure, the radius of gyration."""
    ours, theirs = radius_of_gyration(test)[:, None], radius_of_gyration(reference)[:, None]
    return mean_distance(js_channels(ours, theirs, log_weights))


def js_2d(
    test: FloatArray,
    reference: FloatArray,
    log_weights: FloatArray | None = None,
    limits: tuple[float, float] | None = None,
    bins: int = BINS,
) -> Distance:
    """JS of a histogram over two channels; arguments as js_channels with C = 2."""
    _check(test, reference)
    weights = normalised(log_weights, len(test))
    span: Any = None if limits is None else [limits, limits]
    counts, *edges = np.histogram2d(reference[:, 0], reference[:, 1], bins, span)
    mine, *_ = np.histogram2d(test[:, 0], test[:, 1], edges, weights=weights)
    return Distance(_js(len(test) * mine, counts), float(mine.sum()))


def js_phi_psi(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None
) -> Distance:
    """Mean over the backbone torsions of their JS, 50 bins over the whole circle.

    Args:
        test: (S, N, K) radians, as phi and psi of atoms.backbone_torsions; a torsion that is NaN
            in the first reference structure is no channel.
        reference: (R, N, K).
        log_weights: (S,).
    """
    flat = [np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (test, reference)]
    defined = np.isfinite(flat[1][0])
    ours, theirs = (_circle(x[:, defined]) for x in flat)
    return mean_distance(js_channels(ours, theirs, log_weights, (-np.pi, np.pi)))


def js_ramachandran(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None, bins: int = BINS
) -> Distance:
    """Mean over residues with phi and psi of the JS of their joint histogram; as js_phi_psi."""
    found = [
        js_2d(_circle(test[:, i]), _circle(reference[:, i]), log_weights, (-np.pi, np.pi), bins)
        for i in range(np.shape(reference)[1])
        if np.isfinite(reference[0, i]).all()
    ]
    if not found:
        raise SparringError("no residue has both phi and psi")
    return Distance(*(float(np.mean([d[k] for d in found])) for k in range(2)))


def _circle(angles: FloatArray) -> Float64:
    """Angles in [-pi, pi), whatever turn and rounding they come with."""
    return np.asarray((np.asarray(angles, dtype=np.float64) + np.pi) % (2 * np.pi) - np.pi)


def val_clash(ca: FloatArray, log_weights: FloatArray | None = None) -> float:
    """Val-Clash(CA): share of structures where no two CA (S, N, 3) are nearer than 0.30 nm."""
    valid = pair_distances(ca).min(axis=1) >= CLASH
    return weighted_mean(valid.astype(np.float64), log_weights)


def val_break(ca: FloatArray, log_weights: FloatArray | None = None) -> float:
    """Val-Break(CA): share of structures where no neighbouring CA are farther than 0.42 nm."""
    steps = np.linalg.norm(np.diff(ca, axis=1), axis=-1)
    return weighted_mean((steps.max(axis=1) <= CA_BREAK).astype(np.float64), log_weights)


def peptide_break(atoms: FloatArray, log_weights: FloatArray | None = None) -> float:
    """Share of peptide bonds C-N longer than 0.14 nm, of atoms (S, N, 14, 3)."""
    bonds = np.linalg.norm(atoms[:, 1:, 0] - atoms[:, :-1, 2], axis=-1)
    return weighted_mean((bonds > PEPTIDE_BREAK).mean(axis=1), log_weights)


def rmse_contact(
    test: FloatArray, reference: FloatArray, log_weights: FloatArray | None = None
) -> float:
    """Root of the mean over residue pairs of the squared difference of contact probabilities.

    A contact is CA-CA < 1.0 nm. The authors' code takes the root of the *sum* over pairs, which
    grows with the chain: theirs is this times sqrt(N (N - 1) / 2).
    """
    probability = normalised(log_weights, len(test)) @ (pair_distances(test) < CONTACT)
    return float(
        np.sqrt(((probability - (pair_distances(reference) < CONTACT).mean(axis=0)) ** 2).mean())
    )
