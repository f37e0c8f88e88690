"""The figure of a card: values of both encoders with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed


def draw_intervals(
    rows: Sequence[tuple[str, Mapping[str, tuple[float, float, float]]]], target: Path | IO[bytes], unit: str
) -> None:
    """Draw values with their intervals, a line a measure, those of one measure beside each other.

    Args:
        rows: (label, {name: (value, low, high)}) pairs, the first on top.
        target: of the PNG; the same rows give the same bytes.
        unit: of the values.
    """
    figure = Figure(figsize=(7, 0.8 + 0.42 * len(rows)))
    axes = figure.subplots()
    names = list(rows[0][1])
    for number, name in enumerate(names):
        value, low, high = np.array([row[name] for _, row in rows]).T
        place = np.arange(len(rows)) + 0.22 * (number - (len(names) - 1) / 2)
        spread = np.stack([value - low, high - value])
        mark, colour = "os^D"[number % 4], f"C{number}"
        axes.errorbar(value, place, xerr=spread, label=name, fmt=mark, color=colour, markersize=4, capsize=2)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"{unit}, 95% interval", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110, format="png", metadata={"Software": None})
