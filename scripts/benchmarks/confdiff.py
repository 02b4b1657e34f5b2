"""ConfDiff: exactness of its parts and the cost of sampling, figures of docs/science/confdiff.md.

--quick   under a minute on one core:
          igso3_norm_error: |1 - integral| of the IGSO(3) angle density, the largest of six widths;
          equivariance_error: how far the tiny network's prediction for turned and moved frames is
          from its turned and moved prediction, float64, in nm;
          guided_mean, guided_var: guided samples of N(0, 1) tilted by (x - 1.5)^2 / 2, which is
          N(.75, .50), by the SDE with 500 steps; guided_error is their standard error;
          sampling_seconds_per_1000: the tiny model, 5 residues, 200 steps, with the median and the
          spread of three rounds, and as a ratio to as many calls of the network alone;
          md_cpu_over_reference: time of a step of dynamics on OpenMM's CPU platform over that on
          its Reference platform, capped AAAAA (62 atoms) and CLN025 (166), with the spread.
full run  the recipe confdiff-ala5 (hours); the same command goes on where it was stopped.

    python scripts/benchmarks/confdiff.py --quick
    python scripts/benchmarks/confdiff.py --out runs/confdiff-ala5

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from sparring.launch import runs
from sparring.launch.progress import Reporter
from sparring.science.confdiff import md
from sparring.science.confdiff.dataset import blank
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import ForceGuidance, NetworkScore
from sparring.science.confdiff.igso3 import angle_density
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork
from sparring.science.confdiff.physics import Platform, context, openmm_module
from sparring.science.confdiff.pipeline import PIPELINE
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.solvers import SampleNoise, solve
from sparring.science.confdiff.tangent import Score, Tangent
from sparring.science.confdiff.train import chains

ROOT = Path(__file__).resolve().parents[2]
STEPS, RESIDUES = 200, 5


def norm_error() -> float:
    """Of the density of rotation angles."""
    angles = torch.linspace(1e-9, math.pi, 200_001, dtype=torch.float64)
    errors = []
    for width in (0.1, 0.13, 0.3, 0.5, 1.0, 1.5):
        density = angle_density(angles, torch.tensor(width, dtype=torch.float64))
        errors.append(abs(1 - float(torch.trapezoid(density, angles))))
    return max(errors)


def tiny() -> ConformationNetwork:
    """The tiny network with random weights: its cost is that of a trained one."""
    torch.manual_seed(0)
    return ConformationNetwork(ConformationConfig()).eval()


@torch.no_grad()
def equivariance_error() -> float:
    """Of the tiny network in float64."""
    network = tiny().double()
    told = blank(["ACDEFG"] * 2)
    noise = SampleNoise(0, [0, 1], [6, 6])
    x = Process().prior(told.mask, noise.draw())
    turn, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    turn = turn * torch.sign(torch.linalg.det(turn))
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    given = chains(network.config, told).inputs(network.config)

    def predict(x: Frames) -> Frames:
        out = network(x.rotations, x.translations, t, **given)
        return Frames(out.rotations, out.translations)

    # The network's input has its centre at 0, wherever the frames are.
    one, two = predict(x).moved(turn, shift), predict(x.moved(turn, shift))
    apart = [
        (a - b).abs().max() for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
    ]
    return float(max(apart))


def guided(count: int, steps: int) -> tuple[float, float]:
    """Mean and variance of the relative coordinate of two residues along one axis."""
    process = Process()

    def coordinate(x: Frames) -> torch.Tensor:
        return (x.translations[:, 0, 0] - x.translations[:, 1, 0]) / math.sqrt(2)

    def score(x: Frames, t: float) -> Score:
        # q_t is N(0, 1) at all t, apart from the centre of mass.
        return Score(-x.translations, torch.zeros_like(x.translations))

    def force(x: Frames, t: float) -> Tangent:
        alpha, std = float(process.alpha(t)), float(process.std(t))
        r = coordinate(x)
        along = -r + (r - 0.75 * alpha) / (0.5 * alpha**2 + std**2)
        out = torch.zeros_like(x.translations)
        out[:, 0, 0], out[:, 1, 0] = along / math.sqrt(2), -along / math.sqrt(2)
        return Tangent(out, torch.zeros_like(out))

    noise = SampleNoise(0, range(count), [2] * count)
    guided_score = ForceGuidance(score, force)
    found = solve(guided_score, process, noise.mask, noise, steps=steps, grid="uniform")
    r = coordinate(found.x)
    return float(r.mean()), float(r.var())


def cost(samples: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds for 1000 samples, and for the network's calls alone; of several rounds."""
    network, process = tiny(), Process()
    told = blank(["A" * RESIDUES] * samples)
    score = NetworkScore(network, process, chains(network.config, told))
    given = chains(network.config, told).inputs(network.config)
    whole, calls = [], []
    for number in range(rounds):
        noise = SampleNoise(number, range(samples), [RESIDUES] * samples)
        started = time.perf_counter()
        found = solve(score, process, told.mask, noise, steps=STEPS)
        whole.append((time.perf_counter() - started) * 1000 / samples)
        x = found.x.to(torch.float32)
        t = torch.full((samples,), 0.5)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(STEPS + 1):
                network(x.rotations, x.translations, t, **given)
        calls.append((time.perf_counter() - started) * 1000 / samples)
    return whole, calls


def md_ratios(sequence: str, capped: bool, steps: int, rounds: int) -> list[float]:
    """Seconds of some steps on the CPU platform over those on Reference, of several rounds."""
    simulation = md.Simulation(sequence=sequence, capped=capped)
    molecule, positions = md.starting_point(simulation)
    system = molecule.system(True, simulation.hydrogen_mass)

    def seconds(platform: Platform) -> float:
        integrator = openmm_module().LangevinMiddleIntegrator(300, 1, 0.002)
        at = context(system, integrator, platform)
        at.setPositions(positions)
        integrator.step(10)
        started = time.perf_counter()
        integrator.step(steps)
        return time.perf_counter() - started

    return sorted(seconds("CPU") / seconds("Reference") for _ in range(rounds))


def quick(count: int, samples: int, rounds: int) -> dict[str, Any]:
    """Figures that need no training."""
    mean, variance = guided(count, 500)
    whole, calls = cost(samples, rounds)
    ratios = sorted(a / b for a, b in zip(whole, calls, strict=True))
    peptides = {"AAAAA": True, "YYDPETGTWY": False}
    ratios_of_md = {name: md_ratios(name, capped, 200, rounds) for name, capped in peptides.items()}
    return {
        "benchmark": "confdiff",
        "igso3_norm_error": norm_error(),
        "equivariance_error": equivariance_error(),
        "guided_mean": mean,
        "guided_var": variance,
        "guided_error": math.sqrt(0.5 / count),
        "sampling_seconds_per_1000": statistics.median(whole),
        "sampling_seconds_spread": [min(whole), max(whole)],
        "sampling_over_network_alone": statistics.median(ratios),
        "sampling_over_network_spread": [ratios[0], ratios[-1]],
        "md_cpu_over_reference": {n: statistics.median(v) for n, v in ratios_of_md.items()},
        "md_cpu_over_reference_spread": {n: [v[0], v[-1]] for n, v in ratios_of_md.items()},
        "threads": torch.get_num_threads(),
    }


def full(out: Path) -> dict[str, Any]:
    """The recipe's table."""
    _, recipe = runs.load_recipe(ROOT / "recipes" / "confdiff-ala5.toml")
    result = runs.execute(PIPELINE, recipe, out, Reporter(quiet=False))
    print(result.pop("table"))
    return result


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/confdiff-ala5"))
    parser.add_argument("--count", type=int, default=2000, help="of guided samples on a line")
    parser.add_argument("--samples", type=int, default=60, help="conformations that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    options = parser.parse_args()
    if options.quick:
        found = quick(options.count, options.samples, options.rounds)
    else:
        found = full(options.out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
