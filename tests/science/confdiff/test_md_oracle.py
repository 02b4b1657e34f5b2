"""The exact score of simulated frames drives the sampler: no network between data and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sparring.launch.rows import read_rows
from sparring.science.confdiff.config import inverse_temperature_change
from sparring.science.confdiff.coverage import rmsd
from sparring.science.confdiff.dataset import CONFORMATIONS, Dataset
from sparring.science.confdiff.oracle import FiniteSet
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.solvers import SampleNoise, solve

SAMPLES, STEPS = 160, 120


def test_simulated_frames_come_back_with_their_boltzmann_weights(simulated: Path) -> None:
    rows = read_rows(simulated / CONFORMATIONS, Conformation)[::15]
    batch = Dataset(rows).batch(range(len(rows)))
    frames = batch.frames.to(torch.float64)
    process = Process()
    flat = torch.zeros(len(rows), dtype=torch.float64)
    base = FiniteSet(process, frames, flat, batch.mask[0])
    energies = torch.tensor([row.energy for row in rows], dtype=torch.float64)
    # So cold that the weights of few frames differ enough to be counted.
    colder = base.tilted(inverse_temperature_change(200, 400) * (energies - energies.mean()))
    for score in (base, colder):
        noise = SampleNoise(1, range(SAMPLES), [3] * SAMPLES)
        found = solve(score, process, noise.mask, noise, steps=STEPS)
        ends = score.posterior(found.x, process.t_min)
        # At the end every sample is one frame: 0.045 nm of noise is far less than their distances.
        assert float(ends.max(1).values.median()) > 0.99
        expected = score.log_weights.softmax(0)
        counted = ends.mean(0)
        error = (expected * (1 - expected) / SAMPLES).sqrt().clamp_min(1 / SAMPLES)
        assert bool(((counted - expected).abs() < 4 * error).all())
    assert float((colder.log_weights.softmax(0) - 1 / len(rows)).abs().max()) > 0.1
    nearest = np.array([rmsd(found.x.translations.numpy(), frame).min()
                        for frame in frames.translations.numpy()])  # fmt: skip
    assert nearest[int(expected.argmax())] < 0.1
