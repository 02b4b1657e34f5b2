"""The parity gate: silent where sampler and trainer agree, and loud about each way they may not."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from one_stage import run_stage
from safetensors.torch import load_file, save_file

from sparring.alignment import generate, parity
from sparring.alignment.engines import Request, Sample, build_engine
from sparring.alignment.logprobs import ScoredPolicy, sampling_logps
from sparring.alignment.models import load_policy
from sparring.alignment.rows import Response
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows


def sampled(folder: Path, model: Path, prompts: Path, **settings: Any) -> dict[str, Path]:
    """Responses of the transformers engine with 6 probes, as the gate's inputs."""
    own = {"engine": "transformers", "k": 2, "max_new_tokens": 20, "chunk": 4, "probes": 6}
    run_stage("generate", folder / "r", {"model": model, "prompts": prompts}, **{**own, **settings})
    return {"model": model, "prompts": prompts, "responses": folder / "r"}


def rows_of(inputs: dict[str, Path]) -> list[Response]:
    return read_rows(inputs["responses"] / "responses.parquet", Response)


def rewritten(inputs: dict[str, Path], folder: Path, change: Any) -> dict[str, Path]:
    """The same responses after `change(row)`, as a folder without a manifest."""
    folder.mkdir()
    write_rows(folder / "responses.parquet", Response, [change(row) for row in rows_of(inputs)])
    return {**inputs, "responses": folder}


@pytest.fixture(scope="module")
def prompts(tiny_chain: dict[str, Path]) -> Path:
    return tiny_chain["prompts"]


@pytest.fixture(scope="module")
def good(
    tiny_model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return sampled(tmp_path_factory.mktemp("good"), tiny_model, prompts)


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (0.7, 0.9), (0.0, 1.0)]
)
def test_agreement(
    tiny_model: Path, prompts: Path, tmp_path: Path, temperature: float, top_p: float
) -> None:
    settings = {"temperature": temperature, "top_p": top_p}
    inputs = sampled(tmp_path, tiny_model, prompts, **settings)
    figures = run_stage("parity", tmp_path / "p", inputs, **settings).figures
    assert figures["agrees"]
    assert figures["probes"] == 6
    assert figures["worst_difference"] < 1e-4
    assert figures["tokens"] == sum(len(r.response_ids) for r in rows_of(inputs) if r.logps) > 20
    assert "sampler and trainer agree: 6 responses" in parity.text(tmp_path / "p")


def test_probes_are_spread_and_few(good: dict[str, Path]) -> None:
    rows = rows_of(good)
    probed = [n for n, row in enumerate(rows) if row.logps]
    assert len(probed) == 6
    assert all(rows[n].k == 0 and len(rows[n].logps) == len(rows[n].response_ids) for n in probed)
    gaps = {b - a for a, b in itertools.pairwise(probed)}
    assert gaps == {len(rows) // 6}


def test_probing_changes_no_sample(
    tiny_model: Path, prompts: Path, tmp_path: Path, good: dict[str, Path]
) -> None:
    without = sampled(tmp_path, tiny_model, prompts, probes=0)
    bare = [dataclasses.replace(row, logps=()) for row in rows_of(good)]
    assert rows_of(without) == bare


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (0.8, 0.7)])
def test_log_probabilities_by_hand(tiny_model: Path, temperature: float, top_p: float) -> None:
    """Against float64 on the whole vocabulary, one forward pass a token."""
    model = load_policy(tiny_model)
    prompt, response = [1, 5, 9, 20], [7, 7, 30, 4, 2]
    found, above = sampling_logps(
        ScoredPolicy(model, logits_chunk=2), prompt, response, temperature=temperature, top_p=top_p
    )
    for place, token in enumerate(response):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response[:place]])).logits[0, -1].double()
        chance = (logits / temperature).softmax(-1)
        more = float(chance[chance > chance[token]].sum())
        order = chance.sort(descending=True).values
        kept = order[: int((order.cumsum(0) < top_p).sum()) + 1] if top_p < 1 else order
        assert above[place] == pytest.approx(more, abs=1e-5)
        assert found[place] == pytest.approx(float((chance[token] / kept.sum()).log()), abs=1e-4)


@pytest.mark.parametrize("sampled_at", [0.8, 1.3])
def test_a_wrong_temperature_is_found_and_named(
    tiny_model: Path, prompts: Path, tmp_path: Path, sampled_at: float
) -> None:
    inputs = sampled(tmp_path, tiny_model, prompts, temperature=sampled_at)
    with pytest.raises(SparringError, match="sampler and trainer disagree") as caught:
        run_stage("parity", tmp_path / "p", inputs, temperature=1.0)
    assert f"fit temperature {sampled_at} (mean" in str(caught.value)
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_a_forgotten_top_p_is_found(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    inputs = sampled(tmp_path, tiny_model, prompts, temperature=0.7)
    with pytest.raises(SparringError, match=r"worst .* [1-9]\d* outside the nucleus"):
        run_stage("parity", tmp_path / "p", inputs, temperature=0.7, top_p=0.5)


def test_an_engine_that_adds_a_second_bos_is_found(
    tiny_model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TwoBos:
        def __init__(self, *given: Any, **options: Any) -> None:
            self.inner = build_engine(*given, **options)

        def sample(self, requests: Sequence[Request]) -> list[Sample]:
            return self.inner.sample(
                [dataclasses.replace(r, prompt_ids=(1, *r.prompt_ids)) for r in requests]
            )

    monkeypatch.setattr(generate, "build_engine", TwoBos)
    inputs = sampled(tmp_path, tiny_model, prompts)
    with pytest.raises(SparringError, match="sampler and trainer disagree"):
        run_stage("parity", tmp_path / "p", inputs)


def test_prompt_ids_must_be_the_templates(good: dict[str, Path], tmp_path: Path) -> None:
    twice = rewritten(
        good, tmp_path / "a", lambda r: dataclasses.replace(r, prompt_ids=(1, *r.prompt_ids))
    )
    with pytest.raises(SparringError, match=r"begins with two BOS tokens \(<s>\)"):
        run_stage("parity", tmp_path / "p", twice)
    with pytest.raises(SparringError, match=r"they part at token 0: .* template 'instruction'"):
        run_stage("parity", tmp_path / "q", good, template="instruction")


def test_endings_must_be_the_trainers(good: dict[str, Path], tmp_path: Path) -> None:
    def double(row: Response) -> Response:
        ids = (*row.response_ids, 2) if row.finish_reason == "stop" else row.response_ids
        return dataclasses.replace(row, response_ids=ids)

    with pytest.raises(SparringError, match=r"'stop' with 2 of the end tokens \[2\]"):
        run_stage("parity", tmp_path / "p", rewritten(good, tmp_path / "a", double))


def test_stale_weights_are_found(tiny_model: Path, good: dict[str, Path], tmp_path: Path) -> None:
    """By the manifest where there is one, and by the numbers where there is none."""
    newer = tmp_path / "newer"
    shutil.copytree(tiny_model, newer)
    weights = load_file(newer / "model.safetensors")
    torch.manual_seed(1)
    changed = {name: w + 0.02 * torch.randn_like(w) for name, w in weights.items()}
    save_file(changed, newer / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparringError, match="was sampled from other weights"):
        run_stage("parity", tmp_path / "p", {**good, "model": newer})
    bare = rewritten(good, tmp_path / "bare", lambda row: row)
    with pytest.raises(SparringError, match="Look at the weights"):
        run_stage("parity", tmp_path / "q", {**bare, "model": newer})


def test_without_probes_the_gate_says_how_to_get_some(
    good: dict[str, Path], tmp_path: Path
) -> None:
    bare = rewritten(good, tmp_path / "a", lambda row: dataclasses.replace(row, logps=()))
    with pytest.raises(SparringError, match=r"sample again with `--probes 8`"):
        run_stage("parity", tmp_path / "p", bare)


def test_numbers_that_are_none_do_not_pass(good: dict[str, Path], tmp_path: Path) -> None:
    def broken(row: Response) -> Response:
        return dataclasses.replace(row, logps=(float("nan"), *row.logps[1:]) if row.logps else ())

    with pytest.raises(SparringError, match="worst inf"):
        run_stage("parity", tmp_path / "p", rewritten(good, tmp_path / "a", broken))


def test_tolerances_can_be_set(tiny_model: Path, prompts: Path, tmp_path: Path) -> None:
    inputs = sampled(tmp_path, tiny_model, prompts, temperature=0.8)
    wide = {"mean_tolerance": 5.0, "token_tolerance": 50.0}
    assert run_stage("parity", tmp_path / "p", inputs, temperature=1.0, **wide).figures["agrees"]
