"""Stage `reference`: momentum folded into it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from sparring.alignment.rows import ReferencedPair
from sparring.launch.calls import run_stage
from sparring.launch.errors import UsageError
from sparring.launch.rows import read_rows


@pytest.fixture(scope="module")
def older(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the tiny model's shape."""
    folder = tmp_path_factory.mktemp("older")
    torch.manual_seed(7)
    LlamaForCausalLM(LlamaForCausalLM.from_pretrained(tiny_model).config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder


def logps(folder: Path) -> torch.Tensor:
    rows = read_rows(folder / "pairs.parquet", ReferencedPair)
    values = [[row.chosen_reference_logp, row.rejected_reference_logp] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def test_momentum_folded_into_the_reference(
    tiny_chain: dict[str, Path], older: Path, tmp_path: Path
) -> None:
    new = {"model": tiny_chain["model"], "pairs": tiny_chain["pair"]}
    old = {**new, "model": older}
    run_stage("reference", tmp_path / "new", new, quiet=True)
    run_stage("reference", tmp_path / "old", old, quiet=True)
    folded = {**new, "previous": older}
    run_stage("reference", tmp_path / "folded", folded, quiet=True, alpha=0.3)
    expected = 1.3 * logps(tmp_path / "new") - 0.3 * logps(tmp_path / "old")
    torch.testing.assert_close(logps(tmp_path / "folded"), expected, rtol=1e-12, atol=0)
    assert (logps(tmp_path / "new") - logps(tmp_path / "old")).abs().mean() > 0.1


def test_momentum_needs_the_solution_before(tiny_chain: dict[str, Path], tmp_path: Path) -> None:
    inputs = {"model": tiny_chain["model"], "pairs": tiny_chain["pair"]}
    with pytest.raises(UsageError, match="it needs --previous"):
        run_stage("reference", tmp_path / "out", inputs, quiet=True, alpha=0.3)


def test_a_policy_is_its_own_reference_in_the_trainers_number_type(
    tiny_chain: dict[str, Path], tmp_path: Path
) -> None:
    model = tiny_chain["model"]
    gaps = {}
    for precision in ("bfloat16", "float32"):
        inputs = {"model": model, "pairs": tiny_chain["pair"]}
        folder = tmp_path / precision
        reference = run_stage("reference", folder, inputs, quiet=True, precision=precision)
        trained = run_stage(
            "train",
            tmp_path / f"{precision}-train",
            {"model": model, "pairs": reference},
            quiet=True,
            precision="bfloat16",
            lr=1e-9,
            batch=4,
            micro_batch=4,
        )
        first = (trained.path / "metrics.jsonl").read_text().splitlines()[0]
        gaps[precision] = json.loads(first)["reference_gap"]
    assert gaps["float32"] > 0
    assert gaps["bfloat16"] < gaps["float32"] / 5
