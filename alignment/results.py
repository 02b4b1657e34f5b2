"""What a run found: the table for the terminal and the report for the browser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sparring.alignment.algorithms import algorithm
from sparring.alignment.config import Recipe
from sparring.alignment.rows import Prompt, Response
from sparring.launch import artifacts
from sparring.launch.artifacts import Artifact
from sparring.launch.config import plain
from sparring.launch.metrics import read_metrics
from sparring.launch.report import Chart, Section, Series, line_chart, write_page
from sparring.launch.rows import read_rows

# Figure names with what a reader calls them; the order is that of the table.
LABELS = {
    "passed": "pass rate",
    "relevance": "relevance",
    "gated": "passed, but off topic",
    "win_rate_base": "win rate vs start",
    "win_rate_previous": "win rate vs previous",
    "human_logp_per_token": "log p(human) a token",
    "human_or_generated": "human/generated accuracy",
    "length": "tokens",
    "cut": "cut at the limit",
    "kl": "KL from start (nats)",
}


def evaluations(recipe: Recipe, run: Path) -> list[tuple[int, dict[str, Any]]]:
    """Figures of every iterate that was evaluated, by number of iterations."""
    found = []
    for t in range(recipe.iterations + 1):
        artifact = artifacts.read(run / f"heldout{t}" / "evaluate")
        if artifact:
            found.append((t, artifact.figures))
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    mean, low, high = value
    digits = 1 if abs(mean) >= 10 else 3
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _columns(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    intervals = {name for _, figures in rows for name, v in figures.items() if isinstance(v, list)}
    known = [name for name in LABELS if name in intervals]
    return known + sorted(intervals - set(known))  # a plug-in judge's own figures come last


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _grid(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[list[str]]:
    """The evaluations as cells: a heading line, then a line a figure."""
    lines = [["after iteration", *(str(t) if t else "0 (start)" for t, _ in rows)]]
    return lines + [
        [_label(name), *(_cell(f.get(name)) for _, f in rows)] for name in _columns(rows)
    ]


def table(recipe: Recipe, run: Path) -> str:
    """The evaluations as text for a terminal."""
    rows = evaluations(recipe, run)
    if not rows:
        return "nothing was evaluated yet"
    lines = _grid(rows)
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * w for w in widths))
    prompts = artifacts.read(run / "prompts")
    count = prompts.figures["heldout"] if prompts else 0
    level = round(100 * recipe.evaluate.level)
    text.append(
        f"{count} held-out prompts, {recipe.evaluate.k} responses each; {level} % intervals"
    )
    return "\n".join(line.rstrip() for line in text)


def summary(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Figures by iteration, and the table."""
    figures = {f"after_{t}": values for t, values in evaluations(recipe, run)}
    return {"evaluations": figures, "table": table(recipe, run)}


def _charts(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Chart]:
    charts = []
    for name in _columns(rows):
        points = [(t, f[name]) for t, f in rows if name in f]
        if len(points) < 2:
            continue
        columns = list(zip(*(value for _, value in points), strict=True))
        series = Series(_label(name), [t for t, _ in points], *columns)
        caption = f"{_label(name)}, held-out prompts, after each iteration"
        charts.append(
            line_chart([series], x_label="iteration", y_label=_label(name), caption=caption)
        )
    return charts


def _training(recipe: Recipe, run: Path) -> Iterator[Chart]:
    for name, label in (("loss", "loss"), ("accuracy", "chosen above rejected")):
        series = []
        for t in range(recipe.iterations):
            path = run / f"iter{t}" / "train" / "metrics.jsonl"
            if path.is_file():
                rows = read_metrics(path)
                steps = [row["step"] for row in rows]
                series.append(Series(f"iteration {t + 1}", steps, [row[name] for row in rows]))
        if series:
            caption = f"{label} in training"
            yield line_chart(series, x_label="optimizer step", y_label=label, caption=caption)


def _samples(recipe: Recipe, run: Path, count: int = 6) -> Section | None:
    """The same held-out prompts answered before and after."""
    last = max((t for t, _ in evaluations(recipe, run)), default=0)
    if not last:
        return None
    prompts = {p.prompt_id: p.text for p in read_rows(run / "prompts/heldout.parquet", Prompt)}

    def first(t: int) -> dict[str, str]:
        rows = read_rows(run / f"heldout{t}" / "generate" / "responses.parquet", Response)
        return {row.prompt_id: row.text for row in rows if row.k == 0}

    before, after = first(0), first(last)
    step = max(1, len(prompts) // count)
    rows = [[prompts[key], before[key], after[key]] for key in list(prompts)[::step][:count]]
    return Section(
        "Before and after",
        note="Every so-many-th held-out prompt, its first sample; not chosen by hand.",
        columns=["prompt", "start", f"after {last} iterations"],
        rows=rows,
        text=True,
    )


def _steps(run: Path) -> Section:
    rows = []
    for path in sorted(run.glob("**/manifest.json"), key=lambda p: p.stat().st_mtime):
        artifact: Artifact | None = artifacts.read(path.parent)
        if artifact and ".stale-" not in path.parent.name:
            facts = artifact.manifest
            name = path.parent.relative_to(run).as_posix()
            rows.append([name, f"{facts['seconds']:.0f}", artifact.digest[:12]])
    return Section("Steps", columns=["step", "seconds", "digest"], rows=rows)


def write_report(recipe: Recipe, run: Path) -> Path:
    """Write ``report.html`` into the run."""
    rows = evaluations(recipe, run)
    heading, *lines = _grid(rows)
    level = round(100 * recipe.evaluate.level)
    held_out = Section(
        "Held-out prompts",
        note=f"Mean and {level} % bootstrap interval over base questions. Win rates count ties "
        "as ½; the judge is the one that chose the training pairs.",
        columns=heading,
        rows=lines,
        charts=_charts(rows),
    )
    shown = {key: value for key, value in plain(recipe).items() if key != "launch"}
    sections = [held_out, Section("Training", charts=list(_training(recipe, run)))]
    samples = _samples(recipe, run)
    if samples:
        sections.append(samples)
    sections += [_steps(run), Section("Recipe", code=json.dumps(shown, indent=2))]
    momentum = f", APO momentum {recipe.momentum.alpha}" if recipe.momentum.active else ""
    chosen = algorithm(recipe.algorithm)
    return write_page(
        run / "report.html",
        title=recipe.name,
        lead=f"{recipe.iterations} iterations of {chosen.summary} ({chosen.paper}){momentum}; "
        f"policy {recipe.model.path}, judge {recipe.judge.name}.",
        sections=sections,
    )
