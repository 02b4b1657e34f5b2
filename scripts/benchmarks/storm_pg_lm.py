"""REINFORCE against STORM-PG on SmolLM2-135M with verifiable constraints, at equal samples.

Arms are values of alpha: 1 is REINFORCE with a leave-one-out baseline, below 1 the gradient
estimate is recursive (docs/rl/language.md). Every arm takes the same number of responses to the
same prompts in the same order, starts from the same adapter, and is measured on held-out base
questions before and after. A response earns 1 if IFEval's strict check of its constraint passes,
else 0. All seeds count; intervals are 95 % t-intervals over seeds, and with two they say little.

Each finished iteration is a line of OUT/alphaA-seedS/metrics.jsonl; running again goes on from the
last one. OUT/settings.json has what all arms share, and another value of it is refused: figures of
two settings would mix. Rewards against responses, with the range of seeds, are OUT/reward.svg. The
last line printed is JSON. An alpha below 1 costs a second backward pass.

    python scripts/benchmarks/storm_pg_lm.py --out runs/storm-pg-lm           # hours on two cores
    python scripts/benchmarks/storm_pg_lm.py --out runs/quick --quick         # figures of no use
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from sparring.alignment.config import ModelConfig, TemplateConfig
from sparring.alignment.judges.verifier import check
from sparring.alignment.models import load_policy, locate
from sparring.alignment.prompts import constraint_prompts
from sparring.alignment.rows import Prompt
from sparring.alignment.tokens import load_tokenizer, prompt_ids
from sparring.launch.artifacts import write_atomically, write_json
from sparring.launch.comparison import interval
from sparring.launch.metrics import MetricsFile, read_metrics
from sparring.launch.report import Series, line_chart
from sparring.launch.seeds import derive
from sparring.rl.language import LanguageStormPG
from sparring.rl.language_policy import LanguagePolicy
from sparring.rl.states import check_settings, save_state

# Constraints of form that fit into a short answer and that the model meets now and then.
KINDS = ["bullets", "comma", "highlights", "title"]
HELD_OUT = 0.25


@dataclass(frozen=True)
class Data:
    """Prompts as token ids with their checks; no base question is on both sides."""

    train: list[Prompt]
    heldout: list[Prompt]
    ids: dict[str, list[int]]

    def tokens(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return [self.ids[prompt.prompt_id] for prompt in prompts]


def load_data(tokenizer: Any, kinds: Sequence[str], limit: int) -> Data:
    """All constraint prompts of these kinds, shuffled; held out by base question."""
    prompts = [p for p in constraint_prompts(0, 9) if p.prompt_id.rpartition("-")[2] in kinds]
    prompts.sort(key=lambda p: derive(0, "prompt", p.prompt_id))
    ids = {p.prompt_id: prompt_ids(tokenizer, p, TemplateConfig()) for p in prompts}
    prompts = [p for p in prompts if len(ids[p.prompt_id]) <= limit]
    out = {p.group for p in prompts if derive(0, "held out", p.group) < HELD_OUT * 2**62}
    return Data(
        [p for p in prompts if p.group not in out], [p for p in prompts if p.group in out], ids
    )


def reward_of(prompts: Sequence[Prompt]) -> Any:
    """1 where the constraint is kept."""
    return lambda number, text: float(check(str(prompts[number].verifier), text))


def build(data: Data, source: Path, alpha: float, seed: int, o: argparse.Namespace) -> Any:
    policy = LanguagePolicy(
        load_policy(source), load_tokenizer(source), rank=o.rank, seed=seed, micro=o.micro
    )
    return LanguageStormPG(
        policy,
        data.tokens(data.train),
        reward_of(data.train),
        alpha=alpha,
        batch=o.batch,
        k=o.k,
        max_new_tokens=o.max_new_tokens,
        lr=o.lr,
        clip=o.clip,
        dual=o.dual,
        seed=seed,
    )


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a folder's runs share, or refuse one whose runs had other settings.

    Raises:
        SystemExit: they had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "settings.json"
    if not note.exists():
        if any(folder.glob("*/metrics.jsonl")):
            raise SystemExit(f"{folder} has runs but no settings.json; take another --out")
        write_json(note, settings)
    try:
        check_settings(settings, json.loads(note.read_text(encoding="utf-8")))
    except ValueError as error:
        raise SystemExit(f"{folder}: {error}; take another --out") from None


def run(data: Data, source: Path, alpha: float, seed: int, o: argparse.Namespace) -> Path:
    """One arm with one seed, from where it stands; returns its metrics."""
    folder = o.out / f"alpha{alpha:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics, checkpoint = folder / "metrics.jsonl", folder / "state.pt"
    done = read_metrics(metrics) if metrics.exists() else []
    if done and done[-1]["iteration"] >= o.iterations and "heldout" in done[-1]:
        return metrics
    method = build(data, source, alpha, seed, o)
    if checkpoint.exists():
        method.load_state_dict(torch.load(checkpoint, weights_only=True))
    # Without a checkpoint all is made again, the row of iteration 0 too.
    start = method.iteration + 1 if checkpoint.exists() else 0
    rows = MetricsFile(metrics, start=start, counter="iteration")

    def heldout() -> float:
        chosen = data.heldout[: o.heldout]
        # The same noise for every arm and every time: differences are the policy's.
        return method.evaluate(data.tokens(chosen), reward_of(chosen), k=2, seed=1)

    if method.iteration == 0:
        before = time.perf_counter()
        rows.write(iteration=0, samples=0, heldout=heldout(), seconds=time.perf_counter() - before)
    while method.iteration < o.iterations:
        before = time.perf_counter()
        record = method.step()
        if method.iteration == o.iterations:
            record["heldout"] = heldout()
        rows.write(**record, seconds=time.perf_counter() - before)
        save_state(checkpoint, method.state_dict())
        print(
            f"alpha {alpha:g} seed {seed} {method.iteration}/{o.iterations}: reward "
            f"{record['reward']:.3f}, |g| {record['gradient_norm']:.3g}, largest weight "
            f"{record['max_weight']:.3g}, ESS {record['ess']:.2f}, kl {record['kl']:.3g}",
            flush=True,
        )
    method.policy.model.save_pretrained(folder / "adapter", selected_adapters=["policy"])
    return metrics


def mean_of(rows: Sequence[Any], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def summarise(runs: dict[float, list[Path]]) -> dict[str, Any]:
    """Reward of the batches by quarter of the budget, held-out pass rate before and after."""
    table: dict[str, Any] = {}
    for alpha, paths in runs.items():
        found = [read_metrics(path) for path in paths]
        steps = [[row for row in rows if row["iteration"]] for rows in found]
        rewards = np.array([[row["reward"] for row in s] for s in steps])
        quarters = np.array_split(rewards, min(4, rewards.shape[1]), axis=1)

        def over_seeds(values: Sequence[float]) -> dict[str, float]:
            mean, low, _ = interval(values)
            return {"mean": mean, "half_width": mean - low, "seeds": len(values)}

        table[f"{alpha:g}"] = {
            "reward_by_quarter": [over_seeds(part.mean(1).tolist()) for part in quarters],
            "heldout_before": over_seeds([rows[0]["heldout"] for rows in found]),
            "heldout_after": over_seeds([rows[-1]["heldout"] for rows in found]),
            "gradient_norm": over_seeds([mean_of(s, "gradient_norm") for s in steps]),
            "max_weight": max(r["max_weight"] for s in steps for r in s),
            "least_ess": min(r["ess"] for s in steps for r in s),
            "samples": steps[0][-1]["samples"],
            "seconds": sum(r["seconds"] for rows in found for r in rows) / len(found),
        }
    return table


def draw(path: Path, runs: dict[float, list[Path]]) -> None:
    """Mean reward of the batches against responses, ten points an arm, with the range of seeds."""
    series = []
    for alpha, paths in runs.items():
        steps = [[row for row in read_metrics(p) if row["iteration"]] for p in paths]
        parts = np.array_split(np.arange(len(steps[0])), min(10, len(steps[0])))
        means = [[mean_of([s[n] for n in part], "reward") for s in steps] for part in parts]
        # Of two seeds a t-interval is wider than rewards are.
        y, low, high = ([f(values) for values in means] for f in (mean, min, max))
        series.append(
            Series(f"α = {alpha:g}", [steps[0][p[-1]]["samples"] for p in parts], y, low, high)
        )
    chart = line_chart(series, x_label="responses", y_label="reward", caption="", bands=True)
    write_atomically(path, str(chart.svg))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.0, 0.6])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8, help="prompts an iteration")
    parser.add_argument("--k", type=int, default=4, help="responses a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--clip", type=float, default=0.5)
    parser.add_argument("--dual", type=float, default=3.0)
    parser.add_argument("--micro", type=int, default=8, help="responses a forward pass")
    parser.add_argument(
        "--heldout", type=int, default=48, help="held-out prompts, two samples each"
    )
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="of constraints")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.iterations, options.batch, options.k = 1, 2, 1, 3
        # Half of the samples have a comma by then.
        options.kinds, options.max_new_tokens, options.heldout = ["comma"], 12, 1
    apart = ("out", "alphas", "seeds", "quick")
    claim(options.out, {k: v for k, v in vars(options).items() if k not in apart})
    source = locate(ModelConfig(path="smollm2"))
    data = load_data(load_tokenizer(source), options.kinds, limit=120)
    print(f"{len(data.train)} training prompts, {len(data.heldout)} held out", flush=True)
    runs = {
        alpha: [run(data, source, alpha, seed, options) for seed in range(options.seeds)]
        for alpha in options.alphas
    }
    draw(options.out / "reward.svg", runs)
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    print(json.dumps({"benchmark": "storm_pg_lm", **settings, "arms": summarise(runs)}))


if __name__ == "__main__":
    main()
