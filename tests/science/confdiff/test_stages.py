"""The stages of ConfDiff on a real simulation of a small peptide and tiny networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from confdiff_inputs import fails, rows, weights

from sparring.launch.artifacts import hash_json
from sparring.launch.cli import main
from sparring.launch.errors import SparringError
from sparring.science.confdiff.dataset import Representations, bucketed
from sparring.science.confdiff.evaluate import Ensemble
from sparring.science.confdiff.structures import atoms_array
from sparring.science.confdiff.validity import sound

Conf = Callable[..., dict[str, Any]]
SAMPLING = ("--steps", "8", "--filter", "False")


def test_a_simulation_is_rows_with_energies_and_forces(simulated: Path) -> None:
    import mdtraj

    found = rows(simulated)
    assert [row.number for row in found] == list(range(120))
    assert {(row.sequence, row.capped, row.temperature) for row in found} == {("AGA", True, 400.0)}
    assert np.std([row.energy for row in found]) > 5
    trajectory = mdtraj.load(simulated / "replica1.xtc", top=simulated / "topology.pdb")
    assert trajectory.n_frames == 60
    # xtc rounds to 0.001 nm; the rows are about another centre.
    ca = trajectory.xyz[7, trajectory.topology.select("name CA")]
    mine = atoms_array(found[67])[:, 1]
    np.testing.assert_allclose(ca - ca.mean(0), mine - mine.mean(0), atol=2e-3)


def test_training_learns(simulated: Path, tmp_path: Path, conf: Conf) -> None:
    options = ("--steps", "40", "--batch", "32", "--micro-batch", "32", "--lr", "2e-3",
               "--warmup", "0", "--loss.plain", "True")  # fmt: skip
    figures = conf("train", tmp_path / "out", *options, data=simulated)
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:4])
    assert figures["conformations"] == 120
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["data"] == {"temperature": 400.0, "chain": "AGA", "capped": True}


def test_micro_batches_change_nothing(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    options = ("--steps", "4", *training, "--micro-batch", "5")
    conf("train", tmp_path / "out", *options, data=simulated)
    one, two = weights(base), weights(tmp_path / "out")
    # Adam makes whole steps of gradients that are rounding alone, so a few elements differ.
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert float(apart.median()) < 1e-6
    assert float((apart > 1e-4).float().mean()) < 0.01


@pytest.mark.dist
@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "mars"])
def test_two_ranks_with_zero_learn_the_same(
    optimizer: str, simulated: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    options = ("--steps", "3", *training, "--optimizer.name", optimizer, "--optimizer.eps", "1e-4")
    conf("train", tmp_path / "one", *options, data=simulated)
    ranks = ("--launch.processes", "2", "--micro-batch", "8")
    figures = conf("train", tmp_path / "two", *options, *ranks, data=simulated)
    assert figures["zero"] == 2
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert float(apart.abs().max()) < 1e-4


def test_a_stopped_training_goes_on_to_the_same_weights(
    simulated: Path, base: Path, tmp_path: Path, training: tuple[str, ...]
) -> None:
    from sparring.launch.errors import Stopped
    from sparring.launch.processes import World
    from sparring.launch.stages import Context
    from sparring.science.confdiff import train
    from sparring.science.confdiff.config import ConformationTrainConfig

    config = ConformationTrainConfig(
        steps=4, batch=16, micro_batch=16, warmup=0, lr=1e-3, save_every=2, ema=0
    )
    work, asked = tmp_path / "work", iter([False, True])
    work.mkdir()
    seed = json.loads((base / "manifest.json").read_text()).get("seed", 0)
    context = Context(World(), work, seed, lambda: next(asked, False), lambda **_: None)
    inputs = {"data.0": simulated}
    with pytest.raises(Stopped):
        train.run(config, inputs, tmp_path, context)
    train.run(config, inputs, tmp_path, replace(context, stopped=lambda: False))
    whole = tmp_path / "whole"
    whole.mkdir()
    train.run(config, inputs, whole, replace(context, work=whole, stopped=lambda: False))
    one, two = weights(whole), weights(tmp_path)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_buckets_hold_similar_lengths_and_every_row_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(20, 300, size=256).tolist()
    plan = bucketed(lengths, 8, 32, seed=3)
    assert sorted(n for batch in plan for n in batch) == list(range(256))
    spread = [np.ptp([lengths[n] for n in batch]) for batch in plan]
    assert np.mean(spread) < 30
    # Fewer rows than a batch are a batch, in every epoch.
    assert [sorted(batch) for batch in bucketed([5] * 3, 8, 2, seed=0)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("guide", ["none", "energy", "force"])
def test_a_sample_depends_on_its_number_alone(
    guide: str, base: Path, guides: dict[str, Path], tmp_path: Path, conf: Conf
) -> None:
    inputs = {"model": base} | ({"guide": guides[guide]} if guide != "none" else {})
    conf("sample", tmp_path / "a", *SAMPLING, "--num-samples", "5", "--batch", "5", **inputs)
    conf("sample", tmp_path / "b", *SAMPLING, "--num-samples", "3", "--batch", "2", **inputs)
    a, b = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert (len(a), len(b)) == (5, 3)
    for one, two in zip(a, b, strict=False):
        np.testing.assert_allclose(atoms_array(one), atoms_array(two), atol=1e-5)
    assert not np.allclose(atoms_array(a[0]), atoms_array(a[1]), atol=1e-2, equal_nan=True)
    assert a[0].temperature == (400 if guide == "none" else 350)


def test_sampled_files_open_in_mdtraj_and_hold_the_same(
    base: Path, tmp_path: Path, conf: Conf
) -> None:
    import mdtraj

    out = tmp_path / "out"
    conf("sample", out, *SAMPLING, "--num-samples", "4", "--energies", "True", model=base)
    trajectory = mdtraj.load(out / "samples.xtc", top=out / "topology.pdb")
    assert trajectory.n_frames == 4
    assert [r.name for r in trajectory.topology.residues] == ["ACE", "ALA", "GLY", "ALA", "NME"]
    ca = trajectory.xyz[:, [a.index for a in trajectory.topology.atoms if a.name == "CA"]]
    expected = np.stack([atoms_array(row)[:, 1] for row in rows(out)])
    np.testing.assert_allclose(ca, expected, atol=1e-3)
    with np.load(out / "samples.npz", allow_pickle=False) as data:
        np.testing.assert_allclose(data["translations"], expected, atol=1e-5)
        determinants = np.linalg.det(data["rotations"])
        np.testing.assert_allclose(determinants, 1, atol=1e-4)
        assert data["log_weights"].tolist() == [0.0] * 4
        assert data["energies"].shape == (4,)
    run = json.loads((out / "run.json").read_text())
    assert run["sequence"] == "AGA"
    assert (out / "sequence.fasta").read_text() == ">AGA\nAGA\n"
    assert run["rank_seconds"] > 0
    assert run["settings_hash"] == hash_json(run["settings"])


@pytest.mark.parametrize("correction", ["weights", "smc"])
def test_corrections_leave_log_weights(
    correction: str, base: Path, guides: dict[str, Path], tmp_path: Path, conf: Conf
) -> None:
    options = (*SAMPLING, "--num-samples", "6", "--correction", correction, "--eta", "2")
    figures = conf("sample", tmp_path / "o", *options, model=base, guide=guides["energy"])
    found = [row.log_weight for row in rows(tmp_path / "o")]
    assert all(weight is not None and np.isfinite(weight) for weight in found)
    assert 0 < figures["effective"] <= 1
    assert len(set(found)) > 1
    ancestors = [row.ancestor for row in rows(tmp_path / "o")]
    assert set(ancestors) <= set(range(6))
    assert figures["ancestors"] == len(set(ancestors)) / 6
    if correction == "weights":
        assert ancestors == list(range(6))


def test_samples_that_never_pass_are_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--num-samples", "2", "--steps", "2", "--attempts", "2", "--launch.inline")
    code, said = fails(
        capsys, "conf", "sample", "--model", base, "--out", out, *words, "conf-sample"
    )
    assert code == 1
    assert "in each of 2 attempts" in said
    assert not (out / "manifest.json").exists()


def test_the_filter_knows_real_structures_from_broken_ones(simulated: Path) -> None:
    real = rows(simulated)[:3]
    assert sound(real) == [True] * 3
    torn, folded = atoms_array(real[0]), atoms_array(real[1])
    torn[2:] += 0.3
    folded[2] = folded[0] + 0.02
    broken = [replace(real[0], atoms=torn.tobytes()), replace(real[1], atoms=folded.tobytes())]
    assert sound([*broken, real[2]]) == [False, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", "300"), "these networks are for 400 K"),
        (("--gamma", "0.5"), "needs --unconditional"),
        (("--correction", "smc", "--filter", "False"), "needs an energy network"),
        (("--correction", "smc"), "give --filter False"),
        (("--sequence", "AXA"), "'X'"),
        (("--guidance", "force"), "needs such a network as --guide"),
    ],
)
def test_wrong_sampling_is_refused(
    options: tuple[str, ...],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    inline = ("--launch.inline", "conf-sample")
    code, said = fails(capsys, "conf", "sample", "--model", base, "--out", out, *options, *inline)
    assert code in (1, 2)
    assert message in said
    assert not (out / "manifest.json").exists()


def test_networks_that_do_not_mix_are_refused(
    simulated: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    conf: Conf,
    training: tuple[str, ...],
) -> None:
    options = ("--steps", "1", "--sequence", "False", "--t-min", "0.05", *training)
    conf("train", tmp_path / "other", *options, data=simulated)
    common = ("conf", "sample", "--model", base, "--gamma", "0.5", "--out", tmp_path / "o",
              "--launch.inline", "conf-sample")  # fmt: skip
    for given, message in ((base, "is told the sequence"), (tmp_path / "other", "another noise")):
        code, said = fails(capsys, *common, "--unconditional", given)
        assert (code, message in said) == (1, True)
    common = ("conf", "train", "--data", simulated, "--model", base, "--out", tmp_path / "o",
              "--launch.inline", "conf-train")  # fmt: skip
    for option, message in (
        (("--sequence", "False"), "sequence = True, which training goes on with, not False"),
        (("--t-min", "0.3"), "which training goes on with, not 0.3; give --t-min"),
        (("--sigma-min", "0.3"), "which training goes on with, not 0.3; give --sigma-min"),
    ):
        code, said = fails(capsys, *common, *option)
        assert (code, message in said) == (1, True)


def test_arrays_that_are_none_are_one_sentence(tmp_path: Path) -> None:
    cut = tmp_path / "cut.npz"
    np.savez(cut, **{"AGA.node": np.zeros((3, 8))})
    cut.write_bytes(cut.read_bytes()[:-20])
    np.save(tmp_path / "one.npy", np.zeros(3))
    for path in (cut, tmp_path / "one.npy"):
        with pytest.raises(SparringError, match=r"is no \.npz file of arrays"):
            Representations(path)


def test_trajectories_of_a_reference_are_its_replicas(simulated: Path) -> None:
    every = rows(simulated)
    read = [replace(row, chain=f"run{n > 70}") for n, row in enumerate(every)]
    assert [len(part) for part in Ensemble(read, Path()).replicas(Path("none"))] == [71, 49]
    single = [replace(row, chain=f"{n}") for n, row in enumerate(every)]
    assert [len(part) for part in Ensemble(single, Path()).replicas(Path("none"))] == [120]
    assert [len(part) for part in Ensemble(every, simulated).replicas(simulated)] == [60, 60]


def test_a_trajectory_of_ones_own_is_the_same_as_the_rows_of_the_simulation(
    simulated: Path, tmp_path: Path, conf: Conf
) -> None:
    figures = conf(
        "structures",
        tmp_path / "o",
        "--stride",
        "10",
        pdb=simulated / "topology.pdb",
        traj=simulated / "replica1.xtc",
    )
    assert figures["conformations"] == 6
    assert [row.number for row in rows(tmp_path / "o")] == list(range(0, 60, 10))
    mine, theirs = rows(tmp_path / "o"), rows(simulated)[60::10]
    for one, two in zip(mine, theirs, strict=True):
        a, b = atoms_array(one), atoms_array(two)
        np.testing.assert_allclose(a - a[0, 1], b - b[0, 1], atol=3e-3)


def test_a_folder_of_structures_is_read_as_far_as_it_can_be(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (simulated / "topology.pdb").read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.startswith(("ATOM", "HETATM"))]
    kept = [line for line in whole if line[17:20] not in ("ACE", "NME")]
    middle = sorted({line[22:26] for line in kept})[1]
    ligand = [line[:21] + "B" + line[22:] for line in kept if line[22:26] == middle]
    gap = [line for line in kept if line[22:26] != middle]
    folder = tmp_path / "pdb"
    folder.mkdir()
    (folder / "pdb1abc.ent").write_text("".join(whole))
    (folder / "b.pdb").write_text("".join([*kept, "TER\n", *ligand]))
    (folder / "gap.pdb").write_text("".join(gap))
    words = ["conf", "structures", "--pdb", str(folder), "--launch.inline", "conf-structures"]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0
    assert "left out: " in capsys.readouterr().err
    assert {row.chain for row in rows(tmp_path / "o")} == {"pdb1abc", "b"}
    figures = json.loads((tmp_path / "o" / "manifest.json").read_text())["figures"]
    assert figures["left_out"] == 1
    alone = ["conf", "structures", "--pdb", str(folder / "gap.pdb"), "--out", str(tmp_path / "g")]
    assert main([*alone, "--launch.inline", "conf-structures"]) == 1
    assert "broken between" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("structures",), "give structures with --pdb"),
        (("md", "--sequence", "AZA"), "'Z'"),
        (("md",), "give a sequence"),
        (("md", "--sequence", "A", "--capped", "False"), "one residue"),
        (("train", "--data", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_sentence(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = f"conf-{words[0]}"
    code, said = fails(capsys, "conf", *words, "--out", tmp_path / "o", "--launch.inline", stage)
    assert code in (1, 2)
    assert message in said
    assert "Traceback" not in said


def test_labels_are_added_to_structures_without_them(
    simulated: Path, tmp_path: Path, conf: Conf
) -> None:
    given = ("--stride", "20", "--temperature", "400")
    pdb, traj = simulated / "topology.pdb", simulated / "replica0.xtc"
    conf("structures", tmp_path / "plain", *given, pdb=pdb, traj=traj)
    figures = conf("label", tmp_path / "o", "--chunk", "2", data=tmp_path / "plain")
    assert figures["labelled"] == 3
    # Hydrogens are relaxed, so that energies are below those of the thermal structures.
    thermal = [row.energy for row in rows(simulated)[:60:20]]
    for row, hot in zip(rows(tmp_path / "o"), thermal, strict=True):
        assert row.energy is not None
        assert hot is not None
        assert row.energy < hot
        assert row.forces is not None


def test_an_ensemble_is_measured_against_a_reference(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf
) -> None:
    options = ("--energies", "5", "--lag", "2", "--platform", "Reference")
    same = conf("evaluate", tmp_path / "same", *options, samples=simulated, reference=simulated,
                states=simulated)  # fmt: skip
    assert same["rmsd_coverage"] < 1e-6
    assert "tm_coverage" not in same  # three residues
    assert same["rmsf_r"] == pytest.approx(1)
    assert same["rmsf"] == pytest.approx(same["reference_rmsf"])
    assert max(same["pca_w2"], same["js_ramachandran"]) < 1e-6
    assert max(same[name] for name in ("js_rg", "js_tic", "js_phi_psi")) < 1e-6
    assert same["js_rg_floor"] > 0.1
    assert same["energy"] == same["reference_energy"]
    with np.load(tmp_path / "same" / "panels.npz") as panels:
        assert same["energy_median"] == np.sort(panels["energy"])[2]  # of five
    assert [same[k] for k in ("val_clash", "val_break", "ess")] == pytest.approx([1, 1, 1])
    warm = conf("evaluate", tmp_path / "warm", *options, "--reweight", "330",
                samples=simulated, reference=simulated)  # fmt: skip
    assert 0.01 < warm["ess"] < 0.9
    assert warm["js_phi_psi"] > 0
    conf("sample", tmp_path / "s", *SAMPLING, "--num-samples", "4", model=base)
    poor = conf("evaluate", tmp_path / "poor", *options, samples=tmp_path / "s",
                reference=simulated)  # fmt: skip
    assert poor["js_phi_psi"] > 0.4
    with np.load(tmp_path / "poor" / "panels.npz") as panels:
        assert set(panels["energy_of"]) <= set(range(4))
        assert np.isfinite(panels["phi"]).all()
        assert len(panels["phi"]) == 4  # the middle one of three residues has both
    few = conf("evaluate", tmp_path / "few", *options[:2], "--lag", "0", "--structures", "7",
               samples=simulated, reference=simulated)  # fmt: skip
    assert few["structures"] == 7
    assert "js_tic" not in few
    assert few["js_rg"] > same["js_rg"]


def test_ensembles_of_two_temperatures_are_told(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], conf: Conf
) -> None:
    cool = tmp_path / "cool"
    conf("structures", cool, "--temperature", "300", pdb=simulated / "topology.pdb",
         traj=simulated / "replica0.xtc")  # fmt: skip
    given = ["--samples", cool, "--reference", simulated, "--out", tmp_path / "e"]
    options = ["--energies", 0, "--lag", 2, "--launch.inline", "conf-evaluate"]
    assert main(["conf", "evaluate", *map(str, [*given, *options])]) == 0
    assert "the samples are of 300 K, the reference of 400 K" in capsys.readouterr().err


def test_held_out_structures_are_read_by_their_file(
    simulated: Path, tmp_path: Path, conf: Conf
) -> None:
    conf("structures", tmp_path / "s", "--heldout", "0.25", pdb=simulated / "topology.pdb",
         traj=simulated / "replica0.xtc")  # fmt: skip
    held = tmp_path / "s" / "heldout.parquet"
    options = ("--energies", "0", "--lag", "0")
    figures = conf("evaluate", tmp_path / "e", *options, samples=simulated, reference=held)
    assert figures["js_rg"] < 0.8


def test_reweighting_needs_energies(
    simulated: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], conf: Conf
) -> None:
    conf("sample", tmp_path / "s", *SAMPLING, "--num-samples", "2", model=base)
    words = ("conf", "evaluate", "--samples", tmp_path / "s", "--reference", simulated,
             "--reweight", "350", "--out", tmp_path / "o", "--launch.inline",
             "conf-evaluate")  # fmt: skip
    code, said = fails(capsys, *words)
    assert (code, "reweighting needs the energy" in said) == (1, True)
