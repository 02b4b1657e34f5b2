"""ZeRO on several ranks, started by DeepSpeed's launcher, gives the weights of one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sparring.alignment.rows import ReferencedPair
from sparring.launch.cli import main
from sparring.launch.rows import write_rows

PAIRS = 11  # not a multiple of the batch, so that one rank runs out of rows before the other


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of unequal lengths over the tiny model's vocabulary."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        ReferencedPair(
            pair_id=f"p{n}/0",
            prompt_id=f"p{n}",
            iteration=0,
            prompt_ids=(1, *(3 + (n * j) % 20 for j in range(1, 4 + n % 3))),
            chosen_ids=(*(3 + (n + j) % 20 for j in range(2 + n)), 2),
            rejected_ids=(*(3 + (3 * n + j) % 20 for j in range(12 - n)), 2),
            chosen_win=0.8,
            rejected_win=0.3,
            pair_win=0.75,
            chosen_reference_logp=-3.5 * (3 + n),
            rejected_reference_logp=-3.5 * (13 - n),
        )
        for n in range(PAIRS)
    ]
    write_rows(folder / "pairs.parquet", ReferencedPair, rows)
    return folder


def train(model: Path, pairs: Path, out: Path, *options: str) -> Path:
    rate = ["--lr", "0.003", "--schedule", "constant", "--warmup", "0"]
    settings = ["--beta", "0.01", *rate, "--batch", "8", "--epochs", "2"]
    given = ["--model", str(model), "--pairs", str(pairs), "--out", str(out)]
    assert main(["train", *given, *settings, "--json", *options]) == 0
    return out


@pytest.fixture(scope="module")
def plain(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "train"
    return train(tiny_model, pairs, out, "--launch.inline", "train", "--micro-batch", "8")


def largest_difference(a: Path, b: Path) -> float:
    ours, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def test_training_moves_the_weights(plain: Path, tiny_model: Path) -> None:
    assert largest_difference(plain, tiny_model) > 1e-3


@pytest.mark.dist
@pytest.mark.parametrize(
    ("stage", "extra"),
    [
        pytest.param(0, (), marks=pytest.mark.slow),
        pytest.param(1, (), marks=pytest.mark.slow),
        (2, ()),
        pytest.param(3, ("--gradient-checkpointing", "True"), marks=pytest.mark.slow),
    ],
)
def test_two_ranks_with_zero_give_one_process_s_weights(
    stage: int, extra: tuple[str, ...], plain: Path, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train"
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", str(stage))
    train(tiny_model, pairs, out, *ranks, *extra)
    assert largest_difference(plain, out) < 1e-5
    figures = json.loads((out / "manifest.json").read_text())["figures"]
    assert figures["zero"] == stage
    norms = [
        [json.loads(row)["grad_norm"] for row in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, out)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_smaller_forward_passes_after_a_checkpoint_change_no_weight(
    stage: int, plain: Path, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    worker = Path(__file__).with_name("resume_worker.py")
    command = [sys.executable, worker, tiny_model, pairs, tmp_path / "train", stage]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "train" / "metrics.jsonl").read_text().splitlines()) == 4
    assert largest_difference(plain, tmp_path / "train") < 1e-5


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head so large that ZeRO-3 does not keep it gathered."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny_model, folder)
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 4096  # times 32 is above stage3_param_persistence_threshold, 1e5
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.dist
def test_zero_3_when_ranks_need_unequal_numbers_of_head_calls(
    wide_model: Path, pairs: Path, tmp_path: Path
) -> None:
    options = ("--logits-chunk", "4", "--gradient-checkpointing", "True")
    inline = ("--launch.inline", "train", "--micro-batch", "8")
    one = train(wide_model, pairs, tmp_path / "one", *options, *inline)
    ranks = ("--launch.processes", "2", "--micro-batch", "1", "--zero", "3")
    two = train(wide_model, pairs, tmp_path / "two", *options, *ranks)
    assert largest_difference(one, wide_model) > 1e-3
    assert largest_difference(one, two) < 1e-5


@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2,
                                   pytest.param(3, marks=pytest.mark.slow)])  # fmt: skip
def test_bfloat16_leaves_the_weights_unrounded(
    stage: int, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", str(stage))
    half = ("--precision", "bfloat16", "--lr", "1e-30")
    out = train(tiny_model, pairs, tmp_path / "train", *ranks, *half)
    assert largest_difference(out, tiny_model) < 1e-20
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["grad_norm"] > 0.01


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_in_bfloat16_go_where_one_goes(
    stage: int, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    half = ("--precision", "bfloat16")
    inline = ("--launch.inline", "train", "--micro-batch", "8")
    one = train(tiny_model, pairs, tmp_path / "one", *half, *inline)
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", str(stage))
    two = train(tiny_model, pairs, tmp_path / "two", *half, *ranks)
    start, ours, theirs = (load_file(f / "model.safetensors") for f in (tiny_model, one, two))
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in start])
    # Adam makes a full step of any gradient, also of one that rounding alone decides.
    assert apart.norm() < 0.35 * moved.norm()


@pytest.mark.dist
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_average_as_one_process(
    stage: int, plain: Path, tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    inline = ("--launch.inline", "train")
    one = train(tiny_model, pairs, tmp_path / "one", "--ema", "0.9", *inline)
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", str(stage))
    two = train(tiny_model, pairs, tmp_path / "two", "--ema", "0.9", *ranks)
    assert largest_difference(one, plain) > 1e-3
    assert largest_difference(one, two) < 1e-5


@pytest.mark.dist
def test_exact_mars_on_two_ranks_gives_one_process_s_weights(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    mars = ("--optimizer.name", "mars", "--optimizer.exact", "True")
    one = train(tiny_model, pairs, tmp_path / "one", *mars)
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", "2")
    two = train(tiny_model, pairs, tmp_path / "two", *mars, *ranks)
    assert largest_difference(one, tiny_model) > 1e-3
    assert largest_difference(one, two) < 1e-5


@pytest.mark.dist
@pytest.mark.slow
def test_lora_under_zero_3_gives_one_process_s_merged_weights(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    one = train(tiny_model, pairs, tmp_path / "one", "--lora-rank", "4")
    ranks = ("--launch.processes", "2", "--micro-batch", "2", "--zero", "3")
    two = train(tiny_model, pairs, tmp_path / "two", "--lora-rank", "4", *ranks)
    assert largest_difference(one, tiny_model) > 1e-4
    assert largest_difference(one, two) < 1e-5


@pytest.mark.dist
def test_two_ranks_sample_and_judge_what_one_did(
    tiny_chain: dict[str, Path], tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        return str(json.loads((folder / "manifest.json").read_text())["digest"])

    ranks = ["--launch.processes", "2", "--seed", "1", "--json"]
    prompts = ["--prompts", str(tiny_chain["prompts"])]
    model = ["--model", str(tiny_chain["model"]), "--engine", "transformers"]
    sampling = ["--k", "4", "--max-new-tokens", "16", "--chunk", "5"]
    out = tmp_path / "generate"
    assert main(["generate", *prompts, *model, *sampling, "--out", str(out), *ranks]) == 0
    assert digest(out) == digest(tiny_chain["generate"])
    judge = [*prompts, "--responses", str(out), "--name", "letter_judge:make", "--chunk", "5"]
    assert main(["judge", *judge, "--out", str(tmp_path / "judge"), *ranks]) == 0
    assert digest(tmp_path / "judge") == digest(tiny_chain["judge"])
