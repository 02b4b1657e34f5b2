"""From a simulation to sound samples and a guide that lowers energies, and a checked-in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import pytest
import torch

from sparring.launch.rows import read_rows
from sparring.science.confdiff.dataset import CONFORMATIONS, Dataset, blank
from sparring.science.confdiff.guidance import NetworkEnergy, energy_guidance
from sparring.science.confdiff.heads import EnergyNetwork
from sparring.science.confdiff.network import load_as
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.solvers import SampleNoise, solve
from sparring.science.confdiff.train import chains
from sparring.science.confdiff.validity import sound

Conf = Callable[..., dict[str, Any]]
DATA = Path(__file__).with_name("data")


@pytest.mark.slow
def test_samples_are_sound_and_a_guide_lowers_their_energy(tmp_path: Path, conf: Conf) -> None:
    simulation = ("--sequence", "AAAAA", "--temperature", "400", "--nanoseconds", "0.2",
                  "--equilibration", "0.02", "--save-every", "0.4", "--replicas", "1",
                  "--start", "helix")  # fmt: skip
    training = ("--batch", "64", "--micro-batch", "64", "--lr", "1e-3", "--ema", "0.99")
    conf("md", tmp_path / "md", *simulation)
    conf("label", tmp_path / "labels", "--relaxed", "True", data=tmp_path / "md")
    base = tmp_path / "base"
    plain = ("--steps", "900", "--loss.plain", "True", "--times", "quadratic")
    conf("train", base, *plain, *training, data=tmp_path / "md")
    common = ("--num-samples", "64", "--steps", "100", "--filter", "False")
    conf("sample", tmp_path / "plain", *common, model=base)
    assert np.mean(sound(read_rows(tmp_path / "plain" / CONFORMATIONS, Conformation))) > 0.5

    options = ("--kind", "energy", "--energy", "relaxed", "--temperature", "300", "--steps", "300")
    guide = tmp_path / "guide"
    figures = conf("guide", guide, *options, *training, model=base, data=tmp_path / "labels")
    assert figures["effective"] > figures["effective_measured"]
    # So short a training leaves samples of high energy. The exact score of the simulated frames
    # does not: each sample ends at one of them, whose energy is known.
    rows = read_rows(tmp_path / "labels" / CONFORMATIONS, Conformation)
    energies = torch.tensor([row.relaxed_energy for row in rows], dtype=torch.float64)
    network = load_as(EnergyNetwork, guide)
    told = blank(["AAAAA"] * 128)
    data = Dataset(rows).batch(range(len(rows)))
    process, even = network.config.diffusion, torch.zeros(len(rows)).double()
    oracle = FiniteSet(process, data.frames.to(torch.float64), even, data.mask[0])
    energy = NetworkEnergy(network, chains(network.config, told))
    means = []
    for score in (oracle, energy_guidance(oracle, energy, told.mask)):
        noise = SampleNoise(1, range(128), [5] * 128)
        end = solve(score, process, told.mask, noise, steps=100)
        means.append(float((oracle.posterior(end.x, process.t_min) @ energies).mean()))
    assert means[0] - means[1] > 3 * float(energies.std()) / 128**0.5


def test_the_reference_simulation_reads_as_it_was(tmp_path: Path, conf: Conf) -> None:
    # 100 frames of our own MD (2 ns, every 20 ps), to see that formats stay readable.
    options = ("--temperature", "400")
    pdb, traj = DATA / "ala5.pdb", DATA / "ala5-400K.xtc"
    figures = conf("structures", tmp_path / "o", *options, pdb=pdb, traj=traj)
    assert figures["conformations"] == 100
    rows = read_rows(tmp_path / "o" / CONFORMATIONS, Conformation)
    assert {(row.sequence, row.capped, row.temperature) for row in rows} == {("AAAAA", True, 400)}
    assert all(sound(rows))
    whole = mdtraj.load(traj, top=pdb)
    ca = whole.atom_slice(whole.topology.select("name CA"))
    assert float(mdtraj.compute_rg(ca).mean()) == pytest.approx(0.36895, abs=1e-4)
