"""Reports: one self-contained HTML file with inline SVG. Nothing is loaded from a network."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from sparring.launch.artifacts import write_atomically
from sparring.launch.config import without_launch

# What matplotlib writes into a drawing about itself: a date, and links to vocabularies.
_METADATA = ("Date", "Creator", "Format", "Type")
_INSIDE = 5  # curves whose names still fit inside the axes
_MARKERS = "osD^v*PX"


@dataclass(frozen=True)
class Chart:
    """A drawing; `svg` is trusted markup from `line_chart` or `png`."""

    svg: object
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with any of a note, charts, a table and preformatted text."""

    heading: str
    note: str = ""
    charts: Sequence[Chart] = ()
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    text: bool = False
    """Whether the table holds prose instead of numbers."""
    code: str = ""


@dataclass(frozen=True)
class Series:
    """A line with optional intervals: `low` and `high` as long as `y`, or empty."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    caption: str,
    bands: bool = False,
    log: bool = False,
    marked: bool = False,
) -> Chart:
    """Draw lines as SVG; intervals become error bars, or bands where points are many.

    With `log` the vertical axis is logarithmic; with `marked` every point has a dot, and the
    horizontal axis, of costs, is logarithmic where they span enough.
    """
    import matplotlib as mpl
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    beside = len(series) > _INSIDE
    size = (6.6, max(2.7, 0.17 * len(series) + 0.5)) if beside else (4.2, 2.7)
    # A fixed salt and no metadata: the same figures give the same file, and it names no address.
    with mpl.rc_context({"svg.hashsalt": "sparring", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for number, one in enumerate(series):
            marker = _MARKERS[number // 10 % len(_MARKERS)]  # colours repeat after ten
            _draw(axes, one, marker, bands=bands, marked=marked)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log:
            axes.set_yscale("log")
            # An interval of few seeds may span more decades than all the curves.
            values = [y for one in series for y in one.y]
            axes.set_ylim(min(values) / 10, max(values) * 10)
        if marked:
            _scale_costs(axes, [x for one in series for x in one.x])
        elif all(float(x).is_integer() for one in series for x in one.x):
            axes.xaxis.set_major_locator(MaxNLocator(5 if bands else 10, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        if beside:
            figure.legend(loc="outside right upper", frameon=False, fontsize="small")
        elif len(series) > 1:
            axes.legend(frameon=bands, fontsize="small" if bands else None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_METADATA))
    drawing = buffer.getvalue()
    return Chart(Markup(drawing[drawing.index("<svg") :]), caption)


def _draw(axes: Any, one: Series, marker: str, *, bands: bool, marked: bool) -> None:
    if bands:
        (line,) = axes.plot(one.x, one.y, linewidth=1.2, label=one.name)
        if len(one.low):
            axes.fill_between(one.x, one.low, one.high, color=line.get_color(), alpha=0.15)
    elif len(one.low):
        below = [y - low for y, low in zip(one.y, one.low, strict=True)]
        above = [high - y for y, high in zip(one.y, one.high, strict=True)]
        axes.errorbar(
            one.x,
            one.y,
            yerr=[below, above],
            marker=marker,
            markersize=4,
            capsize=3,
            label=one.name,
        )
    else:
        dot = marker if marked else None
        axes.plot(one.x, one.y, linewidth=1.2, label=one.name, marker=dot)


def _scale_costs(axes: Any, costs: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers, where its ticks would not be a single one."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if min(costs) > 0 and max(costs) / min(costs) > 10:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def png(data: bytes, *, caption: str) -> Chart:
    """A picture inside the page."""
    from markupsafe import Markup

    source = base64.b64encode(data).decode()
    return Chart(
        Markup('<img alt="{}" src="data:image/png;base64,{}">').format(caption, source), caption
    )


def recipe_section(recipe: Any) -> Section:
    """All of a recipe but for its launch, as a report's last section."""
    return Section("Recipe", code=json.dumps(without_launch(recipe), indent=2))


def write_page(path: Path, *, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Render the sections into an HTML file; all text is escaped."""
    from jinja2 import Environment

    source = resources.files("sparring.launch").joinpath("report.html").read_text("utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )
    write_atomically(path, template.render(title=title, lead=lead, sections=sections))
    return path
