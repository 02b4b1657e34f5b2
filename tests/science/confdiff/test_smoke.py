"""From a simulation to sound samples and a guide, and a checked-in simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mdtraj
import numpy as np
import pytest

from sparring.launch.rows import read_rows
from sparring.science.confdiff.dataset import CONFORMATIONS
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.validity import sound

Conf = Callable[..., dict[str, Any]]
DATA = Path(__file__).with_name("data")


@pytest.mark.slow
def test_samples_are_sound_and_relaxed_labels_weigh_more_evenly(tmp_path: Path, conf: Conf) -> None:
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
