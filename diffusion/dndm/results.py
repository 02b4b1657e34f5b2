"""What a run found: quality and cost by sampler, for the terminal and the browser."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.diffusion.dndm.config import TextRecipe
from sparring.diffusion.dndm.rows import SampledText
from sparring.diffusion.dndm.stages import EVALUATE_TEXT, SAMPLE_TEXT, TRAIN_TEXT
from sparring.launch import artifacts
from sparring.launch.comparison import interval
from sparring.launch.metrics import read_metrics
from sparring.launch.report import Chart, Section, Series, line_chart, recipe_section, write_page
from sparring.launch.rows import read_rows

_COST = ("nfe", "row_evaluations", "seconds", "batches")
_SHOWN = 8  # sampled texts of a sampler


def found(recipe: TextRecipe, run: Path) -> dict[str, list[dict[str, float]]]:
    """Figures of each sampler's finished seeds; of [value, low, high] the value."""
    rows: dict[str, list[dict[str, float]]] = {}
    for sampler in recipe.samplers:
        for number in range(recipe.seeds):
            folder = run / sampler.name / f"seed{number}" / EVALUATE_TEXT.name
            artifact = artifacts.read(folder)
            if artifact:
                rows.setdefault(sampler.name, []).append(_values(artifact.figures))
    return rows


def _values(figures: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v[0] if isinstance(v, list) else v) for k, v in figures.items()}


def cells(rows: Mapping[str, list[dict[str, float]]]) -> list[list[str]]:
    """A heading line, then a line a sampler: means over seeds with 95 % t-intervals."""
    names = list(dict.fromkeys(name for runs in rows.values() for run in runs for name in run))
    lines = [["sampler", *(name.replace("_", " ") for name in names), "seeds"]]
    for sampler, runs in rows.items():
        values = []
        for name in names:
            mean, low, high = interval([run[name] for run in runs])
            values.append(f"{mean:.4g}" + (f" ± {(high - low) / 2:.2g}" if high > low else ""))
        lines.append([sampler, *values, str(len(runs))])
    return lines


def summary(recipe: TextRecipe, run: Path) -> dict[str, Any]:
    """Figures by sampler and seed, and the table as text."""
    rows = found(recipe, run)
    if not rows:
        return {"samplers": rows, "table": "nothing was evaluated yet"}
    lines = cells(rows)
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    text.append(
        "nfe: network calls a batch; row evaluations: calls that a row took part in; seconds: of "
        "all batches"
    )
    return {"samplers": rows, "table": "\n".join(line.rstrip() for line in text)}


def _charts(rows: Mapping[str, list[dict[str, float]]]) -> list[Chart]:
    """The first measure against calls, a point a sampler."""
    some = next(iter(rows.values()))[0]
    measure = next((name for name in some if name not in _COST), None)
    if measure is None or "nfe" not in some:
        return []
    series = []
    for sampler, runs in rows.items():
        calls, _, _ = interval([run["nfe"] for run in runs])
        value, low, high = interval([run[measure] for run in runs])
        series.append(Series(sampler, [calls], [value], [low], [high]))
    label = measure.replace("_", " ")
    caption = f"{label} against network calls a batch; means over seeds, 95 % t-intervals"
    return [
        line_chart(series, x_label="network calls", y_label=label, caption=caption, marked=True)
    ]


def _training(run: Path) -> Section:
    path = run / TRAIN_TEXT.name / "metrics.jsonl"
    metrics = read_metrics(path) if path.is_file() else []
    charts = []
    for name in ("loss", "cross_entropy", "length_accuracy"):
        if metrics and name in metrics[0]:
            steps = [row["step"] for row in metrics]
            series = [Series(name, steps, [row[name] for row in metrics])]
            label = name.replace("_", " ")
            charts.append(
                line_chart(series, x_label="optimizer step", y_label=label, caption=label)
            )
    return Section("Training", charts=charts)


def _texts(recipe: TextRecipe, run: Path) -> Section:
    """The first texts of each sampler's first seed; not chosen by hand."""
    lines = []
    for sampler in recipe.samplers:
        path = run / sampler.name / "seed0" / SAMPLE_TEXT.name / "samples.parquet"
        first = read_rows(path, SampledText)[:_SHOWN] if path.is_file() else []
        lines += [
            [sampler.name, row.source, row.text, row.target if row.source else ""] for row in first
        ]
    return Section(
        "Texts",
        note="The first of each sampler; not chosen by hand.",
        columns=["sampler", "source", "sampled", "held out"],
        rows=lines,
    )


def write_report(recipe: TextRecipe, run: Path) -> Path:
    """Write ``report.html`` into the run."""
    rows = found(recipe, run)
    sections = []
    if rows:
        heading, *lines = cells(rows)
        sections.append(
            Section(
                "Samplers",
                note="Means over seeds with 95 % t-intervals; one network.",
                columns=heading,
                rows=lines,
                charts=_charts(rows),
            )
        )
    sections += [_texts(recipe, run), _training(run)]
    sections.append(recipe_section(recipe))
    lead = (
        f"Discrete diffusion of {recipe.data.source} with {recipe.process.noise} noise, "
        f"{recipe.train.steps} training steps, {len(recipe.samplers)} samplers, seed {recipe.seed}"
    )
    return write_page(run / "report.html", title=recipe.name, lead=lead, sections=sections)
