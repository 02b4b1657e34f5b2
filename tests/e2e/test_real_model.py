"""The real thing, small: SmolLM2-135M through vLLM, the verifier judge and the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.alignment.rows import ReferencedPair, Response
from sparring.launch.cli import main
from sparring.launch.rows import read_rows

SMALL = [
    *("--iterations", "1", "--prompts.train", "16", "--prompts.heldout", "4"),
    *("--generate.max-new-tokens", "32", "--evaluate.k", "1", "--pair.min-margin", "0.0"),
    *("--train.max-length", "160"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration of the demonstration, cut down to a few prompts."""
    out = tmp_path_factory.mktemp("real") / "run"
    assert main(["demo", "--out", str(out), *SMALL, "--json"]) == 0
    return out


def test_the_loop_leaves_every_artifact_and_a_report(run: Path) -> None:
    steps = {path.parent.relative_to(run).as_posix() for path in run.glob("**/manifest.json")}
    wanted = {"prompts", "model", "iter0/parity", "iter0/reference", "iter0/train"}
    wanted |= {f"heldout{t}/evaluate" for t in range(2)}
    assert wanted <= steps
    assert "pass rate" in (run / "report.html").read_text()


def test_running_again_computes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(run), *SMALL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["computed"] == 0
    assert result["kept"] == 12


def test_training_sees_the_ids_that_vllm_sampled(run: Path) -> None:
    sampled = read_rows(run / "iter0/generate/responses.parquet", Response)
    ids = {(r.prompt_id, r.prompt_ids, r.response_ids) for r in sampled}
    pairs = read_rows(run / "iter0/reference/pairs.parquet", ReferencedPair)
    assert pairs
    for pair in pairs:
        assert (pair.prompt_id, pair.prompt_ids, pair.chosen_ids) in ids
        assert (pair.prompt_id, pair.prompt_ids, pair.rejected_ids) in ids
    for response in sampled:
        stops = [token == 2 for token in response.response_ids]  # <|im_end|>
        assert sum(stops) == (response.finish_reason == "stop")
        assert not any(stops[:-1])
        assert response.prompt_ids.count(1) == 3  # <|im_start|> of system, user and assistant


def test_the_policy_starts_at_its_reference(run: Path) -> None:
    first = json.loads((run / "iter0/train/metrics.jsonl").read_text().splitlines()[0])
    assert first["reference_gap"] < 0.01  # nats a response


def test_vllm_and_transformers_agree_on_greedy_text(run: Path, tmp_path: Path) -> None:
    found = {}
    for engine in ("vllm", "transformers"):
        out = tmp_path / engine
        given = ["--model", str(run / "model"), "--prompts", str(run / "prompts")]
        options = ["--engine", engine, "--part", "heldout", "--k", "1", "--temperature", "0"]
        limit = ["--max-new-tokens", "16"]
        assert main(["generate", *given, "--out", str(out), *options, *limit, "--json"]) == 0
        rows = read_rows(out / "responses.parquet", Response)
        found[engine] = [row.response_ids for row in rows]
    assert found["vllm"] == found["transformers"]
