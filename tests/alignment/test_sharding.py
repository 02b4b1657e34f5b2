"""ZeRO on several ranks, started by DeepSpeed's launcher, gives the weights of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

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
        (3, ("--gradient-checkpointing", "True")),
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
