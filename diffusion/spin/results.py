"""What a run found: the table for the terminal and the report for the browser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.diffusion.spin.config import ImageRecipe
from sparring.diffusion.spin.rows import Picture, Sample
from sparring.launch import artifacts
from sparring.launch.metrics import read_metrics
from sparring.launch.report import (
    Chart,
    Section,
    Series,
    line_chart,
    png,
    recipe_section,
    write_page,
)
from sparring.launch.rows import read_rows
from sparring.launch.tables import aligned, cell

_COLUMNS = 10  # images of the grid
_REAL = "_real"  # what figures of real images end in


def evaluations(recipe: ImageRecipe, run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Figures of every iterate that was evaluated, by number of iterations."""
    found = []
    for t in range(recipe.iterations + 1):
        artifact = artifacts.read(run / f"heldout{t}" / "evaluate-images")
        if artifact:
            found.append((t, artifact.figures))
    return found


def _shown(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Measured figures: numbers, or [mean, low, high]; counts and real images' are left out."""
    measured = (item for item in figures.items() if isinstance(item[1], (list, float)))
    return {name: value for name, value in measured if not name.endswith(_REAL)}


def _cells(rows: list[tuple[int, dict[str, Any]]]) -> list[list[str]]:
    names = dict.fromkeys(name for _, figures in rows for name in _shown(figures))
    lines = [["after iteration", *(str(t) if t else "0 (start)" for t, _ in rows), "real images"]]
    for name in names:
        values = [cell(_shown(figures).get(name)) for _, figures in rows]
        lines.append([name.replace("_", " "), *values, cell(rows[0][1].get(name + _REAL))])
    return lines


def summary(recipe: ImageRecipe, run: Path) -> dict[str, Any]:
    """Figures by iteration, and the table as text."""
    rows = evaluations(recipe, run)
    figures = {f"after_{t}": values for t, values in rows}
    if not rows:
        return {"evaluations": figures, "table": "nothing was evaluated yet"}
    text = aligned(_cells(rows))
    level = round(100 * recipe.evaluate.level)
    text.append(f"{rows[0][1]['images']} images for held-out captions; {level} % intervals")
    return {"evaluations": figures, "table": "\n".join(text)}


def samples_of(run: Path, t: int) -> list[Sample]:
    """Images for held-out captions after t iterations."""
    return read_rows(run / f"heldout{t}" / "generate-images" / "samples.parquet", Sample)


def grid_png(run: Path, iterates: Sequence[tuple[Path, int]]) -> tuple[bytes, list[str]]:
    """A picture with one caption and noise a column: the real images, then a row an iterate.

    Args:
        run: whose held-out pictures are shown; every so-many-th, not chosen by hand.
        iterates: run and number of iterations, of runs with one seed.

    Returns:
        PNG bytes, and the columns' captions.
    """
    from sparring.diffusion.spin.pictures import from_png, grid, to_png

    pictures = read_rows(run / "images" / "heldout.parquet", Picture)
    chosen = pictures[:: max(1, len(pictures) // _COLUMNS)][:_COLUMNS]
    rows = [[from_png(row.png, row.image_id) for row in chosen]]
    for folder, t in iterates:
        found = {row.image_id: row for row in samples_of(folder, t) if row.k == 0}
        rows.append([from_png(found[row.image_id].png, row.image_id) for row in chosen])
    scale = max(1, 48 // rows[0][0].height)
    return to_png(grid(rows, scale)), [row.caption for row in chosen]


def _grid(recipe: ImageRecipe, run: Path) -> Section | None:
    iterates = [(run, t) for t, _ in evaluations(recipe, run)]
    if not iterates:
        return None
    picture, captions = grid_png(run, iterates)
    caption = "rows: real, start, and after each iteration; columns share caption and noise"
    return Section(
        "Images",
        note="Every so-many-th held-out caption; not chosen by hand. " + "; ".join(captions) + ".",
        charts=[png(picture, caption=caption)],
    )


def _charts(rows: list[tuple[int, dict[str, Any]]]) -> Iterator[Chart]:
    for name in dict.fromkeys(name for _, figures in rows for name in _shown(figures)):
        points = [(t, _shown(f)[name]) for t, f in rows if name in _shown(f)]
        if len(points) > 1:
            listed = [value if isinstance(value, list) else [value] for _, value in points]
            values = zip(*listed, strict=True)
            times, label = [t for t, _ in points], name.replace("_", " ")
            series = [Series("generated", times, *values)]
            if name + _REAL in rows[0][1]:
                series.append(Series("real", times, [rows[0][1][name + _REAL]] * len(times)))
            caption = f"{label}, held-out captions, after each iteration"
            yield line_chart(series, x_label="iteration", y_label=label, caption=caption)


def _training(recipe: ImageRecipe, run: Path) -> Iterator[Chart]:
    for name in ("loss", "accuracy", "displacement", "winner"):
        series = []
        for t in range(recipe.iterations):
            path = run / f"iter{t}" / "train-images" / "metrics.jsonl"
            rows = read_metrics(path) if path.is_file() else []
            if rows and name in rows[0]:
                steps = [row["step"] for row in rows]
                series.append(Series(f"iteration {t + 1}", steps, [row[name] for row in rows]))
        if series:
            yield line_chart(
                series, x_label="optimizer step", y_label=name, caption=f"{name} in training"
            )


def write_report(recipe: ImageRecipe, run: Path) -> Path:
    """Write ``report.html`` into the run."""
    rows = evaluations(recipe, run)
    heading, *lines = _cells(rows) if rows else [[]]
    level = round(100 * recipe.evaluate.level)
    held_out = Section(
        "Held-out captions",
        note=f"Value and {level} % bootstrap interval over captions' images. Win rates compare "
        "images of the same caption and noise.",
        columns=heading,
        rows=lines,
        charts=list(_charts(rows)),
    )
    sections = [section for section in (_grid(recipe, run),) if section] + [held_out]
    sections += [Section("Training", charts=list(_training(recipe, run)))]
    sections += [recipe_section(recipe)]
    lead = (
        f"{recipe.algorithm}, {recipe.iterations} iterations from {recipe.model.path}, seed "
        f"{recipe.seed}"
    )
    return write_page(run / "report.html", title=recipe.name, lead=lead, sections=sections)
