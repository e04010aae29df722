"""Charts as SVG that takes its colours from the page, so that they are right in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = 10
"""Number of colours that the page defines, `--s0` to `--s9`."""
_INK, _GRID = "#010101", "#020202"
# Colours that no chart uses else; the page's variables take their places in the text of the SVG.
_SERIES = [f"#0300{i:02x}" for i in range(COLOURS)]
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "more_ds",  # the same ids every time
    "text.parse_math": False,  # a task's name may hold a dollar
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
WIDTH = 10.4
"""Inches of a chart that is as wide as the page."""


@dataclass(frozen=True)
class Panel:
    """A small chart.

    Attributes:
        title: above it.
        lines: x and y of each line by its name, which decides its colour.
        log: whether y is logarithmic.
    """

    title: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log: bool = False


class Spread(NamedTuple):
    """A point with an error."""

    x: float
    y: float
    error: float


def panels(charts: Sequence[Panel], *, columns: int = 4, height: float = 1.7, x: str = "step") -> str:
    """A grid of small line charts with one legend; a line has the colour of its name in all of them."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    count = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure(height * count + 0.35 * (len(names) > 1))
        grid = figure.subplots(count, columns, squeeze=False).ravel()
        ends = [value for chart in charts for x_values, _ in chart.lines.values() for value in x_values]
        for axes, chart in zip(grid, charts, strict=False):
            _draw(axes, chart, names)
            if min(ends) < max(ends):
                axes.set_xlim(min(ends), max(ends))
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        for axes in grid[max(0, len(charts) - columns) : len(charts)]:
            axes.set_xlabel(x)
        if len(names) > 1:
            handles = [matplotlib.lines.Line2D([], [], color=colour(i), label=name) for i, name in enumerate(names)]
            figure.legend(handles=handles, loc="outside upper left", ncols=min(len(names), 6), frameon=False)
        return _text(figure)


def bars(names: Sequence[str], series: Mapping[str, Sequence[tuple[float, float] | None]], y: str) -> str:
    """Values with their errors: a group for each of `names`, a mark for each series; None is left out."""
    with matplotlib.rc_context(_STYLE):
        figure = _figure(2.4)
        axes = figure.subplots()
        step = 0.7 / max(len(series), 1)
        for i, (label, values) in enumerate(series.items()):
            places = [n - 0.35 + step * (i + 0.5) for n, value in enumerate(values) if value is not None]
            known = [value for value in values if value is not None]
            axes.errorbar(
                places, [v for v, _ in known], yerr=[e for _, e in known], fmt="o", markersize=4, capsize=2,
                color=colour(i), label=label,
            )  # fmt: skip
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(y)
        axes.grid(axis="x", visible=False)
        if len(series) > 1:
            figure.legend(loc="outside upper left", ncols=min(len(series), 6), frameon=False)
        return _text(figure)


def spreads(charts: Mapping[str, Mapping[str, Sequence[Spread]]], y: str) -> str:
    """Charts by the title of their x; in each, lines of points with errors by name."""
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines))
    with matplotlib.rc_context(_STYLE):
        figure = _figure(2.6)
        grid = figure.subplots(1, len(charts), squeeze=False).ravel()
        for axes, (title, lines) in zip(grid, charts.items(), strict=True):
            for name, own in lines.items():
                place = sorted(own)
                axes.errorbar(
                    [p.x for p in place], [p.y for p in place], yerr=[p.error for p in place], fmt="o-", markersize=4,
                    capsize=2, linewidth=1.3, color=colour(names.index(name)), label=name,
                )  # fmt: skip
            axes.set_xlabel(title)
            axes.set_ylabel(y)
            axes.legend(frameon=False)
        return _text(figure)


def points(
    charts: Mapping[str, Sequence[tuple[float, float]]], names: Sequence[str], columns: int = 4, width: float = WIDTH
) -> str:
    """Named points on a plane; `charts` are titles and the place of every name, `width` is in inches."""
    count = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(_STYLE):
        figure = _figure((2.3 if columns > 1 else 3.2) * count, width)
        grid = figure.subplots(count, columns, squeeze=False).ravel()
        for axes, (title, places) in zip(grid, charts.items(), strict=False):
            for i, (place, name) in enumerate(zip(places, names, strict=True)):
                axes.plot(*place, "o", markersize=5, color=colour(i))
                axes.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=8)
            axes.set_title(title)
            axes.margins(0.25)
            axes.tick_params(labelbottom=False, labelleft=False, length=0)
        for axes in grid[len(charts) :]:
            axes.set_axis_off()
        return _text(figure)


def colour(number: int) -> str:
    """The colour that stands for the page's `--s<number>`; they begin again after the last."""
    return _SERIES[number % COLOURS]


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    return figure


def _draw(axes: Axes, chart: Panel, names: Sequence[str]) -> None:
    for name, (x, y) in chart.lines.items():
        marker = "o" if len(x) <= 12 else ""
        axes.plot(x, y, marker=marker, markersize=3, linewidth=1.3, color=colour(names.index(name)))
    axes.set_title(chart.title)
    if chart.log and any(value > 0 for _, y in chart.lines.values() for value in y):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics
    axes.locator_params(axis="x", nbins=4, integer=True)


def _text(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)  # the page decides the width
    text = text.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    for i, code in enumerate(_SERIES):
        text = text.replace(code, f"var(--s{i})")
    return text
