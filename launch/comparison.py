"""The stage `compare`: arms that ran with several seeds, their curves on one axis of cost.

Every seed counts. A run that diverged counts, from there on, with the value it started from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from sparring.launch import artifacts
from sparring.launch.config import config
from sparring.launch.errors import SparringError
from sparring.launch.metrics import read_metrics
from sparring.launch.stages import Context, Figures, Stage, many
from sparring.launch.tables import aligned

Array = npt.NDArray[np.float64]
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom; beyond these the last is wide enough.
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
          2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
          2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@config
class CompareConfig:
    """What is compared, of runs that wrote a metrics.jsonl."""

    arms: tuple[str, ...] = ()
    """The arm of each input, in their order; an arm's inputs are its seeds."""
    cost: str = "trajectories"
    """Column of metrics.jsonl that is the axis: a cost so far, growing."""
    value: str = "return_mean"
    """Column that is compared."""
    budget: float = 1.0
    """Where the axis ends."""
    measure: Literal["mean", "last"] = "mean"
    """"mean": a row's value is that of all the cost since the row before, and is averaged over each
    interval; "last": the value of the last row up to a point."""
    scale: Literal["linear", "log"] = "linear"
    """"log": geometric means and intervals, for gaps and distances."""
    floor: float = 1e-12
    """On the log scale, smaller values are rounding and count as this."""
    figures: tuple[str, ...] = ()
    """Figures of the runs to put beside, as their mean over seeds."""
    points: int = 20
    """Points of the curve."""
    columns: int = 5
    """Points of the table."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with the ends of its 95 % t-interval over seeds; one seed has none, both ends are it."""
    sample = np.asarray(values, dtype=np.float64)
    mean = float(sample.mean())
    if len(sample) < 2:
        return mean, mean, mean
    t = _T_975[min(len(sample) - 1, len(_T_975)) - 1]
    half = t * float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return mean, mean - half, mean + half


def geometric_interval(values: Sequence[float], floor: float) -> tuple[float, float, float]:
    """The same of logarithms, turned back."""
    mean, low, high = interval([math.log(max(value, floor)) for value in values])
    # Two seeds that differ by orders of magnitude have an interval beyond all floats.
    return math.exp(mean), math.exp(max(low, -700)), math.exp(min(high, 700))


def sampled(
    costs: Array, values: Array, points: int, settings: CompareConfig, *, diverged: bool
) -> Array:
    """(points,) one run's curve at evenly spaced costs up to the budget (see `CompareConfig`)."""
    at = settings.budget * np.arange(1, points + 1) / points
    tail = values[0] if diverged else values[-1]
    if settings.measure == "last":
        row = np.searchsorted(costs, at * (1 + 1e-12), side="right") - 1
        found = np.asarray(values[np.maximum(row, 0)])
        return np.where(at > costs[-1], tail, found)
    inside = np.minimum(np.append(costs, settings.budget), settings.budget)
    knots = np.concatenate([[0.0], np.maximum.accumulate(inside)])
    area = np.concatenate([[0.0], np.cumsum(np.append(values, tail) * np.diff(knots))])
    return np.diff(np.interp(at, knots, area), prepend=0.0) * points / settings.budget


def run(
    config: CompareConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write comparison.json."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for name, path in zip(config.arms, many("runs", inputs), strict=True):
        arms.setdefault(name, []).append(_read(path, config))
    found = {name: _arm(runs, config) for name, runs in arms.items()}
    width = config.budget / config.columns
    table = {
        "cost": config.cost,
        "value": config.value,
        "measure": config.measure,
        "scale": config.scale,
        "figures": list(config.figures),
        "ends": [round(width * (n + 1), 6) for n in range(config.columns)],
        "arms": found,
    }
    artifacts.write_json(output / "comparison.json", table)
    return {"arms": len(found), "runs": len(config.arms)}


def _read(path: Path, settings: CompareConfig) -> dict[str, Any]:
    """Both curves of one run, and its figures."""
    rows = read_metrics(path / "metrics.jsonl")
    artifact = artifacts.read(path)
    if not rows or artifact is None:
        raise SparringError(f"{path} holds no finished run with a metrics.jsonl")
    missing = {settings.cost, settings.value} - rows[0].keys()
    if missing:
        known = ", ".join(rows[0])
        raise SparringError(f"{path}/metrics.jsonl has no {sorted(missing)[0]!r}; it has {known}")
    costs = np.array([row[settings.cost] for row in rows], dtype=np.float64)
    values = np.array([row[settings.value] for row in rows], dtype=np.float64)
    diverged = bool(artifact.figures.get("diverged"))
    return {
        "figures": artifact.figures,
        "diverged": diverged,
        "curve": sampled(costs, values, settings.points, settings, diverged=diverged),
        "table": sampled(costs, values, settings.columns, settings, diverged=diverged),
    }


def _arm(runs: Sequence[Mapping[str, Any]], settings: CompareConfig) -> dict[str, Any]:
    def over_seeds(name: str) -> list[tuple[float, float, float]]:
        columns = np.stack([run[name] for run in runs]).T.tolist()
        if settings.scale == "log":
            return [geometric_interval(column, settings.floor) for column in columns]
        return [interval(column) for column in columns]

    mean, low, high = zip(*over_seeds("curve"), strict=True)
    figures = {}
    for name in settings.figures:
        known = [run["figures"][name] for run in runs if run["figures"].get(name) is not None]
        figures[name] = interval(known) if known else None
    return {
        "seeds": len(runs),
        "diverged": sum(run["diverged"] for run in runs),
        "curve": {
            "cost": [settings.budget * (n + 1) / settings.points for n in range(settings.points)],
            "mean": mean,
            "low": low,
            "high": high,
        },
        "table": over_seeds("table"),
        "figures": figures,
    }


def text(folder: Path) -> str:
    """The table of comparison.json for a terminal."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return "\n".join(aligned(cells(found)))


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """The table of comparison.json: a heading line, then a line an arm."""
    begin = 0.0
    spans = []
    for end in found["ends"]:
        spans.append(f"{begin:g}-{end:g}" if found["measure"] == "mean" else f"at {end:g}")
        begin = end
    names = [name.replace("_", " ") for name in found["figures"]]
    some_diverged = any(arm["diverged"] for arm in found["arms"].values())
    heading = [f"{found['value'].replace('_', ' ')} by {found['cost']}", *spans, *names, "seeds"]
    lines = [heading + ["diverged"] * some_diverged]
    for name, arm in found["arms"].items():
        values = [_cell(value, found["scale"]) for value in arm["table"]]
        values += [_cell(value, "linear") for value in arm["figures"].values()]
        tail = [str(arm["seeds"])] + [str(arm["diverged"])] * some_diverged
        lines.append([name, *values, *tail])
    return lines


def _cell(value: Sequence[float] | None, scale: str) -> str:
    """ "46.6 ± 17", on the log scale "0.019 [0.01, 0.044]", "-" for None."""
    if value is None:
        return "-"
    mean, low, high = value
    if low == high:
        return f"{mean:.4g}"
    if scale == "log":
        return f"{mean:.3g} [{low:.2g}, {high:.2g}]"
    return f"{mean:.4g} ± {(high - low) / 2:.2g}"


COMPARE = Stage(
    name="compare",
    summary="curves of arms over all their seeds, with 95 % intervals",
    function="sparring.launch.comparison:run",
    config=CompareConfig,
    version="1",
    inputs={"runs*": "finished runs with a metrics.jsonl"},
    text="sparring.launch.comparison:text",
    light=True,
)
