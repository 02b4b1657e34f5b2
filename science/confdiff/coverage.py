"""Metrics by superposition: fluctuations, coverage of known states, Wasserstein distances.

Definitions are those of ConfDiff (arXiv 2403.14088) and of AlphaFlow's analysis of ATLAS, in nm.
Shape legend: S test and R reference structures, K known states, N residues. All arrays are of CA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from sparring.launch.errors import SparringError
from sparring.science.confdiff.metrics import Float64, FloatArray, normalised


def superposed(ca: FloatArray, onto: FloatArray) -> Float64:
    """(S, N, 3) moved rigidly to the least square distance from one structure (N, 3) (Kabsch)."""
    moved = np.asarray(ca, dtype=np.float64)
    moved = moved - moved.mean(axis=1, keepdims=True)
    target = np.asarray(onto, dtype=np.float64)
    centred = target - target.mean(axis=0)
    left, _, right = np.linalg.svd(np.einsum("sni,nj->sij", moved, centred))
    left[..., -1] *= np.linalg.det(left @ right)[:, None]
    return np.asarray(moved @ (left @ right) + target.mean(axis=0))


def rmsd(ca: FloatArray, state: FloatArray) -> Float64:
    """(S,) nm, least root mean square distance of structures (S, N, 3) to one state (N, 3)."""
    moved = superposed(ca, state) - np.asarray(state, dtype=np.float64)
    return np.asarray(np.sqrt((moved**2).sum(axis=-1).mean(axis=-1)))


def rmsf(ca: FloatArray, onto: FloatArray, log_weights: FloatArray | None = None) -> Float64:
    """(N,) nm, root mean square fluctuation about the mean, superposed on one structure.

    Args:
        ca: (S, N, 3).
        onto: (N, 3), on which all are superposed before the mean is taken.
        log_weights: (S,).
    """
    places, weights = superposed(ca, onto), normalised(log_weights, len(ca))
    apart = places - np.einsum("s,sni->ni", weights, places)
    return np.asarray(np.sqrt(weights @ (apart**2).sum(axis=-1)))


def best_rmsd(ca: FloatArray, states: FloatArray) -> Float64:
    """(K,) nm: of each known state (K, N, 3) the RMSD of the sample nearest to it.

    Its mean is RMSDens, the coverage of BPTI's five clusters in the paper.
    """
    return np.array([rmsd(ca, state).min() for state in states])


def tm_score(a: FloatArray, b: FloatArray, sequence: str) -> float:
    """TM-score in (0, 1] of two structures (N, 3) of one sequence, residue i on residue i.

    Raises:
        SparringError: tmtools is not installed, or the chain is shorter than it accepts.
    """
    try:
        import tmtools
    except ModuleNotFoundError:
        raise SparringError('TM-scores need tmtools: pip install "sparring[proteins]"') from None
    if len(sequence) < 5:
        raise SparringError(f"a TM-score needs at least 5 residues, {sequence} has {len(sequence)}")
    # tmtools takes Angstrom; the alignment is given, so it only superposes.
    x, y = (np.ascontiguousarray(10 * np.asarray(c, dtype=np.float64)) for c in (a, b))
    return float(tmtools.tm_align(x, y, sequence, sequence, (sequence, sequence)).tm_norm_chain1)


def best_tm(ca: FloatArray, states: FloatArray, sequence: str) -> Float64:
    """(K,) of each known state the highest TM-score of a sample; its mean is TMens."""
    return np.array([max(tm_score(x, state, sequence) for x in ca) for state in states])


def pairwise_rmsd(
    ca: FloatArray, log_weights: FloatArray | None = None, pairs: int = 100, seed: int = 0
) -> float:
    """Mean RMSD in nm over random pairs of structures: an ensemble's diversity.

    Args:
        ca: (S, N, 3).
        log_weights: (S,); a pair (a, b), a < b, counts with w_a w_b.
        pairs: at most so many.
        seed: of their choice.
    """
    i, j = np.triu_indices(len(ca), 1)
    if not len(i):
        raise SparringError("pairwise RMSD needs at least two structures")
    if len(i) > pairs:
        chosen = np.random.default_rng(seed).choice(len(i), pairs, replace=False)
        i, j = i[chosen], j[chosen]
    weights = normalised(log_weights, len(ca))
    shares = np.maximum(weights[i] * weights[j], np.finfo(np.float64).tiny)
    apart = [rmsd(ca[a : a + 1], ca[b])[0] for a, b in zip(i, j, strict=True)]
    return float(np.average(apart, weights=shares))


class GaussianW2(NamedTuple):
    """Parts of the squared 2-Wasserstein distance of two Gaussians."""

    translation: float
    """|mu1 - mu2|^2."""
    variance: float
    """tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2)."""

    @property
    def distance(self) -> float:
        """The root of their sum."""
        return float(np.sqrt(self.translation + self.variance))


def gaussian_w2(
    mean1: FloatArray, cov1: FloatArray, mean2: FloatArray, cov2: FloatArray
) -> GaussianW2:
    """2-Wasserstein distance of N(mean1, cov1) and N(mean2, cov2), squared, in parts."""
    values, vectors = np.linalg.eigh(np.asarray(cov1, dtype=np.float64))
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)
    variance = np.trace(cov1) + np.trace(cov2) - 2 * np.sqrt(cross).sum()
    translation = ((np.asarray(mean1) - np.asarray(mean2)) ** 2).sum()
    return GaussianW2(float(translation), float(max(variance, 0.0)))


class Rmwd(NamedTuple):
    """Root mean Wasserstein distance, nm."""

    total: float
    translation: float
    """From the means alone."""
    variance: float
    """From the spreads alone."""


def rmwd(
    test: FloatArray, reference: FloatArray, onto: FloatArray, log_weights: FloatArray | None = None
) -> Rmwd:
    """Root of the mean over atoms of the squared W2 of Gaussians fitted to each atom's places.

    Args:
        test: (S, N, 3).
        reference: (R, N, 3).
        onto: (N, 3), what both are superposed on first.
        log_weights: (S,), of the test structures.
    """
    ours, theirs = superposed(test, onto), superposed(reference, onto)
    weights = normalised(log_weights, len(ours)), normalised(None, len(theirs))
    parts = []
    for atom in range(ours.shape[1]):
        moments = []
        for places, weight in zip((ours[:, atom], theirs[:, atom]), weights, strict=True):
            mean = weight @ places
            moments += [mean, ((places - mean).T * weight) @ (places - mean)]
        parts.append(gaussian_w2(*moments))
    translation, variance = np.mean(parts, axis=0)
    return Rmwd(*(float(np.sqrt(x)) for x in (translation + variance, translation, variance)))


def empirical_w2(a: FloatArray, b: FloatArray) -> float:
    """2-Wasserstein distance of two clouds of as many points (S, D), by the best assignment."""
    if np.shape(a) != np.shape(b):
        raise SparringError(f"clouds of shapes {np.shape(a)} and {np.shape(b)} must be alike")
    cost = cdist(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), "sqeuclidean")
    return float(np.sqrt(cost[linear_sum_assignment(cost)].mean()))


def pca_w2(
    test: FloatArray,
    reference: FloatArray,
    onto: FloatArray,
    joint: bool = False,
    seed: int = 0,
    log_weights: FloatArray | None = None,
    most: int = 1000,
) -> float:
    """W2 in nm an atom, in the first two principal components of the reference.

    Empirical W2 of the projections divided by sqrt(N). The larger ensemble is thinned at random
    to the smaller one's size; weighed structures are drawn by their weights.

    Args:
        test: (S, N, 3).
        reference: (R, N, 3).
        onto: (N, 3), what both are superposed on.
        joint: components of both ensembles, each with half the weight, not of the reference.
        seed: of the thinning.
        log_weights: (S,), of the test structures.
        most: structures of each; the time of the assignment grows with their cube.
    """
    generator = np.random.default_rng(seed)
    count = min(len(test), len(reference), most)
    if count < 2:
        raise SparringError("principal components need at least two structures of each ensemble")
    if log_weights is not None:
        shares = normalised(log_weights, len(test))
        test = np.asarray(test)[generator.choice(len(test), len(test), p=shares)]
    ours, theirs = (
        superposed(x, onto)[np.sort(generator.permutation(len(x))[:count])].reshape(count, -1)
        for x in (test, reference)
    )
    basis = np.concatenate([ours, theirs]) if joint else theirs
    mean = basis.mean(axis=0)
    _, _, components = np.linalg.svd(basis - mean, full_matrices=False)
    first = components[:2].T
    atoms = np.shape(onto)[0]
    return empirical_w2((ours - mean) @ first, (theirs - mean) @ first) / float(np.sqrt(atoms))


def figures(
    test: FloatArray,
    reference: FloatArray,
    log_weights: FloatArray | None = None,
    states: FloatArray | None = None,
    sequence: str = "",
) -> dict[str, float]:
    """Metrics by superposition of CA coordinates, all superposed on the first reference structure.

    Args:
        test: (S, N, 3).
        reference: (R, N, 3).
        log_weights: (S,).
        states: (K, N, 3) known states to be covered.
        sequence: N one-letter codes, of which TM-scores of states need five or more.

    Returns:
        rmsf and reference_rmsf, means over residues in nm; rmsf_r, their correlation over three
        residues or more; rmwd and its parts; pairwise_rmsd and pca_w2 of two structures or more;
        with states rmsd_coverage (nm) and tm_coverage, means over states of the best sample's.
    """
    onto = reference[0]
    ours, theirs = rmsf(test, onto, log_weights), rmsf(reference, onto)
    found = {"rmsf": float(ours.mean()), "reference_rmsf": float(theirs.mean())}
    if min(len(test), len(reference)) > 1:
        found["pca_w2"] = pca_w2(test, reference, onto, log_weights=log_weights)
        found["pairwise_rmsd"] = pairwise_rmsd(test, log_weights)
        found["reference_pairwise_rmsd"] = pairwise_rmsd(reference)
        if len(ours) > 2:
            found["rmsf_r"] = rmsf_correlation([ours], [theirs])
    spread = rmwd(test, reference, onto, log_weights)
    found |= {f"rmwd_{name}": value for name, value in spread._asdict().items()}
    if states is not None:
        found["rmsd_coverage"] = float(best_rmsd(test, states).mean())
        if len(sequence) > 4:
            found["tm_coverage"] = float(best_tm(test, states, sequence).mean())
    return found


def rmsf_correlation(test: Sequence[FloatArray], reference: Sequence[FloatArray]) -> float:
    """Pearson's r of the RMSF of all residues of all targets pooled (the paper's global r)."""
    return float(np.corrcoef(np.concatenate(test), np.concatenate(reference))[0, 1])
