"""DNDM: calls, wall time and quality beside ancestral sampling, figures of docs/diffusion/dndm.md.

--quick     untrained network and a tiny law; under a minute on one core:
            calls_measured beside calls_expected (N = 32, T = 50), wall time of T = 1000 ancestral
            steps over DNDM's on the same network, calls for a batch of 100 rows aligned by rank,
            total variation between DNDM's and ancestral samples of a law of two tokens, beside
            what two samples of one law differ by (tv_floor).
full run    for each recipe, seed and kind of network (see NETWORKS) every sampler that it is for,
            at T = 25, 50, 1000 and infinity (DNDM-C): what the recipe measures, with the bound in
            bits a symbol, against calls and seconds a batch. Tables and plots with 95 % t-intervals
            over seeds. Pairs are dndm-g2p; texts dndm-glosses, or dndm-chitchat; dndm-en-de (BLEU,
            chrF) if it is asked for.

Each network is a run folder of `sparring` below --out. What is there is kept, so the same command
goes on where it was stopped, and --recipes, --networks, --seeds and --T make it in pieces; tables
are always of all that is there. Commands at the same time need different seeds, recipes or
networks.

What keeps it cheap: masks need no t, so one network that ignores it serves all samplers, MDLM's
cache too; RDM at T = 1000 is left out where its law is D3PM's; and what makes T calls or nearly so
(RDM, MDLM's cache) makes them on one batch where T = 1000, but for D3PM, the baseline, on pairs.
The column "first batch" has the symbol error of all samplers on that one. Cost on one core, as
measured: dndm-g2p 14 minutes to train a network and 6 to 12 to sample from it, four networks a
seed, four hours in all; texts at --steps 1000 10 and 20 minutes, three networks a seed.

    python scripts/benchmarks/dndm.py --quick
    python scripts/benchmarks/dndm.py --seeds 0
    python scripts/benchmarks/dndm.py --recipes dndm-en-de --data dndm-en-de=translations

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from sparring.diffusion.dndm.config import SamplerConfig, TextRecipe
from sparring.diffusion.dndm.measures import nearest
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig
from sparring.diffusion.dndm.pipeline import PIPELINE
from sparring.diffusion.dndm.results import cells, found
from sparring.diffusion.dndm.rows import SampledText
from sparring.diffusion.dndm.stages import SAMPLE_TEXT, TEXT_DATA
from sparring.diffusion.dndm.vocabulary import Vocabularies, split
from sparring.launch import runs
from sparring.launch.comparison import interval
from sparring.launch.errors import SparringError
from sparring.launch.progress import Reporter
from sparring.launch.report import Series, line_chart
from sparring.launch.rows import read_rows

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


@dataclass(frozen=True)
class Kind:
    """A network, and the samplers that it is for."""

    noise: Literal["absorbing", "uniform"]
    algorithms: tuple[str, ...]
    """At every T."""
    time: bool = True
    told: bool = False
    """It gets the mask of noisy tokens."""
    tokens: Literal["noisy", "all"] = "noisy"
    bits: bool = True
    """Its p(x_0 | x_t) is one, so there is a bound."""
    texts: bool = True
    """Also for recipes of texts."""


_DNDM = ("dndm", "dndm-v2", "dndm-k")
NETWORKS = {
    "absorbing": Kind("absorbing", ("d3pm", "mdlm-cache", "rdm", "rdm-k", *_DNDM), time=False),
    # p(x_0 | x_t) of all tokens, as D3PM needs it: where DNDM's bias shows.
    "uniform": Kind("uniform", ("d3pm", "rdm", "rdm-k", *_DNDM), tokens="all"),
    # The law of masks, so RDM would be DNDM again.
    "uniform-told": Kind("uniform", ("rdm-k", *_DNDM), told=True),
    # As RDM and the paper train it: tokens that changed, so it never says that one is clean.
    "uniform-rdm": Kind("uniform", ("rdm", "rdm-k", *_DNDM), bits=False, texts=False),
}
_CALLS_ARE_T = ("d3pm", "mdlm-cache", "rdm", "rdm-k")
_SLOW_ONES = {"dndm": "d3pm", "dndm-v2": "d3pm", "dndm-k": "rdm-k"}
_RANDOM = ("d3pm", "mdlm-cache", "rdm", "dndm", "dndm-v2", "first-hitting")
_MANY = 1000
_TEXT_BATCH = 50
PAIRS = ("cmudict", "gettext", "parallel")
TIMES = (25, 50, 1000, 0)
_MOST_SEEDS = 20


def arms(kind: Kind, times: Sequence[int], *, batch: int, pairs: bool) -> list[SamplerConfig]:
    """Every sampler of a network at every T that it has; T = 0 is infinity."""
    listed: list[dict[str, Any]] = []
    for steps in times:
        for name in kind.algorithms:
            slow = name in _CALLS_ARE_T
            law_of_d3pm = name == "rdm" and kind.noise == "absorbing"
            if (slow and not steps) or (law_of_d3pm and steps >= _MANY):
                continue
            baseline = name == "d3pm" and pairs
            count = batch if slow and not baseline and steps >= _MANY else 0
            listed.append({"algorithm": name, "steps": steps, "count": count})
            if pairs and name in ("dndm-k", "rdm-k") and steps in (0, 50):
                listed.append({"algorithm": name, "steps": steps, "token": "argmax"})
    listed.append({"algorithm": "first-hitting"})
    token = "argmax" if pairs else "sample"
    listed.append({"algorithm": "autoregressive", "token": token})
    calls = (4, 8) if pairs else (16, 32)
    listed += [{"algorithm": "maskgit", "steps": n, "token": token} for n in calls]
    listed += [{"algorithm": "threshold", "threshold": p, "token": token} for p in (0.9, 0.6)]
    listed += [{"algorithm": "entropy-bound", "bound": h, "token": token} for h in (0.1, 1.0)]
    return [SamplerConfig(**settings) for settings in listed]


def built(base: TextRecipe, name: str, seed: int, times: Sequence[int], steps: int) -> TextRecipe:
    """A recipe with a network of some kind, and its samplers."""
    kind, pairs = NETWORKS[name], base.data.source in PAIRS
    batch = base.batch if pairs else min(base.batch, _TEXT_BATCH)
    measures = base.evaluate.measures or (
        ("errors",) if pairs else ("perplexity", "words", "entropy")
    )
    steps = steps or base.train.steps
    return replace(
        base,
        name=f"{base.name}-{name}-{steps}-seed{seed}",
        seed=seed,
        seeds=1,
        batch=batch,
        model=replace(base.model, time=kind.time, schedule_conditioning=kind.told),
        process=replace(base.process, noise=kind.noise),
        train=replace(base.train, steps=steps, coupled=False, tokens=kind.tokens),
        samplers=tuple(arms(kind, times, batch=batch, pairs=pairs)),
        evaluate=replace(base.evaluate, measures=measures + ("bits",) * kind.bits),
    )


def first_batch(recipe: TextRecipe, run: Path, sampler: str) -> float:
    """Symbol error of the words that every sampler was given."""
    path = run / sampler / "seed0" / SAMPLE_TEXT.name / "samples.parquet"
    unit = Vocabularies.load(run / TEXT_DATA.name).target.unit
    edits = symbols = 0
    for row in read_rows(path, SampledText)[: recipe.batch]:
        targets = [split(text, unit) for text in (row.target, *row.others)]
        distance, length = nearest(split(row.text, unit), targets)
        edits, symbols = edits + distance, symbols + length
    return edits / symbols


def each_batch(figures: dict[str, float]) -> dict[str, float]:
    """With seconds a batch, since arms differ in their number of batches."""
    figures = dict(figures)
    seconds, batches = figures.pop("seconds"), figures.pop("batches")
    return {**figures, "seconds_a_batch": seconds / batches}


def differences(
    measured: Mapping[str, list[dict[str, float]]], whole: set[str]
) -> dict[str, tuple[float, float, float]]:
    """The first measure of DNDM minus that of what makes T calls, seed by seed, with intervals.

    On one batch where one of them had no more.
    """
    found = {}
    for (ours, theirs), steps in itertools.product(_SLOW_ONES.items(), TIMES[:-1]):
        one, other = (SamplerConfig(algorithm=a, steps=steps).name for a in (ours, theirs))
        if measured.get(one) and len(measured.get(other, ())) == len(measured[one]):
            measure = leading(measured) if {one, other} <= whole else "first_batch"
            if measure in measured[one][0]:
                pairs = zip(measured[one], measured[other], strict=True)
                found[f"{one} - {other}"] = interval([a[measure] - b[measure] for a, b in pairs])
    return found


def leading(measured: Mapping[str, list[dict[str, float]]]) -> str:
    """The measure that is drawn."""
    first = next(iter(measured.values()))[0]
    return "bleu" if "bleu" in first else next(iter(first))


def plots(measured: Mapping[str, list[dict[str, float]]], out: Path, name: str) -> list[str]:
    """The first measure against calls and against seconds, with intervals; a line a sampler.

    Samplers that had all texts, not one batch of them.
    Samplers that leave positions and tokens to chance and those that go by the network's answer
    are two pairs of drawings.
    """
    measure = leading(measured)
    families: dict[str, list[list[dict[str, float]]]] = {}
    for sampler, seeds in measured.items():
        family = re.sub(r"-(T=)?(inf|[0-9.]+)(?=-|$)", "", sampler)
        families.setdefault(family, []).append(seeds)
    paths = []
    for cost, group in itertools.product(("nfe", "seconds_a_batch"), ("random", "chosen")):
        series = []
        for family, points in families.items():
            if (family in _RANDOM) is (group == "random"):
                x = [interval([one[cost] for one in seeds])[0] for seeds in points]
                y = [interval([one[measure] for one in seeds]) for seeds in points]
                at, of = zip(*sorted(zip(x, y, strict=True)), strict=True)
                value, low, high = zip(*of, strict=True)
                series.append(Series(family, at, value, low, high))
        label = "network calls a batch" if cost == "nfe" else "seconds a batch"
        chart = line_chart(
            series, x_label=label, y_label=measure.replace("_", " "), caption=name, marked=True
        )
        path = out / f"{name}-{group}-{cost}.svg"
        path.write_text(str(chart.svg), encoding="utf-8")
        paths.append(str(path))
    return paths


def tables(
    bases: Mapping[str, TextRecipe], options: argparse.Namespace
) -> dict[str, dict[str, dict[str, Any]]]:
    """Print a table of each recipe and kind of network, over the seeds that are there."""
    shown: dict[str, dict[str, dict[str, Any]]] = {}
    times = sorted({*TIMES, *options.T}, key=lambda steps: steps or math.inf)
    for base in bases.values():
        for name in NETWORKS:
            measured: dict[str, list[dict[str, float]]] = {}
            whole: set[str] = set()
            for seed in range(_MOST_SEEDS):
                recipe = built(base, name, seed, times, options.steps)
                run = options.out / recipe.name
                whole |= {sampler.name for sampler in recipe.samplers if not sampler.count}
                for sampler, (figures,) in found(recipe, run).items():
                    if base.data.source in PAIRS:
                        figures["first_batch"] = first_batch(recipe, run, sampler)
                    measured.setdefault(sampler, []).append(each_batch(figures))
            if not measured:
                continue
            drawn = {sampler: figures for sampler, figures in measured.items() if sampler in whole}
            print(f"\n{base.name}, {name}:", *plots(drawn, options.out, f"{base.name}-{name}"))
            heading, *lines = cells(measured)
            for line in (heading, ["---"] * len(heading), *lines):
                print("| " + " | ".join(line) + " |")
            for pair, (mean, low, high) in differences(measured, whole).items():
                print(f"{pair}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
            shown.setdefault(base.name, {})[name] = {
                sampler: {
                    **{key: interval([one[key] for one in figures]) for key in figures[0]},
                    "seeds": len(figures),
                }
                for sampler, figures in measured.items()
            }
    return shown


def full(options: argparse.Namespace) -> dict[str, Any]:
    """Train and sample what is asked for, and show all that is there."""
    paths = dict(pair.split("=", 1) for pair in options.data)
    bases: dict[str, TextRecipe] = {}
    for given in options.recipes:
        file = Path(given) if given.endswith(".toml") else ROOT / "recipes" / f"{given}.toml"
        _, base = runs.load_recipe(file)
        if base.name in paths:
            base = replace(base, data=replace(base.data, path=paths[base.name]))
        bases[base.name] = base
    for base, seed, name in itertools.product(bases.values(), options.seeds, options.networks):
        if not NETWORKS[name].texts and base.data.source not in PAIRS:
            continue
        recipe = built(base, name, seed, options.T, options.steps)
        # Another piece of the grid is another recipe in the same folder.
        runs.execute(
            PIPELINE, recipe, options.out / recipe.name, Reporter(quiet=False), changed=True
        )
    figures = tables(bases, options)
    return {"benchmark": "dndm", "threads": torch.get_num_threads(), "figures": figures}


def whole_or_infinity(text: str) -> int:
    """T, 0 for "inf"."""
    return 0 if text == "inf" else int(text)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/dndm-benchmark"))
    parser.add_argument("--recipes", nargs="+", default=["dndm-g2p", "dndm-glosses"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--T", nargs="+", type=whole_or_infinity, default=list(TIMES))
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: the recipe's")
    parser.add_argument("--data", nargs="+", default=[], metavar="RECIPE=FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    try:
        figures = quick() if options.quick else full(options)
    except SparringError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
