"""MARS against AdamW, Muon and Lion on a small language model: figures of docs/optimizers/mars.md.

A GPT-2 of the paper's kind (no biases, no dropout, tied head) with 1.2 M parameters learns human
conversations (chitchat-dataset, MIT), or the paragraphs of a text file, in a BPE of 1024 tokens:
bytes would spend the same arithmetic on a third of the text, a larger vocabulary more of it on the
head. Validation conversations are whole ones, and the BPE is trained without them.

Every arm tunes its peak learning rate on the same number of runs, a factor of 2 apart, on seed 0:
while the best rate of any arm lies at an edge of its grid, all arms get one more, beyond the edge
with the lower loss. The best one is measured on other seeds. A seed is an initialisation and an
order of data, the same for all arms, so differences are taken seed by seed. Warmup over a tenth of
the steps, then cosine to 0 (the paper's MARS ends at 1/200 of its peak); gradients clipped to norm
1; lr x weight_decay = 6e-5 in all arms and at all lr (the paper's product, for AdamW as for MARS;
its Muon had none), none for the norms' gains.

    python scripts/benchmarks/mars_lm.py --out runs/mars-lm            # 6 to 8 hours of one core
    python scripts/benchmarks/mars_lm.py --out runs/mars-lm --table-only
    python scripts/benchmarks/mars_lm.py --out runs/quick --quick      # seconds, figures of no use

A run has 1.8 M tokens, 220 steps: all ten arms with four to six rates and three seeds then take 8
hours of one core at most (6500 tokens a second); 3 M tokens would take 13. It is the early phase of
training either way.

A finished run is a file of OUT/runs, named by arm, rate, seed and a hash of its setting. A call
makes the runs that are missing there, in any number of pieces, and reads none of another setting.
On one machine losses repeat to the last digit; elsewhere sums round differently. OUT/table.md and
OUT/curves.svg hold what came out, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from mars_lm_model import Data, LanguageModel, batches, corpus_file, load
from mars_lm_runs import TUNING_SEED, Record, Runs
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from sparring.launch.artifacts import hash_file, write_atomically
from sparring.launch.comparison import interval
from sparring.optimizers import MARS

LR_TIMES_DECAY = 6e-5
BASELINES = ("adamw", "adamw-mars-betas")
# What each variant is to be told from.
RIVALS = (("mars-adamw", "mars-adamw-gamma0"), ("mars-adamw-exact", "mars-adamw"),
          ("mars-lion", "lion"), ("mars-shampoo", "muon"))  # fmt: skip
SETTING = ("layers", "width", "heads", "context", "vocabulary", "documents", "batch", "tokens",
           "validation", "curve", "threads")  # fmt: skip
QUICK = {"layers": 1, "width": 32, "heads": 2, "context": 32, "vocabulary": 384, "documents": 300,
         "batch": 512, "tokens": 3072, "validation": 2048, "points": 2, "extensions": 1, "curve": 2,
         "seeds": [1, 2]}  # fmt: skip

Groups = list[dict[str, Any]]
Build = Callable[[Groups, float], list[Optimizer]]

# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """An optimizer for the groups [hidden matrices, embeddings, gains] and how it is used."""

    build: Build
    lr: float
    """Lowest point of its grid."""
    rest: float = 1.0
    """Learning rate of the embeddings over that of the hidden matrices."""
    exact: bool = False
    length: float = 1.0
    """Steps over those of the other arms."""


def adamw(*betas: float) -> Build:
    return lambda groups, lr: [AdamW(groups, lr=lr, betas=(betas[0], betas[1]))]


def mars(rest: float | None = None, **settings: Any) -> Build:
    return lambda groups, lr: [MARS(groups, lr, lr_1d=rest and rest * lr, **settings)]


REST = 0.2  # at the learning rates that suit Muon, a fifth suits AdamW; the same for MARS-Shampoo


def muon(groups: Groups, lr: float) -> list[Optimizer]:
    return [Muon(groups[:1], lr=lr), AdamW(groups[1:], lr=REST * lr, betas=(0.9, 0.95))]


# Unclipped MARS-Lion with betas=(B2, -) and gamma = 1 - B1 / B2 is exactly Lion(B1, B2).
lion = mars(variant="lion", betas=(0.99, 0.99), gamma=1 - 0.9 / 0.99, clip_c=False,
            optimize_1d=True)  # fmt: skip

ARMS: dict[str, Arm] = {
    "adamw": Arm(adamw(0.9, 0.95), 5e-4),
    "adamw-mars-betas": Arm(adamw(0.95, 0.99), 5e-4),
    "muon": Arm(muon, 1e-2, REST),
    "mars-adamw": Arm(mars(), 5e-4),
    "mars-adamw-gamma0": Arm(mars(gamma=0.0), 5e-4),
    "mars-adamw-exact": Arm(mars(exact=True), 5e-4, exact=True),
    "mars-adamw-exact-equal-gradients": Arm(mars(exact=True), 5e-4, exact=True, length=0.5),
    "lion": Arm(lion, 2.5e-4),
    "mars-lion": Arm(mars(variant="lion", optimize_1d=True), 2.5e-4),
    "mars-shampoo": Arm(mars(REST, variant="shampoo"), 1e-2, REST),
}


def groups(model: nn.Module, arm: Arm, lr: float) -> Groups:
    """Named parameters as [hidden matrices, embeddings, gains], decayed alike in all arms."""
    kinds: Groups = [
        {"params": [], "weight_decay": LR_TIMES_DECAY / lr},
        {"params": [], "weight_decay": LR_TIMES_DECAY / (arm.rest * lr)},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, weight in model.named_parameters():
        kinds[2 if weight.ndim == 1 else int("embed" in name)]["params"].append((name, weight))
    return kinds


# ---------------------------------------------------------------- one run


def chunks(rows: Tensor) -> Sequence[Tensor]:
    """Parts of 1024 tokens, which stay in a core's cache: a seventh faster than 8192."""
    return torch.split(rows, max(1, 1024 // (rows.size(1) - 1)))


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor) -> float:
    total = sum(float(model(part)) * len(part) for part in chunks(rows))
    return total / len(rows)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def train(arm: Arm, lr: float, seed: int, data: Data, options: argparse.Namespace) -> Record:
    """Train once; a loss that is not finite ends the run, which then has no validation loss."""
    torch.manual_seed(seed)
    model = LanguageModel(options)
    optimizers = arm.build(groups(model, arm, lr), lr)
    peaks = [(group, group["lr"]) for opt in optimizers for group in opt.param_groups]
    size = options.batch // options.context
    steps = max(1, round(arm.length * options.tokens / (size * options.context)))

    def gradient(batch: Tensor) -> float:
        model.zero_grad()
        loss = 0.0
        for part in chunks(batch):
            share = model(part) * (len(part) / len(batch))
            share.backward()
            loss += share.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss

    def step_all() -> None:
        for optimizer in optimizers:
            optimizer.step()

    curve: list[tuple[int, float]] = []
    started, step, finite = time.process_time(), 0, True
    for step, batch in enumerate(islice(batches(data.train, size, seed), steps), start=1):
        if arm.exact:  # the same batch at the previous weights; then the pending update is made
            gradient(batch)
            step_all()
        for group, peak in peaks:
            group["lr"] = peak * schedule(step - 1, steps)
        if not (finite := math.isfinite(gradient(batch))):
            break
        with optimizers[0].moments() if arm.exact else nullcontext():  # type: ignore[attr-defined]
            step_all()
        if step % options.curve == 0 and step < steps:
            few = data.validation[: max(1, len(data.validation) // 8)]
            curve.append((step * options.batch, evaluate(model, few)))  # exact: one update behind
    if arm.exact and finite:
        model.zero_grad()
        step_all()  # the last update
    final = evaluate(model, data.validation) if finite else math.nan
    return {
        "validation": final if math.isfinite(final) else None,
        "curve": [point for point in curve if math.isfinite(point[1])],
        "steps": step,
        "tokens": step * options.batch,
        "gradients": step * (2 if arm.exact else 1),
        "cpu_seconds": round(time.process_time() - started, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes_per_token": data.bytes_per_token,
    }


# ---------------------------------------------------------------- the sweep


def sweep(runs: Runs, data: Data, options: argparse.Namespace) -> None:
    def run(name: str, lr: float, seed: int) -> None:
        if (name, lr, seed) not in runs.found:
            result = train(ARMS[name], lr, seed, data, options)
            runs.add({"arm": name, "lr": lr, "seed": seed, **result})
            loss = "diverged" if result["validation"] is None else f"{result['validation']:.4f}"
            seconds = result["cpu_seconds"]
            print(f"{name}, lr {lr:g}, seed {seed}: {loss}, {seconds} CPU s", file=sys.stderr)

    for name in options.arms:
        for point in range(options.points):
            run(name, ARMS[name].lr * 2**point, TUNING_SEED)
    tried = {name: len(runs.tuning(name)) for name in ARMS}  # by other calls too
    for size in range(options.points, options.points + options.extensions + 1):
        for name in options.arms:
            while len(runs.tuning(name)) < size:
                run(name, runs.next(name), TUNING_SEED)
        # Judged only where no other call has gone on: what has one more was extended for a reason.
        if max(tried.values()) <= size and not any(map(runs.at_edge, options.arms)):
            break
    for seed in options.seeds:
        for name in options.arms:
            run(name, runs.best(name), seed)


# ---------------------------------------------------------------- what came out


def difference(mine: dict[int, float], other: dict[int, float]) -> Record | None:
    """Mean of the differences by seed, with Student's 95 % interval."""
    values = [mine[seed] - other[seed] for seed in mine if seed in other]
    if len(values) < 2:
        return None
    middle, low, high = interval(values)
    return {"mean": middle, "low": low, "high": high, "seeds": len(values)}


def summary(runs: Runs, options: argparse.Namespace) -> Record:
    """Per arm the figures of its best learning rate, over the seeds that did not diverge."""
    arms: Record = {}
    losses: dict[str, dict[int, float]] = {}
    for name in filter(runs.tuning, options.arms):
        tried, best, made = runs.tuning(name), runs.best(name), runs.at_best(name, options.seeds)
        values = {s: r["validation"] for s, r in made.items() if r["validation"] is not None}
        losses[name] = values
        example = runs.found[name, best, TUNING_SEED]
        arms[name] = {
            "lr": best,
            "lr_tried": {f"{lr:g}": x if math.isfinite(x) else None for lr, x in tried.items()},
            "tuning_runs": len(tried),
            "at_edge": runs.at_edge(name),
            "validation_loss": mean(values.values()) if values else None,
            "sd": stdev(values.values()) if len(values) > 1 else None,
            "seeds": len(values),
            "diverged": len(made) - len(values),
            **{key: example[key] for key in ("steps", "tokens", "gradients", "cpu_seconds")},
        }
    pairs = [*((name, base) for base in BASELINES for name in arms if name != base), *RIVALS]
    differences = {
        f"{name} minus {other}": difference(losses[name], losses[other])
        for name, other in pairs
        if name in losses and other in losses
    }
    facts: Record = next(iter(runs.found.values()), {})
    shared = {key: facts.get(key) for key in ("parameters", "bytes_per_token")}
    return {"benchmark": "mars_lm", "arms": arms, "differences": differences, **shared,
            "setting": runs.setting}  # fmt: skip


def table(found: Record) -> list[str]:
    def delta(pair: str) -> str:
        value = found["differences"].get(pair)
        return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]" if value else "-"

    heads = [
        "arm",
        "tuning runs",
        "best lr",
        "validation loss, mean ± sd",
        *(f"minus {b}" for b in BASELINES),
    ]
    heads += ["steps", "tokens", "gradients", "CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    grids = []
    for name, arm in found["arms"].items():
        loss = "-" if arm["validation_loss"] is None else f"{arm['validation_loss']:.4f}"
        loss += f" ± {arm['sd']:.4f}" if arm["sd"] is not None else ""
        loss += f" ({arm['diverged']} diverged)" if arm["diverged"] else ""
        edge = " (edge of the grid)" if arm["at_edge"] else ""
        cells = [name, str(arm["tuning_runs"]), f"{arm['lr']:g}{edge}", loss]
        cells += [delta(f"{name} minus {base}") for base in BASELINES]
        cells += [f"{arm[key]:,}" for key in ("steps", "tokens", "gradients")]
        lines.append("| " + " | ".join([*cells, f"{arm['cpu_seconds']:.0f}"]) + " |")
        tried = {lr: "diverged" if x is None else f"{x:.4f}" for lr, x in arm["lr_tried"].items()}
        grids.append(f"- {name}: " + ", ".join(f"{lr} {text}" for lr, text in tried.items()))
    rivals = [f"{name} minus {other}" for name, other in RIVALS]
    return [*lines, "", *(f"- {pair}: {delta(pair)}" for pair in rivals),
            "", f"Learning rates, on seed {TUNING_SEED}:", "", *grids]  # fmt: skip


def plot(runs: Runs, options: argparse.Namespace, file: Path) -> None:
    """Validation curves at the best learning rate, means over the seeds that did not diverge."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in filter(runs.tuning, options.arms):
        made = runs.at_best(name, options.seeds).values()
        curves = [r["curve"] for r in made if r["validation"] is not None]
        if curves:
            tokens = [x / 1e6 for x, _ in curves[0]]
            losses = [mean(loss for _, loss in points) for points in zip(*curves, strict=True)]
            axes.plot(tokens, losses, label=name)
    axes.set(xlabel="million tokens", ylabel="validation loss (nats a token)")
    if axes.lines:
        axes.legend(fontsize="small")
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mars-lm"))
    parser.add_argument("--text", type=Path, help="a text file instead of the conversations")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--points", type=int, default=4, help="learning rates tried by every arm")
    parser.add_argument("--extensions", type=int, default=2,
                        help="more for all arms, while the best of any is at an edge")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=1_800_000, help="of a run")
    parser.add_argument("--batch", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--validation", type=int, default=131_072, help="tokens, at most")
    parser.add_argument("--curve", type=int, default=20, help="steps between validations")
    parser.add_argument("--documents", type=int, help="take no more than these")
    for name, value in (("layers", 4), ("width", 144), ("heads", 4), ("context", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="all arms with tiny sizes")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(argv)
    if TUNING_SEED in options.seeds:
        parser.error(f"seed {TUNING_SEED} chose the learning rates; take others for --seeds")
    if options.batch % options.context:
        parser.error(f"--batch {options.batch} is no multiple of --context {options.context}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = hash_file(corpus_file(options.text))
    setting = {"corpus": corpus, "torch": torch.__version__}
    setting |= {name: getattr(options, name) for name in SETTING}
    runs = Runs(options.out / "runs", setting)
    if not options.table_only:
        sweep(runs, load(options, corpus), options)
    found = summary(runs, options)
    text = "\n".join(table(found))
    if found["arms"]:
        write_atomically(options.out / "table.md", text + "\n")
        plot(runs, options, options.out / "curves.svg")
    print(text)
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
