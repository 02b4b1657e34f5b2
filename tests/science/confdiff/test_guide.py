"""Guides: their labels, their training, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from confdiff_inputs import fails, rows, weights
from safetensors.torch import load_file, save_file

from sparring.launch.cli import main
from sparring.launch.errors import SparringError
from sparring.science.confdiff.dataset import Dataset
from sparring.science.confdiff.guidance import no_step, slope
from sparring.science.confdiff.guidance_losses import consistency_loss
from sparring.science.confdiff.heads import ForceNetwork
from sparring.science.confdiff.labels import label
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Tangent, moved_along
from sparring.science.confdiff.train import chains, drawn
from sparring.science.confdiff.weights import Labels

Conf = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("kind", ["energy", "force"])
def test_a_guide_beats_knowing_nothing(
    kind: str, simulated: Path, base: Path, tmp_path: Path, conf: Conf
) -> None:
    # To 200 K: the law is so different that a few steps see it.
    options = ("--kind", kind, "--temperature", "200", "--steps", "60", "--batch", "40",
               "--micro-batch", "40", "--lr", "1e-3", "--warmup", "0")  # fmt: skip
    figures = conf("guide", tmp_path / "out", *options, data=simulated, model=base)
    assert figures["from_kelvin"] == 400
    assert 0 < figures["effective"] < 1
    assert "r2" not in figures  # measured energies
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in metrics][-15:]
    gained = [row["blank"] - row["loss"] for row in last]
    # So cold, one structure in twenty has all the weight: batches of a force have wide tails.
    assert (np.mean if kind == "energy" else np.median)(gained) > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["target"] == 200
    assert config["data"] == {"temperature": 400.0, "chain": "AGA", "capped": True}


def test_contrasts_do_not_depend_on_micro_batches(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    # 120 structures are 7 contrasts of 16 where a batch has room for 12: some passes stay empty.
    found = []
    for size in ("200", "48"):
        options = ("--kind", "energy", "--temperature", "350", "--steps", "2", *training,
                   "--batch", "200", "--micro-batch", size, "--optimizer.eps", "1e-4")  # fmt: skip
        figures = conf("guide", tmp_path / size, *options, data=simulated, model=base)
        found.append((figures["loss"], weights(tmp_path / size)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(float((v - found[1][1][k]).abs().max()) < 1e-4 for k, v in found[0][1].items())


@pytest.mark.dist
@pytest.mark.parametrize("zero", ["2", pytest.param("3", marks=pytest.mark.slow)])
def test_two_ranks_with_zero_learn_the_same_force(
    zero: str, simulated: Path, base: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    # The slope of the energy is a backward pass of its own, before that of the loss.
    options = ("--temperature", "350", "--steps", "3", *training, "--optimizer.eps", "1e-4")
    ranks = ("--launch.processes", "2", "--micro-batch", "8", "--zero", zero,
             "--gradient-checkpointing", "True")  # fmt: skip
    one = conf("guide", tmp_path / "one", *options, data=simulated, model=base)
    two = conf("guide", tmp_path / "two", *options, *ranks, data=simulated, model=base)
    assert two["zero"] == int(zero)
    assert one["inconsistency"] == pytest.approx(two["inconsistency"], rel=1e-3) != 0
    apart = [
        (v - weights(tmp_path / "two")[k]).abs().max() for k, v in weights(tmp_path / "one").items()
    ]
    assert float(max(apart)) < 1e-4


def test_a_force_is_drawn_to_the_slope_of_its_energy(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf
) -> None:
    options = ("--temperature", "200", "--steps", "40", "--batch", "40", "--micro-batch", "40",
               "--lr", "1e-3", "--warmup", "0", "--ema", "0")  # fmt: skip
    batch = Dataset(rows(simulated)).batch(range(60))
    apart = {}
    for weight in ("0", "10"):
        out = tmp_path / weight
        conf("guide", out, *options, "--consistency", weight, data=simulated, model=base)
        network = ForceNetwork.from_pretrained(out).eval()
        process = network.config.diffusion
        t, noise = drawn(1, 1, range(60), [batch.mask.shape[1]] * 60, process)
        x = process.noised(batch.frames, t, batch.mask, noise)
        told, step = chains(network.config, batch).inputs(network.config), no_step(x)
        at = moved_along(x, step)
        made = network(at.rotations, at.translations, t.float(), **told)
        force = Tangent(made.translation, made.rotation).projected(batch.mask)
        of_energy = slope(made.energy, step, batch.mask)
        found = consistency_loss(force, of_energy, t, batch.mask, process)
        apart[weight] = float(found.mean().detach())
    # So few steps teach little but noise, which the slope has not.
    assert apart["10"] < 0.2 * apart["0"]


def test_padding_does_not_change_what_a_row_draws() -> None:
    process = Process()
    lengths = [5, 10, 64]
    t, noise = drawn(0, 1, range(3), [*lengths[:2], 65], process)
    for row, length in enumerate(lengths[:2]):
        time, alone = drawn(0, 1, [row], [length], process)
        assert time == t[row]
        assert torch.equal(alone.translation[0], noise.translation[row, :length])
        assert torch.equal(alone.rotation[0], noise.rotation[row, :length])
        assert not noise.translation[row, length:].any()


def test_times_are_drawn_where_energies_are_seen() -> None:
    process = Process(t_min=0.002)
    uniform, _ = drawn(0, 1, range(500), [1] * 500, process)
    quadratic, _ = drawn(0, 1, range(500), [1] * 500, process, "quadratic")
    share = (uniform - 0.002) / 0.998
    torch.testing.assert_close(quadratic, 0.002 + 0.998 * share**2)
    assert float((quadratic < 0.15).double().mean()) > 2 * float((uniform < 0.15).double().mean())


def test_relaxed_labels_are_the_regression_of_the_measured_ones(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    some = rows(simulated)[::4]
    named = label(some, platform="Reference", relaxed=True)
    assert [row.energy for row in named] == [row.energy for row in some]
    labels = Labels(Dataset(named), 350.0, "relaxed")
    measured = np.array([row.energy for row in named], dtype=float)
    relaxed = np.array([row.relaxed_energy for row in named], dtype=float)
    slope, intercept = np.polyfit(relaxed, measured, 1)
    fitted = (1 / 350 - 1 / 400) / 0.00831446 * (slope * relaxed + intercept)
    expected = np.exp(fitted.mean() - fitted)
    np.testing.assert_allclose(labels.weights, expected / expected.mean(), rtol=1e-5)
    figures = labels.figures()
    assert figures["slope"] == pytest.approx(slope, abs=1e-3)
    assert figures["r2"] == pytest.approx(np.corrcoef(relaxed, measured)[0, 1] ** 2, abs=1e-3)
    assert figures["effective_measured"] < figures["effective"] <= 1


def test_labels_that_void_the_law_are_refused(simulated: Path) -> None:
    real = rows(simulated)[:4]
    data = Dataset(real)
    with pytest.raises(SparringError, match="of 400 K already"):
        Labels(data, 400.0)
    with pytest.raises(SparringError, match=r"no relaxed energy, .* conf label --relaxed True"):
        Labels(data, 350.0, "relaxed")
    mixed = [replace(real[0], energy_kind="hydrogens"), *real[1:]]
    with pytest.raises(SparringError, match=r"several kinds \(hydrogens, thermal\)"):
        Labels(Dataset(mixed), 350.0)
    broken = np.full((3, 6), np.nan, np.float32).tobytes()
    bad = [real[0], replace(real[1], forces=broken, number=17)]
    Labels(Dataset(bad), 350.0)
    with pytest.raises(SparringError, match=r"structure 17 of .* has forces that are not finite"):
        Labels(Dataset(bad), 350.0, forces=True)
    bare = [real[0], replace(real[1], forces=None)]
    with pytest.raises(SparringError, match="has no forces; conf label computes them"):
        Labels(Dataset(bare), 350.0, forces=True)


def test_an_anchor_is_trained(
    simulated: Path, base: Path, tmp_path: Path, conf: Conf, training: tuple[str, ...]
) -> None:
    options = ("--temperature", "350", "--steps", "2", "--anchor", "0.1", *training)
    figures = conf("guide", tmp_path / "o", *options, data=simulated, model=base)
    assert 0 < figures["anchor"] < 1e4


def test_labels_are_boltzmann_factors_and_batches_are_of_one_chain(simulated: Path) -> None:
    data = Dataset(rows(simulated))
    labels = Labels(data, 350.0)
    energy = np.array([row.energy for row in data.rows])
    expected = np.exp(-(1 / 350 - 1 / 400) / 0.00831446 * (energy - energy.mean()))
    np.testing.assert_allclose(labels.weights, expected / expected.mean(), rtol=1e-5)
    plan = labels.plan(16, 9, seed=1)
    assert [len(batch) for batch in plan] == [16] * 9
    assert plan == labels.plan(16, 9, seed=1) != labels.plan(16, 9, seed=2)


def test_a_guide_of_another_chain_or_kind_is_refused(
    base: Path, guides: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inline = ("--launch.inline", "conf-sample")
    common = ("conf", "sample", "--out", tmp_path / "o", *inline)
    force = guides["force"]
    code, said = fails(capsys, *common, "--model", base, "--guide", force, "--sequence", "AAAA")
    assert code == 2
    assert "the guide was trained on AGA" in said
    other = shutil.copytree(base, tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file(
        {k: v + 1e-3 for k, v in state.items()}, other / "model.safetensors", {"format": "pt"}
    )
    code, said = fails(capsys, *common, "--model", other, "--guide", force)
    assert (code, "trained beside another network" in said) == (2, True)
    code, said = fails(capsys, *common, "--model", base, "--guide", base)
    assert code == 1
    assert "no guide" in said
    code, said = fails(capsys, *common, "--model", force)
    assert code == 1
    assert "holds a ForceNetwork" in said


def test_guidance_needs_energies_and_one_temperature(
    simulated: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], conf: Conf
) -> None:
    plain = tmp_path / "plain"
    pdb = simulated / "topology.pdb"
    conf("structures", plain, pdb=pdb, traj=simulated / "replica0.xtc")
    warm = tmp_path / "warm"
    conf("structures", warm, "--temperature", "400", "--stride", "30", pdb=pdb,
         traj=simulated / "replica0.xtc")  # fmt: skip
    common = ("conf", "guide", "--model", base, "--out", tmp_path / "o")
    inline = ("--launch.inline", "conf-guide")
    code, said = fails(capsys, *common, "--data", plain, *inline)
    assert (code, "data of one temperature" in said) == (1, True)
    code, said = fails(capsys, *common, "--data", warm, *inline)
    assert (code, "conf label computes them" in said) == (1, True)


def test_a_guide_learns_from_the_law_that_its_base_samples(
    simulated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    conf: Conf,
    training: tuple[str, ...],
) -> None:
    words = ("conf", "guide", "--data", simulated, "--temperature", "300", "--steps", "1",
             *training, "--launch.inline", "conf-guide")  # fmt: skip
    said = {}
    for name, options in {"cold": ("--temperature", "350"), "unknown": ()}.items():
        data, network = tmp_path / f"{name}-data", tmp_path / name
        conf("structures", data, *options, "--stride", "2", pdb=simulated / "topology.pdb",
             traj=simulated / "replica0.xtc")  # fmt: skip
        conf("train", network, "--steps", "1", *training, data=data)
        capsys.readouterr()
        made = (*words, "--model", network, "--out", tmp_path / f"{name}-guide")
        code, printed = main([str(word) for word in made]), capsys.readouterr()
        said[name] = (code, printed.out + printed.err)
    assert said["cold"][0] == 1
    assert "trained on data of 350 K, and these are of 400 K" in said["cold"][1]
    assert said["unknown"][0] == 0
    assert "only as far as it samples the law of 400 K" in said["unknown"][1]
