"""DNDM: calls, wall time and quality beside ancestral sampling, figures of docs/diffusion/dndm.md.

--quick     untrained network and a tiny law; under a minute on one core:
            calls_measured beside calls_expected (N = 32, T = 50), wall time of T = 1000 ancestral
            steps over DNDM's on the same network, calls for a batch of 100 rows aligned by rank,
            total variation between DNDM's and ancestral samples of a law of two tokens, beside
            what two samples of one law differ by (tv_floor).
full run    the recipe dndm-g2p for each noise and three seeds, networks and samples of all samplers
            at T = 25, 50, 1000 and infinity: symbol error against calls and seconds. Each is a run
            of `sparring`, so the same command goes on where it was stopped.

    python scripts/benchmarks/dndm.py --quick
    python scripts/benchmarks/dndm.py --out runs/dndm-benchmark        # hours on one core

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.diffusion.dndm import (
    LinearSchedule,
    Sampler,
    absorbing,
    d3pm,
    dndm,
    expected_calls,
)
from sparring.diffusion.dndm.config import SamplerConfig
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig
from sparring.diffusion.dndm.pipeline import PIPELINE
from sparring.diffusion.dndm.results import cells, found
from sparring.launch import runs
from sparring.launch.config import plain
from sparring.launch.progress import Reporter
from sparring.launch.report import Series, line_chart

TOKENS = 32
ROOT = Path(__file__).resolve().parents[2]


def network() -> TextDenoiser:
    """A small encoder of 32 symbols with random weights: its cost is that of a trained one."""
    torch.manual_seed(0)
    shape = {"hidden": 64, "layers": 2, "heads": 2, "feedforward": 128}
    config = TextDenoiserConfig(vocab_size=30, max_target=TOKENS)
    config.network = {**config.network, **shape}
    return TextDenoiser(config).eval()


def timed(sampler: Sampler, denoiser: Any, rows: int, seed: int = 0) -> tuple[Any, float]:
    """A sample of some rows, and its seconds."""
    x = torch.full((rows, TOKENS), 1)
    started = time.perf_counter()
    made = sampler.sample(
        denoiser,
        x,
        x == 1,
        noise=absorbing(30, 1),
        generator=torch.Generator().manual_seed(seed),
    )
    return made, time.perf_counter() - started


def perfect(law: Tensor, mask: int) -> Callable[[Tensor, Tensor], Tensor]:
    """log p of each of two tokens given the other one if that is clean."""
    size = len(law)
    table = torch.zeros(size + 1, size + 1, 2, size + 1, dtype=torch.float64)
    for a in range(size + 1):
        for b in range(size + 1):
            left = law[:, b] if b < mask else law.sum(1)
            right = law[a] if a < mask else law.sum(0)
            table[a, b, 0, :size] = left / left.sum()
            table[a, b, 1, :size] = right / right.sum()
    return lambda x, t: table[x[:, 0], x[:, 1]].log()


def samples_law(sampler: Sampler, law: Tensor, rows: int, seed: int) -> Tensor:
    """Frequencies of the pairs that a sampler makes."""
    mask = len(law)
    x = torch.full((rows, 2), mask)
    made = sampler.sample(
        perfect(law, mask),
        x,
        x == mask,
        noise=absorbing(mask + 1, mask),
        generator=torch.Generator().manual_seed(seed),
    ).sequences
    counts = torch.bincount(made[:, 0] * mask + made[:, 1], minlength=mask**2)
    return counts.double() / rows


def quick() -> dict[str, Any]:
    """Figures that need no training."""
    net = network().denoiser
    # Calls do not depend on what the network says.
    many, _ = timed(dndm(50), lambda x, t: torch.zeros(*x.shape, 30), 2000)
    rounds = [(timed(d3pm(1000), net, 1, s), timed(dndm(1000), net, 1, s)) for s in range(3)]
    ratios = sorted(slow / fast for (_, slow), (_, fast) in rounds)
    aligned, _ = timed(dndm(1000), net, 100)
    law = torch.distributions.Dirichlet(torch.full((9,), 0.3, dtype=torch.float64))
    torch.manual_seed(3)
    pairs = law.sample().view(3, 3)
    rows, steps = 8000, 4
    ours = samples_law(dndm(steps), pairs, rows, 1)
    theirs = samples_law(d3pm(steps), pairs, rows, 2)
    again = samples_law(d3pm(steps), pairs, rows, 3)
    return {
        "calls_measured": float(many.evaluations.double().mean()),
        "calls_expected": expected_calls(LinearSchedule(), 50, TOKENS),
        "speedup_wall_vs_ancestral": ratios[1],
        "speedup_wall_spread": [ratios[0], ratios[-1]],
        "speedup_calls": 1000 / (sum(fast.nfe for _, (fast, _) in rounds) / len(rounds)),
        "rank_aligned_calls_at_batch_100": aligned.nfe,
        "tv_vs_ancestral": float((ours - theirs).abs().sum() / 2),
        "tv_floor": float((again - theirs).abs().sum() / 2),
        "threads": torch.get_num_threads(),
    }


def grid() -> tuple[SamplerConfig, ...]:
    """Every sampler at every T that it has."""
    names = ("d3pm", "rdm", "rdm-k", "dndm", "dndm-v2", "dndm-k")
    listed: list[Any] = [
        SamplerConfig(algorithm=name, steps=steps)  # type: ignore[arg-type]
        for steps in (25, 50, 1000)
        for name in names
    ]
    listed += [
        SamplerConfig(algorithm="dndm-c"),
        SamplerConfig(algorithm="dndm-c", position="confidence"),
        SamplerConfig(algorithm="first-hitting"),
        SamplerConfig(algorithm="autoregressive"),
        SamplerConfig(algorithm="dndm-k", steps=50, token="argmax"),
    ]
    return tuple(listed)


def plots(measured: Mapping[str, list[dict[str, float]]], out: Path, noise: str) -> list[str]:
    """Drawings of symbol error against calls and against seconds, a line a sampler over its T."""
    families: dict[str, list[dict[str, float]]] = {}
    for name, figures in measured.items():
        mean = {key: sum(one[key] for one in figures) / len(figures) for key in figures[0]}
        families.setdefault(re.sub(r"-T=[^-]*", "", name), []).append(mean)
    paths = []
    for cost, label in (("nfe", "network calls a batch"), ("seconds", "seconds a batch")):
        series = []
        for name, points in families.items():
            points.sort(key=lambda point: point[cost])
            x = [point[cost] for point in points]
            series.append(Series(name, x, [point["symbol_error"] for point in points]))
        chart = line_chart(
            series, x_label=label, y_label="symbol error rate", caption=noise, marked=True
        )
        path = out / f"{noise}-{cost}.svg"
        path.write_text(str(chart.svg), encoding="utf-8")
        paths.append(str(path))
    return paths


def full(out: Path, *, seeds: int, steps: int) -> dict[str, Any]:
    """Train and sample; a table for each noise."""
    _, recipe = runs.load_recipe(ROOT / "recipes" / "dndm-g2p.toml")
    results: dict[str, Any] = {}
    for noise in ("absorbing", "uniform"):
        measured: dict[str, list[dict[str, float]]] = {}
        for seed in range(seeds):
            chosen = dataclasses.replace(
                recipe,
                name=f"{noise}-{seed}",
                seed=seed,
                seeds=1,
                samplers=grid(),
                process=dataclasses.replace(recipe.process, noise=noise),
                train=dataclasses.replace(recipe.train, steps=steps or recipe.train.steps),
            )
            folder = out / chosen.name
            runs.execute(PIPELINE, chosen, folder, Reporter(quiet=False))
            for name, figures in found(chosen, folder).items():
                measured.setdefault(name, []).extend(figures)
        results[noise] = measured
        print(noise, *plots(measured, out, noise))
        for line in cells(measured):
            print("  " + " | ".join(line))
    return {"recipe": plain(recipe.train), "figures": results}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/dndm-benchmark"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: the recipe's")
    options = parser.parse_args()
    figures = (
        quick() if options.quick else full(options.out, seeds=options.seeds, steps=options.steps)
    )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
