"""The benchmark's statistics, and what arms take over from each other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[3] / "scripts" / "benchmarks" / "spin_diffusion.py"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("spin_diffusion_benchmark", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intervals_are_students_over_seeds_and_the_base_comes_once(benchmark: Any) -> None:
    def rows(*values: float) -> dict[int, dict[str, float]]:
        return {t: {"accuracy": value} for t, value in enumerate(values)}

    found = {
        ("spin", 0): rows(0.5, 0.6), ("spin", 1): rows(0.5, 0.7), ("spin", 2): rows(0.5, 0.8),
        ("sft", 0): rows(0.5, 0.5), ("sft", 1): rows(0.5, 0.5), ("sft", 2): rows(0.5, 0.5),
    }  # fmt: skip
    lines = benchmark.table(found, {("spin", "sft", 1): [0.6, 0.6, 0.6]})
    # Standard deviation .1, three seeds: 4.303 * .1 / sqrt(3) = .248.
    assert "| spin | 1 | 0.700 [0.452, 0.948] |" in "\n".join(lines)
    assert sum("| base | start |" in line for line in lines) == 1
    assert lines[-1] == "| spin against sft | 1 | 0.600 [0.600, 0.600] |"


def test_differences_are_taken_seed_by_seed(benchmark: Any) -> None:
    def rows(*values: float) -> dict[int, dict[str, float]]:
        return {t: {"accuracy": value} for t, value in enumerate(values)}

    found = {
        ("spin", 0): rows(0.1, 0.2, 0.5), ("spin", 1): rows(0.5, 0.7, 0.9),
        ("one", 0): rows(0.1, 0.2, 0.3), ("one", 1): rows(0.5, 0.7, 0.8),
        ("sft", 0): rows(0.1, 0.3, 0.3), ("sft", 1): rows(0.5, 0.6, 0.6),
    }  # fmt: skip
    made = benchmark.differences(found, "accuracy")
    expected = {("base", 1): [0.1, 0.2], ("base", 2): [0.4, 0.4], ("one", 2): [0.2, 0.1],
                ("sft", 1): [-0.1, 0.1], ("sft", 2): [0.2, 0.3]}  # fmt: skip
    assert made.keys() == expected.keys()  # one's first iteration is spin's own
    for key, values in expected.items():
        assert made[key] == pytest.approx(values)
    lines = benchmark.table(found, {})
    assert "| base | 2 | +0.400 [+0.400, +0.400] | - | - | - | - |" in lines
    found["spin", 0][0]["frechet_real"] = 2.0
    assert "| real | - | - | - | - | 2.000 | - | - |" in benchmark.table(found, {})


def test_ties_are_half_a_win(benchmark: Any) -> None:
    assert benchmark.win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0]) == pytest.approx(0.625)


def test_arms_take_over_what_they_share(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def sparring(arguments: list[str]) -> int:
        seen.append(arguments)
        return 0

    monkeypatch.setattr(benchmark, "sparring", sparring)
    for name in (*benchmark.SHARED, "iter1"):
        (tmp_path / "spin-seed0" / name).mkdir(parents=True)
    (tmp_path / "spin-seed0" / benchmark.RUN_FILE).write_text("{}")
    assert benchmark.run(tmp_path, "one", 0, []) == tmp_path / "one-seed0"
    assert "one-iteration" in seen[0]
    taken = {path.name for path in (tmp_path / "one-seed0").iterdir()}
    assert taken == {benchmark.RUN_FILE, *benchmark.SHARED}
    benchmark.run(tmp_path, "sft", 0, [])
    assert not (tmp_path / "sft-seed0" / "iter0").exists()
    assert (tmp_path / "sft-seed0" / "heldout0").is_dir()
    monkeypatch.setattr(benchmark, "sparring", lambda arguments: 75)
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(tmp_path, "frozen", 0, [])
    assert stopped.value.code == 75


def test_guidance_is_measured_on_the_start_and_every_last_iterate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PATH.parent)
    import spin_diffusion_guidance as guidance

    with pytest.raises(SystemExit, match=r"run spin_diffusion\.py first"):
        guidance.networks(tmp_path, [0, 1], 3)
    for arm in ("spin", "sft"):
        (tmp_path / f"{arm}-seed1" / "iter2" / "train-images").mkdir(parents=True)
    found = guidance.networks(tmp_path, [0, 1], 3)
    assert list(found) == ["spin", "base", "sft"]
    spin = tmp_path / "spin-seed1"
    assert found["spin"] == [(spin, spin / "iter2" / "train-images")]
    assert found["base"] == [(spin, spin / "start" / "train-images")]
