"""What a run found: figures by ensemble, and pictures, for the terminal and the browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import trim_mean

from sparring.launch import artifacts
from sparring.launch.comparison import interval
from sparring.launch.metrics import read_metrics
from sparring.launch.report import Chart, Section, Series, line_chart, recipe_section, write_page
from sparring.launch.tables import aligned
from sparring.science.confdiff.config import ConformationRecipe
from sparring.science.confdiff.stages import EVALUATE

Array = npt.NDArray[np.float64]
PANELS = "panels.npz"
_SHOWN = (
    "js_pwd",
    "js_rg",
    "js_rg_per_residue",
    "js_tic",
    "js_phi_psi",
    "val_clash",
    "val_break",
    "energy",
    "energy_median",
    "energy_shift",
    "ess",
)
"""Columns of the table; all figures are in each evaluation's manifest."""
_HIT = 0.99
"""Share of samples within the reference's range below which it stands beside a distance."""
_MOVED = ("js_pwd", "js_rg", "js_tic", "js_phi_psi", "energy", "energy_median")


def folders(recipe: ConformationRecipe, run: Path) -> dict[str, list[Path]]:
    """Finished evaluations by ensemble, in the table's order."""
    found = {
        f"MD {recipe.md.temperature:g} K": [run / "source" / EVALUATE.name],
        f"MD {recipe.md.temperature:g} K reweighted": [run / "reweighted" / EVALUATE.name],
    }
    for arm in recipe.arms:
        seeds = range(recipe.seeds)
        found[arm.name] = [run / arm.name / f"seed{n}" / EVALUATE.name for n in seeds]
    kept = {name: [p for p in paths if artifacts.read(p)] for name, paths in found.items()}
    return {name: paths for name, paths in kept.items() if paths}


def energy_shift(arm: Path, base: Path) -> float:
    """kJ/mol: what guidance did to the relaxed energy, over pairs of samples with the same noise.

    A mean without the twentieth of pairs at either end: of a few the atoms lie on each other, and
    their energies are hundreds away.

    Args:
        arm: evaluation of a guided arm.
        base: that of the arm without guidance and the same seed.
    """
    with_guide, without = (
        dict(zip(panels["energy_of"], panels["energy"], strict=True))
        for panels in (_panels(arm), _panels(base))
    )
    pairs = [with_guide[n] - without[n] for n in with_guide.keys() & without.keys()]
    return float(trim_mean(pairs, 0.05)) if pairs else float("nan")


def _with_shifts(
    recipe: ConformationRecipe, found: Mapping[str, list[Path]]
) -> dict[str, list[dict[str, float]]]:
    """Figures by ensemble; those of guided arms with their shift, where there is a base to pair."""
    rows = {name: figures(paths) for name, paths in found.items()}
    base = next((arm for arm in recipe.arms if arm.guidance == "none"), None)
    beside = {path.parent.name: path for path in found.get(base.name, ())} if base else {}
    for arm in recipe.arms:
        # Resampling, or another number of network calls, leaves no pairs.
        same = base and (arm.steps, arm.solver, arm.grid) == (base.steps, base.solver, base.grid)
        if not same or arm.guidance == "none" or arm.correction == "smc":
            continue
        for path, row in zip(found.get(arm.name, ()), rows.get(arm.name, ()), strict=True):
            if path.parent.name in beside:
                row["energy_shift"] = energy_shift(path, beside[path.parent.name])
    return rows


def figures(paths: Sequence[Path]) -> list[dict[str, float]]:
    """Figures of evaluations."""
    found = []
    for path in paths:
        artifact = artifacts.read(path)
        assert artifact
        found.append({k: float(v) for k, v in artifact.figures.items()})
    return found


def _floor(rows: Mapping[str, list[dict[str, float]]]) -> dict[str, float]:
    """What a half of the reference scores against the other half, and its energies."""
    first = next(iter(rows.values()))[0]
    found = {k.removesuffix("_floor"): v for k, v in first.items() if k.endswith("_floor")}
    known = ("energy", "energy_median", "energy_std")
    return found | {k: first[f"reference_{k}"] for k in known if f"reference_{k}" in first}


def cells(recipe: ConformationRecipe, run: Path) -> list[list[str]]:
    """A heading line, then a line an ensemble: means over seeds with 95 % t-intervals."""
    rows = _with_shifts(recipe, folders(recipe, run))
    if not rows:
        return []
    names = [n for n in _SHOWN if any(n in one for runs in rows.values() for one in runs)]
    rows = {f"MD {recipe.target:g} K, half against half": [_floor(rows)], **rows}
    lines = [["ensemble", *(name.replace("_", " ") for name in names)]]
    arms = {arm.name for arm in recipe.arms}
    for name, runs in rows.items():
        values = []
        for column in names:
            some = [one[column] for one in runs if column in one]
            if not some:
                values.append("")
                continue
            text = _mean(some)
            # A distance says little of an ensemble that is out of the reference's range.
            hits = np.mean([one.get(f"{column}_hit_rate", 1.0) for one in runs])
            values.append(text + (f" ({hits:.2g})" if hits < _HIT else ""))
        missing = name in arms and len(runs) < recipe.seeds
        lines.append([f"{name}, {len(runs)} of {recipe.seeds} seeds" if missing else name, *values])
    return lines


def moved(recipe: ConformationRecipe, run: Path) -> list[list[str]]:
    """A heading line, then a line a guided arm: how far guidance moves the base's measures, as a
    share of the way from MD that the base learnt from to MD at the target.

    (base - arm) / (source - floor) of each seed, with 95 % t-intervals over seeds; for energies the
    floor is the target's energy. 1: all the way, 0: nowhere. A JS that is below its floor already
    at the source is left out.
    """
    found = folders(recipe, run)
    rows = {name: figures(paths) for name, paths in found.items()}
    source = next(iter(rows.values()))[0] if rows else {}
    floor = _floor(rows) if rows else {}
    base = next((arm.name for arm in recipe.arms if arm.guidance == "none"), "")
    beside = {
        p.parent.name: row for p, row in zip(found.get(base, ()), rows.get(base, ()), strict=True)
    }
    names = [n for n in _MOVED if n in floor and _apart(n, source[n], floor[n])]
    lines = [["guidance", *(name.replace("_", " ") for name in names), "seeds"]]
    for arm in recipe.arms:
        if arm.guidance == "none" or arm.name not in rows:
            continue
        seeds = zip(found[arm.name], rows[arm.name], strict=True)
        pairs = [(beside[p.parent.name], row) for p, row in seeds if p.parent.name in beside]
        shares = [
            [(b[name] - a[name]) / (source[name] - floor[name]) for b, a in pairs if name in a]
            for name in names
        ]
        if pairs:
            lines.append([arm.name, *map(_mean, shares), str(len(pairs))])
    return lines if len(lines) > 1 and names else []


def _apart(name: str, source: float, floor: float) -> bool:
    return source > floor if name.startswith("js") else source != floor


def _moved_note(recipe: ConformationRecipe) -> str:
    start, end = f"{recipe.md.temperature:g} K", f"{recipe.target:g} K"
    return (
        f"Share of the way that guidance moves the base: 1 is the way from MD at {start} to MD at "
        f"{end}, of js to its noise floor; a js that is below its floor at {start} has no way to go"
    )


def _mean(values: Sequence[float]) -> str:
    """Mean over seeds with half of its 95 % t-interval, where there is one."""
    if not values:
        return ""
    mean, low, high = interval(values)
    text = f"{mean:.3g}" if abs(mean) < 1 else f"{mean:.4g}"
    half = (high - low) / 2
    return text + (f" ± {half:.2g}" if half > 1e-9 * abs(mean) else "")


def summary(recipe: ConformationRecipe, run: Path) -> dict[str, Any]:
    """Figures by ensemble and seed, and the tables as text."""
    lines = cells(recipe, run)
    if not lines:
        return {"ensembles": {}, "table": "nothing was evaluated yet"}
    text = aligned(lines)
    text.append(
        f"all against MD at {recipe.target:g} K; js: Jensen-Shannon distance, 0 to 0.83 (share of "
        f"samples within the reference's range, where below {_HIT}); energy shift: against base, "
        "over pairs with the same noise, trimmed by a twentieth at either end"
    )
    if shares := moved(recipe, run):
        text += ["", *aligned(shares), _moved_note(recipe)]
    found = _with_shifts(recipe, folders(recipe, run))
    return {"ensembles": found, "table": "\n".join(text)}


def _panels(path: Path) -> dict[str, Array]:
    with np.load(path / PANELS, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def density(values: Array, weights: Array, edges: Array) -> list[float]:
    """Of all values, also of those outside the edges."""
    height, _ = np.histogram(values, bins=edges, weights=weights)
    return [float(h) for h in height / np.diff(edges) / weights.sum()]


def typical_range(values: Array) -> tuple[float, float]:
    """Where an ensemble's values are, without the few that are far away: the energy of a clash is
    thousands of kJ/mol from the others. Of a normal law it is 4 standard deviations wide."""
    low, first, third, high = (float(q) for q in np.quantile(values, (0.002, 0.25, 0.75, 0.998)))
    reach = 2.5 * (third - first)
    return max(low, first - reach), min(high, third + reach)


def _distribution(panels: Mapping[str, dict[str, Array]], key: str, label: str) -> Chart | None:
    """One line an ensemble: the density of a quantity."""
    given = {name: p for name, p in panels.items() if len(p[key])}
    if not given:
        return None
    lows, highs = zip(*(typical_range(p[key]) for p in given.values()), strict=True)
    bins = 20 if min(len(p[key]) for p in given.values()) < 1000 else 40
    edges = np.linspace(min(lows), max(highs), bins + 1)
    middle = [float(x) for x in (edges[1:] + edges[:-1]) / 2]
    series = []
    for name, p in given.items():
        weights = p["weights"] if key != "energy" else p["energy_weights"]
        series.append(Series(name, middle, density(p[key], weights, edges)))
    return line_chart(series, x_label=label, y_label="density", caption=f"{label}; density")


def _grid(panels: Mapping[str, dict[str, Array]], keys: tuple[str, str], caption: str) -> Chart:
    """Free energy over two quantities, a panel an ensemble, on common axes."""
    import io

    from matplotlib.figure import Figure

    from sparring.launch.report import png

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.7 * columns, 2.4 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    if keys == ("phi", "psi"):
        edges = [np.linspace(-180, 180, 49)] * 2
    else:
        reference = next(iter(panels.values()))
        edges = [np.linspace(reference[k].min(), reference[k].max(), 49) for k in keys]
    for ax, (name, p) in zip(axes, panels.items(), strict=False):
        repeats = len(p[keys[0]]) // max(len(p["weights"]), 1)
        weights = np.repeat(p["weights"], repeats)
        height, *_ = np.histogram2d(p[keys[0]], p[keys[1]], bins=edges, weights=weights)
        with np.errstate(divide="ignore"):
            # Nothing at all may lie on the reference's axes.
            energy = -np.log(height.T / max(height.sum(), 1e-300))
        energy -= energy[np.isfinite(energy)].min() if np.isfinite(energy).any() else 0
        ax.pcolormesh(*edges, energy, vmin=0, vmax=7, cmap="viridis_r")
        ax.set_title(name, fontsize=9)
        ax.set_xlabel(keys[0])
        ax.set_ylabel(keys[1])
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return png(buffer.getvalue(), caption=caption)


def _pictures(recipe: ConformationRecipe, run: Path) -> list[Section]:
    found = folders(recipe, run)
    if not found:
        return []
    panels = {name: _panels(paths[0]) for name, paths in found.items()}
    first = _panels(next(iter(found.values()))[0])
    reference = {
        key.removeprefix("reference_"): v for key, v in first.items() if "reference_" in key
    }
    panels = {f"MD {recipe.target:g} K": reference, **panels}
    lines = [
        _distribution(panels, "energy", "energy with side chains relaxed, kJ/mol"),
        _distribution(panels, "rg", "radius of gyration of CA, nm"),
    ]
    maps = [
        _grid(panels, ("phi", "psi"), "-log p of phi and psi of all residues, in RT, degrees"),
        _grid(panels, ("tic1", "tic2"), "-log p of the first two TICs of the reference, in RT"),
    ]
    return [
        Section("Distributions", charts=[chart for chart in lines if chart]),
        Section("Free energies", note="Seed 0; white: not visited.", charts=maps),
    ]


def _window(count: int) -> int:
    return max(1, count // 40)


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the steps before, as many as there are near the start."""
    window = _window(len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]


def _training(recipe: ConformationRecipe, run: Path) -> Section:
    charts = []
    for name in ("base", "unconditional", "energy", "force"):
        path = run / "seed0" / name / "metrics.jsonl"
        metrics = read_metrics(path) if path.is_file() else []
        if metrics:
            steps = [m["step"] for m in metrics]
            label, values = "loss", [m["loss"] for m in metrics]
            if "blank" in metrics[0]:
                # The loss of a guide is nearly all noise that no network can predict.
                label = "gain over knowing nothing"
                values = [m["blank"] - m["loss"] for m in metrics]
            caption = f"{label}, {name}; means over {_window(len(steps))} steps"
            series = [Series(name, steps, _smooth(values))]
            charts.append(
                line_chart(series, x_label="optimizer step", y_label=label, caption=caption)
            )
    return Section("Training", charts=charts)


def write_report(recipe: ConformationRecipe, run: Path) -> Path:
    """Write ``report.html`` into the run."""
    sections = []
    lines = cells(recipe, run)
    if lines:
        heading, *rest = lines
        note = (
            f"Against MD at {recipe.target:g} K, on which nothing was trained. Means over seeds "
            "with 95 % t-intervals. js: Jensen-Shannon distances (0 to 0.83), in brackets the "
            f"share of samples within the reference's range where it is below {_HIT}; energies in "
            "kJ/mol with hydrogens added and side chains relaxed, the same for all; energy shift: "
            "against base, over pairs with the same noise, trimmed by a twentieth at either end; "
            "ess: effective share."
        )
        sections.append(Section("Ensembles", note=note, columns=heading, rows=rest))
    if shares := moved(recipe, run):
        heading, *rest = shares
        note = _moved_note(recipe) + "."
        sections.append(Section("Guidance", note=note, columns=heading, rows=rest))
    sections += [*_pictures(recipe, run), _training(recipe, run)]
    sections.append(recipe_section(recipe))
    lead = (
        f"Conformations of {recipe.md.sequence}: a diffusion model of MD at "
        f"{recipe.md.temperature:g} K, guided to {recipe.target:g} K; seed {recipe.seed}"
    )
    return write_page(run / "report.html", title=recipe.name, lead=lead, sections=sections)
