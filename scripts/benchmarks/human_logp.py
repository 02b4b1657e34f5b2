"""Two policies on the same held-out conversations: difference of log p of a human token, in pairs.

Figures of docs/alignment/spin.md. A RUN is one of spin-smollm2 or sft-smollm2, its ITERATION 0 the
start; runs with one seed hold out the same conversations. Interval: 95 % bootstrap over them.

    python scripts/benchmarks/human_logp.py runs/spin-smollm2 2 runs/sft-smollm2 1

The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sparring.alignment import tokens
from sparring.alignment.config import TemplateConfig
from sparring.alignment.logprobs import ScoredPolicy, response_logps
from sparring.alignment.models import load_policy
from sparring.launch.collective import device
from sparring.launch.statistics import bootstrap_mean


def per_token(run: Path, iteration: int) -> dict[str, float]:
    """log p of a human token under the policy after an iteration, by prompt.

    Raises:
        SystemExit: the run has not measured that iteration.
    """
    measured = run / f"heldout{iteration}"
    manifest = measured / "evaluate" / "manifest.json"
    if not manifest.is_file():
        raise SystemExit(f"{run} has not measured iteration {iteration}: {manifest} is missing")
    settings = json.loads(manifest.read_text(encoding="utf-8"))["config"]
    policy = run / f"iter{iteration - 1}" / "train" if iteration else run / "model"
    tokenizer = tokens.load_tokenizer(policy)
    how = TemplateConfig(
        template=settings["template"], template_options=settings["template_options"]
    )
    place = tokens.turn(tokenizer, policy, how)
    limit = settings["max_response_tokens"]
    human = {
        row["prompt_id"]: tokens.response_ids(tokenizer, row["real"], place, limit=limit)
        for row in pq.read_table(run / "prompts" / "heldout.parquet").to_pylist()
    }
    table = pq.read_table(measured / "generate" / "responses.parquet").to_pylist()
    prompts = {row["prompt_id"]: row["prompt_ids"] for row in table}
    texts = [(prompts[name], human[name]) for name in prompts]
    found = response_logps(
        ScoredPolicy(load_policy(policy).to(device()), precision=settings["precision"]),
        texts,
        pad=tokens.eos_ids(tokenizer, policy)[0],
        batch=settings["batch"],
        device=device(),
    )
    return {name: lp / len(human[name]) for name, lp in zip(prompts, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("iteration", type=int)
    parser.add_argument("other_run", type=Path)
    parser.add_argument("other_iteration", type=int)
    o = parser.parse_args()
    ours = per_token(o.run, o.iteration)
    theirs = per_token(o.other_run, o.other_iteration)
    if ours.keys() != theirs.keys():
        raise SystemExit("the runs hold out different conversations; take runs with one seed")
    apart = np.array([ours[name] - theirs[name] for name in ours])
    mean, low, high = (round(float(v), 4) for v in bootstrap_mean(apart, seed=0))
    print(json.dumps({"benchmark": "human_logp", "difference": [mean, low, high], "n": len(apart)}))


if __name__ == "__main__":
    main()
