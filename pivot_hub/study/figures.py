"""The figures of a report."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pivot_hub.study.comparisons import SHOWN, FrontierPoint, Points, Row
from pivot_hub.study.design import Curve, FactorSpec, Frontier, Study

MARKERS = ("o", "s", "^")  # of the first eight lines, of the next eight, and so on
COLOURS = ("#33608c", "#c2622d", "#5b8a3a", "#7d4f96", "#8c7a33", "#3d8a86", "#a23b56", "#666666")


def draw_curves(curve: Curve, points: Points, path: Path) -> None:
    """Draw a panel for each measure, with a line for each method and bars of 95% over seeds."""
    from matplotlib.figure import Figure  # pyplot would need a display and global state

    columns = min(3, len(points))
    rows = math.ceil(len(points) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (measure, lines) in zip(panels, points.items(), strict=False):
        for colour, (line, line_points) in zip(COLOURS, lines.items(), strict=False):
            x, y, half = np.array(line_points).T
            ax.errorbar(x, y, half, color=colour, label=line, marker="o", markersize=3, linewidth=1.2, capsize=2)
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{v:g}" for v in x])
        ax.minorticks_off()
        ax.set_title(measure, fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_xlabel(curve.axis, fontsize=7)
    for ax in panels[len(points) :]:
        ax.set_visible(False)
    figure.axes[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def draw_frontier(frontier: Frontier, lines: Mapping[str, Sequence[FrontierPoint]], baseline: str, path: Path) -> None:
    """Draw the gain of every run against how far it moved, a line for each method and bands of 95% over seeds.

    Args:
        frontier: Plane that is drawn.
        lines: Points of each line.
        baseline: Label of the baseline.
        path: PNG file that is written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7.6, 4.6))
    ax = figure.subplots()
    ax.axhline(0, color="#888888", linewidth=0.8)
    styles = itertools.cycle(itertools.product(MARKERS, COLOURS))
    for (line, points), (marker, colour) in zip(lines.items(), styles, strict=False):
        x, y, half = np.array([(point.x, point.y, point.half) for point in points]).T
        ax.fill_between(x, y - half, y + half, color=colour, alpha=0.12, linewidth=0)
        ax.errorbar(x, y, half, color=colour, label=line, marker=marker, markersize=4, linewidth=1.3, capsize=2)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.minorticks_off()
    ax.set_xlabel(f"{frontier.x}, percent", fontsize=8)
    ax.set_ylabel(f"{frontier.y}: points above {baseline}", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def draw_forest(study: Study, factor: FactorSpec, rows: Sequence[Row], path: Path) -> None:
    """Draw the differences of a factor with their intervals; the markers of those that are shown are filled.

    One pair of runs has one panel, with a line for each measure. Several pairs have a panel for each measure, with a
    line for each pair.
    """
    from matplotlib.figure import Figure

    compared = {(row.first, row.other) for row in rows}
    pairs = [pair for pair in factor.pairs if pair in compared]
    labels = {name: run.label for name, run in study.spec.runs.items()}
    firsts = {first for first, _ in pairs}
    same_first = len(firsts) == 1
    names = [labels[other] if same_first else f"{labels[other]} - {labels[first]}" for first, other in pairs]
    if len(pairs) == 1:
        panels = {"": list(enumerate(rows))}
        lines = [row.measure for row in rows]
        figure_width = 6.5
    else:
        panels = {row.measure: [] for row in rows}
        for row in rows:
            panels[row.measure].append((pairs.index((row.first, row.other)), row))
        lines = names
        figure_width = 1.6 + 2.3 * min(4, len(panels))
    columns = min(4, len(panels))
    panel_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(figure_width, panel_rows * (0.75 + 0.22 * len(lines)) + 0.3))
    grid = list(figure.subplots(panel_rows, columns, squeeze=False, sharey=True).flat)
    for ax, (title, panel) in zip(grid, panels.items(), strict=False):
        _draw_panel(ax, title, panel, lines)
    for ax in grid[len(panels) :]:
        ax.set_visible(False)
    against = f" against {labels[next(iter(firsts))]}," if same_first else ","
    if len(pairs) == 1:
        against = f" {names[0]}{against}"
    figure.text(0.01, 0.005, f"points{against} 95%; filled: shown after Holm's correction", fontsize=7)
    _save(figure, path)


def _draw_panel(ax: Any, title: str, panel: Sequence[tuple[int, Row]], lines: Sequence[str]) -> None:
    """Draw one panel of a forest plot.

    Args:
        ax: Axes of the panel.
        title: Title of the panel.
        panel: Line number and comparison of each difference.
        lines: Names of all lines, from top to bottom.
    """
    for y, row in sorted(panel, key=lambda entry: entry[0]):
        fill = COLOURS[0] if row.verdict == SHOWN else "white"
        ax.plot((row.low, row.high), (y, y), color=COLOURS[0], linewidth=1.5)
        ax.plot(row.difference, y, "o", color=COLOURS[0], markersize=5, markerfacecolor=fill)
    ax.axvline(0, color="#888888", linewidth=0.8)
    ax.set_title(title, fontsize=8)
    ax.tick_params(labelsize=7)
    ax.set_yticks(range(len(lines)), lines)
    ax.set_ylim(len(lines) - 0.5, -0.5)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})  # matplotlib's version would change the bytes
