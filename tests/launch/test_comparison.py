"""The stage `compare` and the pipelines of arms: curves by hand, intervals, seeds that diverged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparring.launch import arms, comparison, runs
from sparring.launch.arms import Arm, ArmsPipeline, check_names
from sparring.launch.comparison import CompareConfig, geometric_interval, interval, sampled
from sparring.launch.config import config
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.progress import Reporter
from sparring.launch.stages import LaunchConfig, Stage


def curve(costs: list[float], values: list[float], points: int, **options: Any) -> list[float]:
    diverged = options.pop("diverged", False)
    settings = CompareConfig(**options)
    row = (np.array(costs, dtype=float), np.array(values, dtype=float))
    return sampled(*row, points, settings, diverged=diverged).tolist()


def test_means_over_parts_of_the_budget_by_hand() -> None:
    # Batches of 20, 5 and 15.
    found = curve([20, 25, 40], [1.0, 3.0, 6.0], 4, budget=40)
    assert found == pytest.approx([1, 1, (5 * 3 + 5 * 6) / 10, 6])
    assert curve([20, 25, 40], [1.0, 3.0, 6.0], 1, budget=40) == pytest.approx(
        [(20 * 1 + 5 * 3 + 15 * 6) / 40]
    )


def test_what_the_budget_leaves_over_has_the_last_value_or_the_first() -> None:
    assert curve([20, 30], [1.0, 3.0], 2, budget=40) == pytest.approx([1, 3])
    assert curve([20, 30], [1.0, 3.0], 2, budget=40, diverged=True) == pytest.approx([1, 2])


def test_the_last_value_up_to_a_point() -> None:
    options = {"measure": "last", "budget": 4}
    assert curve([0, 1.5, 3.2], [9.0, 5.0, 2.0], 4, **options) == [9, 5, 5, 2]
    assert curve([0, 1.5, 3.2], [9.0, 5.0, 2.0], 4, diverged=True, **options) == [9, 5, 5, 9]
    assert curve([1, 2, 4], [9.0, 5.0, 2.0], 4, **options) == [9, 5, 5, 2]


def test_intervals() -> None:
    # t at 97.5 % with 2 degrees of freedom is 4.303; the sample's deviation is 1.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3))
    )
    assert interval([5.0]) == (5, 5, 5)
    mean, low, high = geometric_interval([1e-3, 1e-1], 1e-9)
    assert mean == pytest.approx(1e-2)
    assert low * high == pytest.approx(1e-4)
    assert geometric_interval([-1.0, 1e-4], 1e-6)[0] == pytest.approx(1e-5)
    scipy = pytest.importorskip("scipy.stats")
    expected = [scipy.t.ppf(0.975, n) for n in range(1, len(comparison._T_975) + 1)]
    assert pytest.approx(expected, abs=6e-4) == comparison._T_975


# ---------------------------------------------------------------- a pipeline of arms


@config
class Walk:
    slope: float = 1.0
    fails: bool = False


@config
class WalkRecipe:
    name: str = "walk"
    seed: int = 0
    seeds: int = 3
    slopes: tuple[float, ...] = (1.0, 2.0)
    fails: bool = False
    launch: LaunchConfig = LaunchConfig()


def walk(config: Walk, inputs: Any, output: Path, context: Any) -> dict[str, Any]:
    """Ten rows with value slope · cost plus a constant of the seed."""
    shift = context.seed % 7
    rows = [{"cost": c, "value": config.slope * c + shift} for c in range(1, 11)]
    rows = rows[:2] if config.fails else rows
    (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"shift": shift, "diverged": "early" if config.fails else ""}


WALK = Stage("walk", "", f"{__name__}:walk", Walk, "1", {}, light=True)


class Walks(ArmsPipeline):
    recipe = WalkRecipe
    stages: Any = {}  # noqa: RUF012

    def algorithms(self) -> dict[str, str]:
        return {}

    def arms(self, recipe: WalkRecipe) -> list[Arm]:
        return [
            Arm(f"by{s:g}", WALK, Walk(slope=s, fails=recipe.fails and s > 1), recipe.seeds)
            for s in recipe.slopes
        ]

    def compared(self, recipe: WalkRecipe) -> CompareConfig:
        return CompareConfig(
            cost="cost", value="value", budget=10, measure="last", figures=("shift",), columns=2
        )

    def lead(self, recipe: WalkRecipe) -> str:
        return "Walks."


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are called by name; a test module has none that can be imported."""
    from sparring.launch import stages

    original = stages.load
    monkeypatch.setattr(stages, "load", lambda n: walk if n == WALK.function else original(n))
    # run_job reads the type of `config` from the annotation.
    monkeypatch.setitem(walk.__annotations__, "config", Walk)


def execute(folder: Path, **values: Any) -> dict[str, Any]:
    recipe = WalkRecipe(**values)
    return runs.execute(Walks(), recipe, folder, Reporter(quiet=True), changed=True)


def test_a_run_of_arms(tmp_path: Path) -> None:
    done = execute(tmp_path / "run")
    assert (done["computed"], done["kept"]) == (7, 0)
    found = done["comparison"]
    manifests = [tmp_path / "run" / f"by1/seed{n}" / "manifest.json" for n in range(3)]
    shifts = [json.loads(path.read_text())["figures"]["shift"] for path in manifests]
    assert len(set(shifts)) > 1
    assert found["by1"]["figures"]["shift"] == pytest.approx(interval(shifts))
    assert found["by1"]["table"][1] == pytest.approx(interval([10 + s for s in shifts]))
    # The same seeds in every arm: what the seed decides is the same.
    gap = np.array(found["by2"]["curve"]["mean"]) - np.array(found["by1"]["curve"]["mean"])
    assert gap[1::2] == pytest.approx(np.arange(1, 11))
    table = done["table"].splitlines()
    assert table[0].split()[:3] == ["value", "by", "cost"]
    assert "at 5" in table[0]
    assert f"± {(found['by1']['table'][0][2] - found['by1']['table'][0][1]) / 2:.2g}" in table[2]
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "by2/seed2" in page
    again = execute(tmp_path / "run")
    assert (again["computed"], again["kept"]) == (0, 7)
    assert (tmp_path / "run" / "report.html").read_text() == page


def test_one_more_seed_keeps_the_others(tmp_path: Path) -> None:
    execute(tmp_path / "run")
    assert execute(tmp_path / "run", seeds=4)["computed"] == 3  # two runs and the comparison


def test_runs_that_diverged_count_and_are_counted(tmp_path: Path) -> None:
    done = execute(tmp_path / "run", fails=True)
    bad, good = done["comparison"]["by2"], done["comparison"]["by1"]
    assert (bad["diverged"], good["diverged"]) == (3, 0)
    # From there on the value of the first row: 2 + shift.
    assert bad["table"][1][0] == pytest.approx(2 + good["figures"]["shift"][0])
    assert "diverged" in done["table"].splitlines()[0]
    assert "counts from there on" in done["table"]


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    class Wrong(Walks):
        def compared(self, recipe: WalkRecipe) -> CompareConfig:
            return CompareConfig(cost="time", value="value")

    with pytest.raises(SparringError, match=r"has no 'time'; it has cost, value"):
        runs.execute(Wrong(), WalkRecipe(), tmp_path / "run", Reporter(quiet=True))


def test_nothing_compared_yet(tmp_path: Path) -> None:
    assert Walks().summary(WalkRecipe(), tmp_path) == {
        "comparison": None,
        "table": "nothing was compared yet",
    }
    with pytest.raises(UsageError, match="no file or folder"):
        Walks().locate("nobody")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two are called 'a'; give one of them a label"),
        (["a/b"], "cannot be a folder's name"),
        ([".a"], "cannot be a folder's name"),
        (["compare"], "neither of compare, logs"),
    ],
)
def test_names_of_arms_are_folders_of_their_own(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_names(names, "arms")
    check_names(["a", "b.1", "x=0.5"], "arms")


def test_the_report_of_a_log_scale_is_drawn() -> None:
    found = {
        "cost": "c", "value": "gap", "measure": "last", "scale": "log", "figures": [],
        "ends": [1.0],
        "arms": {
            "a": {
                "seeds": 2, "diverged": 0, "figures": {}, "table": [(0.1, 1e-30, 1e30)],
                "curve": {"cost": [0.5, 1.0], "mean": [1.0, 0.1], "low": [0.5, 1e-30],
                          "high": [2.0, 1e30]},
            }
        },
    }  # fmt: skip
    section = arms._comparison(found)
    assert section.rows == [["a", "0.1 [1e-30, 1e+30]", "2"]]
    assert section.note.startswith("Geometric mean")
    drawn = str(section.charts[0].svg)
    assert "PolyCollection" in drawn or "FillBetween" in drawn  # the band
    assert "10^{-2}" in drawn  # ticks of a logarithmic axis
    found["scale"] = "linear"
    assert "10^{-2}" not in str(arms._comparison(found).charts[0].svg)
