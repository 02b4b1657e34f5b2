"""Metrics against scipy, deeptime, mdtraj, tmtools' own alignment and closed forms."""

from __future__ import annotations

import math

import mdtraj
import numpy as np
import pytest
from deeptime.decomposition import TICA
from scipy.spatial.distance import jensenshannon
from scipy.spatial.transform import Rotation
from scipy.stats import wasserstein_distance

from sparring.launch.errors import SparringError
from sparring.science.confdiff import comparison, coverage, metrics, structures, tica
from sparring.science.confdiff.metrics import Distance
from sparring.science.confdiff.tica import TicaModel

LN2 = math.sqrt(math.log(2))


def chains(count: int = 200, length: int = 6, seed: int = 0, step: float = 0.38) -> np.ndarray:
    """Random walks of CA with steps of 0.38 nm that turn slowly over the frames."""
    generator = np.random.default_rng(seed)
    walk = np.cumsum(0.3 * generator.standard_normal((count, length, 3)), axis=0) * 0.1
    direction = walk + generator.standard_normal((1, length, 3)) + [1, 0, 0]
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    return np.cumsum(step * direction, axis=1)


def test_js_is_scipys_and_has_its_bounds() -> None:
    generator = np.random.default_rng(0)
    test, reference = generator.normal(0.3, 1, (300, 2)), generator.normal(0, 1.2, (500, 2))
    js, hits = metrics.js_channels(test, reference)
    for channel in range(2):
        low, high = reference[:, channel].min(), reference[:, channel].max()
        inside = test[(test[:, channel] >= low) & (test[:, channel] <= high), channel]
        p, edges = np.histogram(reference[:, channel], 50, range=(low, high))
        q, _ = np.histogram(inside, edges)
        assert js[channel] == pytest.approx(jensenshannon(p + 1e-6, q + 1e-6), abs=1e-12)
        assert hits[channel] == pytest.approx(len(inside) / 300)
    same, all_hit = metrics.js_channels(reference, reference)
    assert same == pytest.approx(np.zeros(2), abs=1e-7)
    assert all_hit == pytest.approx(np.ones(2))
    # Disjoint inside the reference's range: the bound of the distance, sqrt(ln 2).
    apart = np.repeat([[0.0], [1.0]], 50, axis=0)
    low = np.concatenate([np.zeros((50, 1)), np.full((1, 1), 1.0)])
    bound, hit = metrics.js_channels(np.full((50, 1), 0.5), np.concatenate([apart, low]))
    assert bound[0] == pytest.approx(LN2, abs=1e-4)
    assert hit[0] == pytest.approx(1)
    far, missed = metrics.js_channels(np.full((50, 1), 9.0), apart)
    assert missed[0] == 0
    assert 0 < far[0] < LN2  # nothing but pseudo-counts: why hit rates stand beside it


def test_weights_are_repetitions() -> None:
    test, reference = chains(30), chains(80, seed=1)
    copies = np.random.default_rng(0).integers(1, 5, 30)
    repeated = np.repeat(test, copies, axis=0)
    logs = np.log(copies) + 7
    for metric in (metrics.js_pwd, metrics.js_rg, metrics.js_rg_per_residue):
        # The pseudo-count is for so many samples, of which the copies are more.
        expected = tuple(metric(repeated, reference))
        assert tuple(metric(test, reference, logs)) == pytest.approx(expected, abs=1e-4)
    for share in (metrics.val_clash, metrics.val_break):
        assert share(test, logs) == pytest.approx(share(repeated))
    assert metrics.rmse_contact(test, reference, logs) == pytest.approx(
        metrics.rmse_contact(repeated, reference)
    )
    onto = reference[0]
    assert tuple(coverage.rmwd(test, reference, onto, logs)) == pytest.approx(
        tuple(coverage.rmwd(repeated, reference, onto))
    )
    energies = np.arange(30.0)
    assert metrics.weighted_mean(energies, logs) == pytest.approx(
        np.repeat(energies, copies).mean()
    )


def test_kish() -> None:
    assert metrics.effective_sample_size(np.zeros(10)) == pytest.approx(1)
    assert metrics.effective_sample_size(np.array([0.0, -np.inf])) == pytest.approx(0.5)
    assert metrics.effective_sample_size(np.log([3.0, 1])) == pytest.approx(16 / 10 / 2)
    for wrong in (np.zeros(3), np.array([np.nan, 0]), np.full(2, -np.inf)):
        with pytest.raises(SparringError, match="log_weights must be 2 numbers"):
            metrics.normalised(wrong, 2)


def test_pwd_and_both_rg() -> None:
    test, reference = chains(), chains(seed=1)
    pairs = [(i, j) for i in range(6) for j in range(6) if j - i >= 3]
    js = []
    for i, j in pairs:
        a, b = (np.linalg.norm(x[:, i] - x[:, j], axis=-1) for x in (test, reference))
        p, edges = np.histogram(b, 50)
        js.append(jensenshannon(np.histogram(a, edges)[0] + 1e-6, p + 1e-6))
    assert metrics.js_pwd(test, reference).js == pytest.approx(np.mean(js), abs=1e-10)
    gyration = np.sqrt(((test - test.mean(1, keepdims=True)) ** 2).sum(-1).mean(1))
    assert metrics.radius_of_gyration(test) == pytest.approx(gyration)
    theirs = mdtraj.compute_rg(mdtraj.Trajectory(test, None), masses=np.ones(6))
    assert metrics.radius_of_gyration(test) == pytest.approx(theirs, abs=1e-5)
    assert metrics.js_rg(test, reference) != pytest.approx(
        metrics.js_rg_per_residue(test, reference)
    )
    assert metrics.centre_distances(test).shape == (200, 6)


def test_tic_is_deeptimes() -> None:
    reference, test = [chains(300), chains(250, seed=1)], chains(100, seed=2)
    model = TicaModel(reference, lag=5)
    features = [metrics.pair_distances(x) for x in (*reference, test)]
    theirs = TICA(lagtime=5, dim=2, scaling="kinetic_map").fit(features[:2]).fetch_model()
    assert model(test) == pytest.approx(theirs.transform(features[2]))
    values = np.concatenate([theirs.transform(f) for f in features[:2]])
    js, hit = metrics.js_channels(theirs.transform(features[2]), values)
    assert tuple(model.js_tic(test)) == pytest.approx((js.mean(), hit.mean()))
    counts, *edges = np.histogram2d(*values.T, bins=50)
    mine, *_ = np.histogram2d(*theirs.transform(features[2]).T, bins=edges)
    expected = jensenshannon(mine.ravel() + 1e-6, counts.ravel() + 1e-6)
    assert model.js_tic2d(test).js == pytest.approx(expected, abs=1e-10)
    assert model.js_tic2d(test).hit_rate == pytest.approx(mine.sum() / 100)


def test_torsions_are_on_a_circle() -> None:
    generator = np.random.default_rng(0)
    reference = generator.vonmises(np.pi, 8, (4000, 3, 2))
    reference[:, 0, 0] = np.nan  # phi of the first residue
    same = metrics.js_phi_psi(reference + 2 * np.pi, reference)
    assert same.js < 1e-6
    assert same.hit_rate == pytest.approx(1)
    other = generator.vonmises(0, 8, (4000, 3, 2))
    assert metrics.js_phi_psi(other, reference).js > 0.8
    assert metrics.js_ramachandran(other, reference).js > 0.8
    assert tuple(metrics.js_ramachandran(reference, reference)) == pytest.approx((0, 1), abs=1e-6)
    with pytest.raises(SparringError, match="no residue has both"):
        metrics.js_ramachandran(reference[:, :1], reference[:, :1])


def test_validity() -> None:
    ca = np.zeros((4, 5, 3))
    ca[:, :, 0] = 0.38 * np.arange(5)
    ca[1, 4] = ca[1, 0] + [0, 0.299, 0]  # also breaks the chain
    ca[2, 2:, 0] += 0.041
    ca[3, 3, 0] -= 0.5  # clashes and breaks
    assert metrics.val_clash(ca) == pytest.approx(0.5)
    assert metrics.val_break(ca) == pytest.approx(0.25)
    ca[1, 4] = ca[1, 0] + [0, 0.301, 0]
    assert metrics.val_clash(ca) == pytest.approx(0.75)
    atoms = np.zeros((2, 3, 14, 3))
    atoms[0, 1, 0, 0] = 0.139
    atoms[0, 2, 0, 0] = 0.141
    assert metrics.peptide_break(atoms) == pytest.approx(0.25)


def test_contacts_are_a_mean() -> None:
    near, far = np.zeros((2, 3, 3)), np.zeros((2, 3, 3))
    far[:, 2] = 1.01
    assert metrics.rmse_contact(near, near) == 0
    # Two of three pairs differ by one: the authors' sum would be sqrt(2).
    assert metrics.rmse_contact(near, far) == pytest.approx(math.sqrt(2 / 3))


def test_noise_floor_and_compare() -> None:
    reference = [chains(400), chains(400, seed=1), chains(400, seed=2), chains(400, seed=3)]
    first, second = comparison.halves(reference)
    assert len(first) == len(second) == 800
    assert comparison.noise_floor(metrics.js_pwd, reference, 800) == metrics.js_pwd(first, second)
    assert comparison.noise_floor(metrics.js_pwd, reference, 9999) == metrics.js_pwd(first, second)
    before, after = comparison.halves(reference[:1])
    assert np.array_equal(np.concatenate([before, after]), reference[0])
    figures = comparison.compare(chains(150, seed=9), reference, TicaModel(reference, 5))
    assert {name for name in figures if name.endswith("_floor")} == {
        f"{name}_floor" for name in ("js_pwd", "js_rg", "js_rg_per_residue", "js_tic", "js_tic2d")
    }
    assert figures["js_pwd"] == metrics.js_pwd(chains(150, seed=9), np.concatenate(reference)).js
    assert all(math.isfinite(x) for x in figures.values())
    wobble = 0.01 * np.random.default_rng(0).standard_normal((200, 3, 3))
    moving = [chains(length=3, seed=1) + wobble]
    three = comparison.compare(chains(length=3), moving, TicaModel(moving, 2))
    assert "js_tic" in three
    assert "js_pwd" not in three
    assert "js_tic" not in comparison.compare(chains(length=2), [chains(length=2, seed=1)], None)


def test_ensembles_compare_at_one_number() -> None:
    """Fewer draws of the same law are farther from it, those of a floor too."""
    draws = np.random.default_rng(0).normal(size=(3, 4000, 6, 3))
    first, second = draws[:2]
    model = draws[2][comparison.thinned(4000, 200, 1)]
    floor = comparison.noise_floor(metrics.js_pwd, [first, second], 200).js
    assert floor == metrics.js_pwd(first[comparison.thinned(4000, 200, 0)], second).js
    assert metrics.js_pwd(model, second).js == pytest.approx(floor, rel=0.1)
    assert comparison.noise_floor(metrics.js_pwd, [first, second], 4000).js < floor / 3
    kept = comparison.thinned(10, 4, 3)
    assert len(set(kept)) == 4
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(comparison.thinned(3, 4, 3), [0, 1, 2])


def test_tica_of_a_long_chain_sees_some_residues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tica, "TICA_RESIDUES", 3)
    ca = chains(300, 8) + 0.01 * np.random.default_rng(0).standard_normal((300, 8, 3))
    model = TicaModel([ca], 2)
    assert np.array_equal(model(ca), TicaModel([ca[:, ::3]], 2)(ca[:, ::3]))


def test_superposition_is_mdtrajs() -> None:
    ca, state = chains(20, 12), chains(1, 12, seed=5)[0]
    theirs = mdtraj.rmsd(mdtraj.Trajectory(ca, None), mdtraj.Trajectory(state[None], None))
    assert coverage.rmsd(ca, state) == pytest.approx(theirs, abs=1e-5)
    turn = Rotation.from_rotvec([1, 2, -0.5]).as_matrix()
    assert coverage.rmsd((state @ turn.T + 3)[None], state) == pytest.approx(0, abs=1e-7)
    mirrored = coverage.rmsd((state * [1, 1, -1])[None], state)
    assert mirrored > 0.05  # a proper rotation cannot undo a mirror


def test_coverage_of_states() -> None:
    states = chains(3, 12, seed=1)
    turn = Rotation.from_rotvec([1, 2, -0.5]).as_matrix()
    samples = np.concatenate([states[1:2] @ turn.T, states[1:2] * 1.01])
    best = coverage.best_rmsd(samples, states)
    assert best[1] == pytest.approx(0, abs=1e-7)
    assert (best[[0, 2]] > 0.01).all()
    row = next(r for r in structures.benchmark_structures(20, ["trp-cage-cage"])[0] if r.sequence)
    ca = structures.atoms_array(row)[:, 1].astype(np.float64)
    noisy = ca + 0.04 * np.random.default_rng(0).standard_normal(ca.shape)
    scores = coverage.best_tm(np.stack([noisy, ca @ turn.T]), ca[None], row.sequence)
    assert scores[0] == pytest.approx(1, abs=1e-6)
    assert 0.2 < coverage.tm_score(noisy, ca, row.sequence) < 0.95
    with pytest.raises(SparringError, match="needs at least 5 residues"):
        coverage.tm_score(ca[:4], ca[:4], "AAAA")


def test_rmsf_and_diversity() -> None:
    """One loose end among ten residues that hold still; isotropic noise has RMSF sqrt(3) s."""
    generator = np.random.default_rng(0)
    base = chains(1, 40, seed=3)[0]
    still = np.repeat(base[None], 500, axis=0) + 1e-3 * generator.standard_normal((500, 40, 3))
    still[:, 20] += 0.02 * generator.standard_normal((500, 3))
    fluctuation = coverage.rmsf(still, base)
    assert fluctuation[20] == pytest.approx(0.02 * math.sqrt(3), rel=0.1)
    assert np.median(fluctuation) == pytest.approx(1e-3 * math.sqrt(3), rel=0.15)
    assert coverage.rmsf_correlation([fluctuation], [2 * fluctuation]) == pytest.approx(1)
    assert coverage.pairwise_rmsd(np.repeat(base[None], 3, axis=0)) == pytest.approx(0, abs=1e-7)
    assert coverage.pairwise_rmsd(chains(30)) == coverage.pairwise_rmsd(chains(30))
    # Weights count: what has none is not there.
    cloud = chains(4)
    alone = np.log(np.array([0.5, 0.5, 1e-300, 1e-300]))
    expected = coverage.rmsd(cloud[:1], cloud[1])[0]
    assert coverage.pairwise_rmsd(cloud, alone) == pytest.approx(expected)
    onto = cloud[0]
    assert coverage.rmsf(cloud, onto, alone) == pytest.approx(coverage.rmsf(cloud[:2], onto))
    assert coverage.pca_w2(cloud, cloud, onto, log_weights=alone) > 1e-3
    theirs = mdtraj.rmsf(mdtraj.Trajectory(coverage.superposed(cloud, onto), None), None)
    assert coverage.rmsf(cloud, onto) == pytest.approx(theirs, abs=1e-5)
    with pytest.raises(SparringError, match="at least two structures"):
        coverage.pairwise_rmsd(base[None])


def test_wasserstein_of_gaussians() -> None:
    first, second = np.diag([1.0, 4, 9]), np.diag([4.0, 4, 1])
    parts = coverage.gaussian_w2(np.zeros(3), first, np.array([3.0, 0, 4]), second)
    assert tuple(parts) == pytest.approx((25, 1 + 0 + 4))  # sum of (s1 - s2)^2
    assert parts.distance == pytest.approx(math.sqrt(30))
    turn = Rotation.from_rotvec([0.3, -1, 0.4]).as_matrix()
    turned = coverage.gaussian_w2(
        np.zeros(3), turn @ first @ turn.T, np.zeros(3), turn @ second @ turn.T
    )
    assert tuple(turned) == pytest.approx((0, 5), abs=1e-9)
    assert (
        coverage.gaussian_w2(np.ones(2), np.zeros((2, 2)), np.ones(2), np.zeros((2, 2))).distance
        == 0
    )


def test_rmwd_of_moved_atoms() -> None:
    generator = np.random.default_rng(0)
    base = chains(1, 30, seed=3)[0]
    still = np.repeat(base[None], 4000, axis=0)
    spread = still + 1e-3 * generator.standard_normal(still.shape)
    wide = still + 3e-3 * generator.standard_normal(still.shape)
    distance = coverage.rmwd(spread, wide, base)
    assert distance.variance == pytest.approx(2e-3 * math.sqrt(3), rel=0.05)
    assert distance.translation < 2e-4
    assert distance.total**2 == pytest.approx(distance.translation**2 + distance.variance**2)


def test_empirical_wasserstein() -> None:
    generator = np.random.default_rng(0)
    cloud = generator.standard_normal((40, 2))
    assert coverage.empirical_w2(cloud, cloud[::-1]) == pytest.approx(0, abs=1e-9)
    assert coverage.empirical_w2(cloud, cloud + np.array([3, 4])) == pytest.approx(5)
    line = generator.standard_normal((30, 1)), 2 + 0 * generator.standard_normal((30, 1))
    squares = np.sqrt(((np.sort(line[0][:, 0]) - 2) ** 2).mean())
    assert coverage.empirical_w2(*line) == pytest.approx(squares)
    assert coverage.empirical_w2(*line) >= wasserstein_distance(line[0][:, 0], line[1][:, 0])
    with pytest.raises(SparringError, match="must be alike"):
        coverage.empirical_w2(cloud, cloud[:3])


def test_pca_wasserstein() -> None:
    base = chains(1, 10, seed=3)[0]
    mode = np.zeros((10, 3))
    mode[::2, 1], mode[1::2, 1] = 1, -1
    mode[:, 1] -= mode[:, 1].mean()
    amplitude = np.random.default_rng(0).normal(0, 1e-3, 200)
    reference = base + amplitude[:, None, None] * mode
    shifted = base + (amplitude + 4e-3)[:, None, None] * mode
    whole = coverage.pca_w2(shifted, reference, base)
    # 4e-3 along the mode, whose length is sqrt(10), by the square root of ten atoms.
    assert whole == pytest.approx(4e-3, rel=0.1)
    assert coverage.pca_w2(shifted, reference, base, joint=True) == pytest.approx(4e-3, rel=0.1)
    assert coverage.pca_w2(reference[:50], reference, base) < 1e-3
    with pytest.raises(SparringError, match="at least two structures"):
        coverage.pca_w2(reference[:1], reference, base)


def test_bad_ensembles() -> None:
    good = chains(10)
    with pytest.raises(SparringError, match="must have the same channels"):
        metrics.js_pwd(good, chains(10, 7))
    with pytest.raises(SparringError, match="the test ensemble is empty"):
        metrics.js_rg_per_residue(good[:0], good)
    bad = good.copy()
    bad[3, 2] = np.nan
    with pytest.raises(SparringError, match="structure 3 of the test ensemble is not finite"):
        metrics.js_rg(bad, good)
    with pytest.raises(SparringError, match="3 residues has no pair 3 apart"):
        metrics.js_pwd(good[:, :3], good[:, :3])
    with pytest.raises(SparringError, match=r"a lag of 10 frames .* the longest has 10"):
        TicaModel([good], 10)
    with pytest.raises(SparringError, match="at least three residues"):
        TicaModel([good[:, :2]], 2)
    assert isinstance(metrics.js_rg(good, good), Distance)
