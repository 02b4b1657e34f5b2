"""MARS against AdamW, Muon and Lion on a small language model: figures of docs/optimizers/mars.md.

A GPT-2 of the paper's kind (no biases, no dropout, tied head) with 0.9 M parameters learns human
conversations (chitchat-dataset, MIT), or the paragraphs of a text file, in a BPE of 1024 tokens:
bytes would spend the same arithmetic on a third of the text, a larger vocabulary more of it on the
head. Validation conversations are whole ones, and the BPE is trained without them.

Every arm tunes its peak learning rate on the same number of points, a factor of 2 apart, on seed 0,
and goes on beyond its grid while the best one lies at an edge. The best one is measured on other
seeds. A seed is an initialisation and an order of data, the same for all arms, so differences are
taken seed by seed. Warmup over a tenth of the steps, then cosine to 0 (the paper's MARS ends at
1/200 of its peak); gradients clipped to norm 1; lr x weight_decay = 6e-5 in all arms and at all lr
(the paper's product, for AdamW as for MARS; its Muon had none), none for the norms' gains.

    python scripts/benchmarks/mars_lm.py --out runs/mars-lm            # about 4 hours on one core
    python scripts/benchmarks/mars_lm.py --out runs/mars-lm --table-only --plot curves.svg
    python scripts/benchmarks/mars_lm.py --out runs/quick --quick      # seconds, figures of no use

A finished run is a line of OUT/runs.jsonl, and a call makes the runs that are missing there. On one
machine, with one torch and one number of threads, losses repeat to the last digit; elsewhere sums
round differently. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from sparring.alignment.base_questions import CHITCHAT_FILE, package_file
from sparring.launch.artifacts import hash_file, write_atomically
from sparring.optimizers import MARS

TUNING_SEED = 0
LR_TIMES_DECAY = 6e-5
BASELINES = ("adamw", "adamw-mars-betas")
# What each variant is to be told from.
RIVALS = (("mars-adamw", "mars-adamw-gamma0"), ("mars-adamw-exact", "mars-adamw"),
          ("mars-lion", "lion"), ("mars-shampoo", "muon"))  # fmt: skip
SETTING = ("layers", "width", "heads", "context", "vocabulary", "documents", "batch", "tokens",
           "validation", "curve")  # fmt: skip
QUICK = {"layers": 1, "width": 32, "heads": 2, "context": 32, "vocabulary": 384, "documents": 300,
         "batch": 512, "tokens": 3072, "validation": 2048, "points": 2, "extensions": 1, "curve": 2,
         "seeds": [1, 2]}  # fmt: skip
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom; beyond these, the last is wide enough.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Record = dict[str, Any]
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

# ---------------------------------------------------------------- data and model


@dataclass(frozen=True)
class Data:
    """Rows of context + 1 tokens."""

    train: Tensor
    validation: Tensor
    bytes_per_token: float


def corpus_file(text: Path | None) -> Path:
    return text or package_file("chitchat_dataset", CHITCHAT_FILE, "chitchat-dataset")


def documents(text: Path | None, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Distinct conversations, or paragraphs of a text file: 19 in 20 to train, 1 to validate."""
    content = corpus_file(text).read_text(encoding="utf-8")
    if text:
        pieces = [piece.strip() for piece in content.split("\n\n")]
    else:
        pieces = [
            "\n".join(" ".join(m["text"].split()) for block in chat["messages"] for m in block)
            for chat in json.loads(content).values()
        ]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece]
    random.Random(0).shuffle(pieces)  # one split for all seeds
    pieces = pieces[:limit]
    held = max(1, len(pieces) // 20)
    return pieces[held:], pieces[:held]


def load(options: argparse.Namespace, corpus: str) -> Data:
    """Text to tokens; the BPE is kept in OUT.

    Raises:
        ValueError: training or validation text is shorter than a batch.
    """
    parts, end = documents(options.text, options.documents), "<|end|>"
    size, width = options.vocabulary, options.context + 1
    file = options.out / f"bpe-{corpus[:12]}-{size}-{options.documents or 'all'}.json"
    if not file.exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(parts[0], size, show_progress=False, special_tokens=[end])
        write_atomically(file, bpe.to_str())
    tokenizer = Tokenizer.from_file(str(file))
    rows = []
    for pieces in parts:
        codes = tokenizer.encode_batch([piece + end for piece in pieces])
        ids = torch.tensor([token for code in codes for token in code.ids])
        rows.append(ids[: len(ids) // width * width].view(-1, width))
        if rows[-1].numel() < options.batch:
            raise ValueError(f"too little text: {rows[-1].numel()} tokens, batch={options.batch}")
    length = sum(len(piece.encode()) for piece in parts[0])
    kept = options.validation // options.context
    return Data(rows[0], rows[1][:kept], length / rows[0].numel())


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Shuffled rows without end, every row once before any comes again."""
    generator, left = torch.Generator().manual_seed(seed), rows[:0]
    while True:
        while len(left) < size:
            left = torch.cat([left, rows[torch.randperm(len(rows), generator=generator)]])
        yield left[:size]
        left = left[size:]


class LanguageModel(nn.Module):
    """GPT-2, whose block is torch's encoder layer with a causal mask.

    transformers' took up to 1.5 times as long here, and its matrices are transposed, which inverts
    the rows / columns in Muon's and Shampoo's scale.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        width = options.width
        self.embed_tokens = nn.Embedding(options.vocabulary, width)
        self.embed_positions = nn.Embedding(options.context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, options.heads, 4 * width, dropout=0.0, bias=False,
                                       activation="gelu", batch_first=True, norm_first=True)
            for _ in range(options.layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, bias=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(options.context)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("out_proj.weight", "linear2.weight"))
                deep = math.sqrt(2 * options.layers) if into_residual else 1
                nn.init.normal_(weight, std=0.02 / deep)

    def forward(self, rows: Tensor) -> Tensor:
        """Mean loss, in nats a token, of the tokens after the first of each row."""
        x = self.embed_tokens(rows[:, :-1]) + self.embed_positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        logits = self.norm(x) @ self.embed_tokens.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


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
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------- the sweep


class Runs:
    """The finished runs of one setting in OUT/runs.jsonl, by arm, learning rate and seed."""

    def __init__(self, file: Path, setting: Record) -> None:
        self.file, self.setting = file, setting
        self.lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        records = [json.loads(line) for line in self.lines]
        self.found = {(r["arm"], r["lr"], r["seed"]): r for r in records if r["setting"] == setting}

    def add(self, record: Record) -> None:
        self.lines.append(json.dumps({**record, "setting": self.setting}, allow_nan=False))
        write_atomically(self.file, "".join(line + "\n" for line in self.lines))
        self.found[record["arm"], record["lr"], record["seed"]] = record

    def tuning(self, arm: str) -> dict[float, float]:
        """Validation loss by learning rate in ascending order, infinite where a run diverged."""
        losses = {
            lr: math.inf if record["validation"] is None else float(record["validation"])
            for (name, lr, seed), record in self.found.items()
            if (name, seed) == (arm, TUNING_SEED)
        }
        return dict(sorted(losses.items()))

    def best(self, arm: str) -> float:
        """Of equals the lowest, so that a grid on which all runs diverge goes on downwards."""
        losses = self.tuning(arm)
        return min(losses, key=losses.__getitem__)

    def at_best(self, arm: str, seeds: Sequence[int]) -> dict[int, Record]:
        """The runs by seed that the figures of an arm are made of."""
        keys = {seed: (arm, self.best(arm), seed) for seed in seeds}
        return {seed: self.found[key] for seed, key in keys.items() if key in self.found}


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
        # counted by what was tried, so that another call does not go further
        while len(tried := list(runs.tuning(name))) < options.points + options.extensions:
            best = runs.best(name)
            if best not in (tried[0], tried[-1]):
                break
            run(name, best / 2 if best == tried[0] else best * 2, TUNING_SEED)
    for seed in options.seeds:
        for name in options.arms:
            run(name, runs.best(name), seed)


# ---------------------------------------------------------------- what came out


def difference(mine: dict[int, float], other: dict[int, float]) -> Record | None:
    """Mean of the differences by seed, with Student's 95 % interval."""
    values = [mine[seed] - other[seed] for seed in mine if seed in other]
    if len(values) < 2:
        return None
    half = T_975[min(len(values) - 1, len(T_975)) - 1] * stdev(values) / math.sqrt(len(values))
    middle = mean(values)
    return {"mean": middle, "low": middle - half, "high": middle + half, "seeds": len(values)}


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
            "at_edge": best in (min(tried), max(tried)),
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
    shared = {key: facts.get(key) for key in ("parameters", "bytes_per_token", "torch", "threads")}
    return {"benchmark": "mars_lm", "arms": arms, "differences": differences, **shared,
            "setting": runs.setting}  # fmt: skip


def table(found: Record) -> list[str]:
    def delta(pair: str) -> str:
        value = found["differences"].get(pair)
        return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]" if value else "-"

    heads = ["arm", "best lr", "validation loss, mean ± sd", *(f"minus {b}" for b in BASELINES)]
    heads += ["steps", "tokens", "gradients", "CPU s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    grids = []
    for name, arm in found["arms"].items():
        loss = "-" if arm["validation_loss"] is None else f"{arm['validation_loss']:.4f}"
        loss += f" ± {arm['sd']:.4f}" if arm["sd"] is not None else ""
        loss += f" ({arm['diverged']} diverged)" if arm["diverged"] else ""
        cells = [name, f"{arm['lr']:g}" + (" (edge of the grid)" if arm["at_edge"] else ""), loss]
        cells += [delta(f"{name} minus {base}") for base in BASELINES]
        cells += [f"{arm[key]:,}" for key in ("steps", "tokens", "gradients")]
        lines.append("| " + " | ".join([*cells, f"{arm['cpu_seconds']:.0f}"]) + " |")
        tried = {lr: "diverged" if x is None else f"{x:.4f}" for lr, x in arm["lr_tried"].items()}
        grids.append(f"- {name}: " + ", ".join(f"{lr} {text}" for lr, text in tried.items()))
    rivals = [f"{name} minus {other}" for name, other in RIVALS]
    return [*lines, "", *(f"- {pair}: {delta(pair)}" for pair in rivals),
            "", f"Learning rates, on seed {TUNING_SEED}:", "", *grids]  # fmt: skip


def plot(runs: Runs, options: argparse.Namespace) -> None:
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
    axes.set(xlabel="million tokens", ylabel="validation loss (nats a token)", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(options.plot, bbox_inches="tight")
    plt.close(figure)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/mars-lm"))
    parser.add_argument("--text", type=Path, help="a text file instead of the conversations")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--points", type=int, default=4, help="learning rates tried by every arm")
    parser.add_argument("--extensions", type=int, default=4, help="more of them, at an edge")
    parser.add_argument("--tokens", type=int, default=1_200_000, help="of a run")
    parser.add_argument("--batch", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--validation", type=int, default=131_072, help="tokens, at most")
    parser.add_argument("--curve", type=int, default=20, help="steps between validations")
    parser.add_argument("--documents", type=int, help="take no more than these")
    for name, value in (("layers", 4), ("width", 128), ("heads", 4), ("context", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="all arms with tiny sizes")
    parser.add_argument("--table-only", action="store_true", help="run nothing")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
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
    setting = {"corpus": corpus, **{name: getattr(options, name) for name in SETTING}}
    runs = Runs(options.out / "runs.jsonl", setting)
    if not options.table_only:
        sweep(runs, load(options, corpus), options)
    found = summary(runs, options)
    print("\n".join(table(found)))
    if options.plot:
        plot(runs, options)
    print(json.dumps(found, allow_nan=False))


if __name__ == "__main__":
    main()
