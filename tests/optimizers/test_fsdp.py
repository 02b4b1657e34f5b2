"""MARS on FSDP2's DTensors, over three ranks or twice over two, against one process; and FSDP1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch_ranks import launch

WORKER = Path(__file__).with_name("fsdp_worker.py")
SHAMPOO = {"variant": "shampoo"}
# float32 unless it says another dtype; one mesh over all ranks unless it says `meshes`.
CASES: dict[int, list[dict[str, Any]]] = {
    3: [
        {},
        {"swap": True},
        {"resume": True},
        {"options": {"fused": False, "optimize_1d": True, "amsgrad": True}},
        {"options": {"variant": "lion"}},
        {"options": SHAMPOO, "resume": True},
        {"options": {"exact": True}, "resume": True},
        {"options": {"exact": True, **SHAMPOO}},
        {"dtype": "bfloat16", "resume": True},
        {"dtype": "bfloat16", "options": SHAMPOO},
        {"refused": "MARS, then FSDP1"},
        {"refused": "FSDP1, then MARS"},
        {"refused": "FSDP1, then MARS", "options": {"optimize_1d": True}},
    ],
    4: [
        {"meshes": [[2, 2]]},
        {"meshes": [[2, 2]], "options": SHAMPOO},
        {"meshes": [[2, 2], [4]], "options": SHAMPOO},
        {"refused": "two dimensions", "options": SHAMPOO},
    ],
}
WHY = {"two dimensions": "split over 2 dimensions of its mesh; MARS-Shampoo needs one"}


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_tensor_parallelism_equals_one_process(world: int, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"optimize_1d": True}, {"variant": "lion"}]
    cases = [{"tensor parallel": True, "options": one} for one in options]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    for results in launch(WORKER, world, tmp_path, str(tmp_path / "cases.json")):
        for result in results:
            assert result["weights_diff"] <= 1e-5, results
            assert result["moved"] > 1e-2


@pytest.mark.dist
@pytest.mark.parametrize("world", [3, 4])
def test_fully_shard_equals_one_process(world: int, tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CASES[world]))
    by_rank = launch(WORKER, world, tmp_path, str(tmp_path / "cases.json"))
    for case, results in zip(CASES[world], zip(*by_rank, strict=True), strict=True):
        if "refused" in case:
            why = WHY.get(case["refused"], "use FSDP2")
            assert all(why in result["refused"] for result in results), (case, results)
            assert all(result["states"] == 0 for result in results)
            continue
        assert all(result["max_abs_diff"] <= 1e-6 for result in results), (case, results)
        # Equal sums in another order may round a 16-bit weight to its neighbour.
        limit = 2**-7 if case.get("dtype") else 1e-6
        assert all(result["weights_diff"] <= limit for result in results), (case, results)
        assert results[0]["moved"] > 1e-3
        mars = [rule for result in results for rule in result["updates"] if rule != "AdamW"]
        assert mars, results
        assert len({result["state_keys"] for result in results}) == 1
