"""The figure of a card: the results of both encoders with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed


def draw_intervals(
    rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], target: Path | IO[bytes], unit: str
) -> None:
    """Draw values with their intervals, one row for each measure, with the encoders' values beside each other.

    Args:
        rows: Pairs (label, {name: (value, low, high)}), the first drawn on top.
        target: File or buffer that the PNG is written to; the same rows give the same bytes.
        unit: Unit of the values, for the label of the axis.
    """
    figure = Figure(figsize=(7, 0.8 + 0.42 * len(rows)))
    axes = figure.subplots()
    names = list(rows[0][1])
    for number, name in enumerate(names):
        value, low, high = np.array([row[name] for _, row in rows]).T
        heights = np.arange(len(rows)) + 0.22 * (number - (len(names) - 1) / 2)
        spread = np.stack([value - low, high - value])
        marker, colour = "os^D"[number % 4], f"C{number}"
        axes.errorbar(value, heights, xerr=spread, label=name, fmt=marker, color=colour, markersize=4, capsize=2)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{unit}, 95% interval", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110, format="png", metadata={"Software": None})
