"""What a run found: the table for the terminal and the report for the browser."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.alignment.algorithms import algorithm
from sparring.alignment.config import Recipe
from sparring.alignment.health import health_sections
from sparring.alignment.rows import Prompt, Response
from sparring.launch import artifacts
from sparring.launch.artifacts import Artifact
from sparring.launch.metrics import read_metrics
from sparring.launch.report import Chart, Section, Series, line_chart, recipe_section, write_page
from sparring.launch.rows import read_rows
from sparring.launch.tables import aligned, cell

# Figure names with what a reader calls them; the order is that of the table.
LABELS = {
    "passed": "pass rate",
    "relevance": "relevance",
    "gated": "passed, but off topic",
    "win_rate_base": "win rate vs start",
    "lc_win_rate_base": "LC win rate vs start",
    "win_rate_previous": "win rate vs previous",
    "lc_win_rate_previous": "LC win rate vs previous",
    "exploitability_last": "exploitability",
    "exploitability_average": "exploitability of the average",
    "best_response_last": "exploitability by prompt",
    "best_response_average": "exploitability by prompt, average",
    "cyclicity": "cyclic share of the payoff",
    "human_logp_per_token": "log p(human) a token",
    "human_or_generated": "human/generated accuracy",
    "length": "tokens",
    "characters": "characters",
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


def intervals(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures that are [mean, low, high], leaderboards' values with 1.96 standard errors."""
    found = {
        name: value
        for name, value in figures.items()
        if isinstance(value, list) and len(value) == 3 and not isinstance(value[0], (str, list))
    }
    for task, metrics in figures.get("lm_eval", {}).items():
        for metric, result in metrics.items():
            value, error = result["value"], 1.96 * (result["stderr"] or 0.0)
            found[f"{task} {metric}"] = [value, value - error, value + error]
    return found


def _columns(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """Known figures in their order, win rates against others, then a judge's own and tasks."""
    shown = dict.fromkeys(name for _, figures in rows for name in intervals(figures))
    known = [name for name in LABELS if name in shown]
    others = [name for name in shown if name not in LABELS]
    return known + sorted(others, key=lambda name: "win_rate_vs" not in name)


def _label(name: str, *, in_run: bool = True) -> str:
    """What a reader calls a figure."""
    for start, text in (("lc_win_rate_vs_", "LC win rate vs "), ("win_rate_vs_", "win rate vs ")):
        if name.startswith(start):
            return text + _policy(name.removeprefix(start), in_run=in_run)
    # A task of a leaderboard with its metric keeps the name it is published under.
    return LABELS.get(name, name if " " in name else name.replace("_", " "))


def _policy(name: str, *, in_run: bool = True, last: int | None = None) -> str:
    """What a reader calls a policy of the matrix; `last` is the iterate that is evaluated.

    Only within a run is a folder heldoutN iterate N; on its own it may be another run's.
    """
    roles = {"base": "start"}
    if last is not None:
        roles |= {"previous": f"iterate {last - 1}", "current": f"iterate {last}"}
    named = re.sub(r"^heldout(\d+)$", r"iterate \1", name) if in_run else name
    return roles.get(name, named)


def _grid(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[list[str]]:
    """The evaluations as cells: a heading line, then a line a figure."""
    lines = [["after iteration", *(str(t) if t else "0 (start)" for t, _ in rows)]]
    return lines + [
        [_label(name), *(cell(intervals(f).get(name)) for _, f in rows)] for name in _columns(rows)
    ]


def table(recipe: Recipe, run: Path) -> str:
    """The evaluations as text for a terminal."""
    rows = evaluations(recipe, run)
    if not rows:
        return "nothing was evaluated yet"
    text = aligned(_grid(rows))
    prompts = artifacts.read(run / "prompts")
    count = prompts.figures["heldout"] if prompts else 0
    level = round(100 * recipe.evaluate.level)
    text.append(
        f"{count} held-out prompts, {recipe.evaluate.k} responses each; {level} % intervals"
    )
    return "\n".join(text)


def evaluation_text(folder: Path) -> str:
    """What `sparring evaluate` shows of its result: figures, payoff matrix, counts."""
    artifact = artifacts.read(folder)
    if artifact is None:
        return f"{folder} holds no finished evaluation"
    figures = artifact.figures
    names = _columns([(0, figures)])
    text = []
    if names:
        shown = intervals(figures)
        text = aligned(
            [["figure", "value"], *([_label(n, in_run=False), cell(shown[n])] for n in names)]
        )
    if "cross_play" in figures:
        text += ["", *aligned(_payoff(figures["cross_play"], in_run=False))]
    if "responses" in figures:
        level = round(100 * artifact.manifest["config"]["level"])
        text += [
            f"{figures['prompts']} prompts in {figures['groups']} groups, {figures['responses']} "
            f"responses; {level} % intervals over groups"
        ]
    if "lm_eval" in figures:
        text += [f"lm-evaluation-harness {figures['lm_eval_version']}: value and 1.96 errors"]
    return "\n".join(text)


def _payoff(
    game: Mapping[str, Any], *, in_run: bool = True, last: int | None = None
) -> list[list[str]]:
    """P(row beats column) as cells, with a heading line."""
    names = [_policy(name, in_run=in_run, last=last) for name in game["policies"]]
    lines = [["row beats column", *names]]
    for a, name in enumerate(names):
        triples = zip(game["payoff"][a], game["payoff_low"][a], game["payoff_high"][a], strict=True)
        lines.append([name, *("-" if a == b else cell(t) for b, t in enumerate(triples))])
    return lines


def _cross_play(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Section]:
    """The last evaluation in which at least three policies met."""
    met = [(t, figures) for t, figures in rows if "cross_play" in figures]
    if not met:
        return []
    last, figures = met[-1]
    heading, *lines = _payoff(figures["cross_play"], last=last)
    shown = [
        f"{_label(name)} {cell(figures.get(name))}"
        for name in (
            "exploitability_last",
            "exploitability_average",
            "best_response_last",
            "best_response_average",
            "cyclicity",
        )
    ]
    note = (
        "Probability that the row's policy beats the column's, both orders heard. Exploitability "
        "is how far above ½ the best of these policies wins, against the last one and against "
        "drawing one of all with equal chances; a policy outside the table may win by more. "
        f"{'; '.join(shown)}."
    )
    return [Section("Cross-play", note=note, columns=heading, rows=lines)]


def _health(recipe: Recipe, run: Path) -> list[Section]:
    """How the judge did on the responses of each iteration."""
    found = {}
    for t in range(recipe.iterations):
        artifact = artifacts.read(run / f"iter{t}" / "judge")
        if artifact and artifact.figures.get("health"):
            found[f"iteration {t + 1}"] = artifact.figures["health"]
    return health_sections(found)


def summary(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Figures by iteration, and the table."""
    figures = {f"after_{t}": values for t, values in evaluations(recipe, run)}
    return {"evaluations": figures, "table": table(recipe, run)}


def _charts(rows: Sequence[tuple[int, dict[str, Any]]]) -> list[Chart]:
    charts = []
    for name in _columns(rows):
        points = [(t, intervals(f)[name]) for t, f in rows if name in intervals(f)]
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
            # Supervised fine-tuning rejects nothing, so has no such accuracy.
            rows = read_metrics(path) if path.is_file() else []
            if rows and name in rows[0]:
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
    heldout = read_rows(run / "prompts/heldout.parquet", Prompt)

    def first(t: int) -> dict[str, str]:
        rows = read_rows(run / f"heldout{t}" / "generate" / "responses.parquet", Response)
        return {row.prompt_id: row.text for row in rows if row.k == 0}

    before, after = first(0), first(last)
    # Prompts that were too long have no answers.
    answered = [p for p in heldout if p.prompt_id in before and p.prompt_id in after]
    step = max(1, len(answered) // count)
    rows = [[p.text, before[p.prompt_id], after[p.prompt_id]] for p in answered[::step][:count]]
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
    sections = [held_out, *_cross_play(rows)]
    sections += [Section("Training", charts=list(_training(recipe, run))), *_health(recipe, run)]
    samples = _samples(recipe, run)
    if samples:
        sections.append(samples)
    sections += [_steps(run), recipe_section(recipe)]
    momentum = f", APO momentum {recipe.momentum.alpha}" if recipe.momentum.active else ""
    chosen = algorithm(recipe.algorithm)
    return write_page(
        run / "report.html",
        title=recipe.name,
        lead=f"{recipe.iterations} iterations of {chosen.summary} ({chosen.paper}){momentum}; "
        f"policy {recipe.model.path}, judge {recipe.judge.name}.",
        sections=sections,
    )
