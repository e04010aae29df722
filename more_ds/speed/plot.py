"""Pictures of what the benchmark has measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from more_ds.speed.rounds import Ratio


def bars(path: Path, title: str, ratios: Mapping[str, Ratio]) -> None:
    """Ratios as horizontal bars with their quartiles; 1 is the reference."""
    figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(ratios)), layout="constrained")
    names = list(ratios)[::-1]
    medians = [ratios[name].median for name in names]
    spread = [
        [ratios[name].median - ratios[name].low for name in names],
        [ratios[name].high - ratios[name].median for name in names],
    ]
    axes.barh(names, medians, xerr=spread, color="#4477aa", ecolor="#333333", capsize=2)
    axes.axvline(1.0, color="#aa3377", linewidth=1)
    axes.set(title=title, xlabel="time over that of the reference, median and quartiles")
    figure.savefig(path)
    plt.close(figure)


def lines(path: Path, title: str, axes_of: Mapping[str, Mapping[str, Ratio]]) -> None:
    """Ratios over what grows, a panel for each."""
    figure, panels = plt.subplots(1, len(axes_of), figsize=(3 * len(axes_of), 3), sharey=True, layout="constrained")
    for panel, (axis, ratios) in zip(panels, axes_of.items(), strict=True):
        medians = [ratio.median for ratio in ratios.values()]
        low = [ratio.median - ratio.low for ratio in ratios.values()]
        high = [ratio.high - ratio.median for ratio in ratios.values()]
        panel.errorbar(list(ratios), medians, yerr=[low, high], color="#4477aa", marker="o", capsize=2)
        panel.axhline(1.0, color="#aa3377", linewidth=1)
        panel.set(xlabel=axis)
    figure.suptitle(title)
    figure.savefig(path)
    plt.close(figure)
