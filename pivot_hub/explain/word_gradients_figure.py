"""Figure of the words that learn from the image: the norm of each kind of words, by loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed
from matplotlib.ticker import LogLocator, NullLocator

from pivot_hub.explain.heatmaps import COLOURS
from pivot_hub.explain.word_gradients import WordGradient
from pivot_hub.explain.word_kinds import VISUAL


def draw_word_gradients(results: Sequence[WordGradient], path: Path, heading: str = "") -> None:
    """Draw the relative norm of each kind of words as bars, and below it the norm on a logarithmic scale as points.

    Args:
        results: The results of any number of losses.
        path: Path that the PNG is written to.
        heading: Heading of the figure.
    """
    losses = list(dict.fromkeys(r.loss for r in results))
    kinds = list(dict.fromkeys(r.kind for r in results))
    slot = 1 / (len(losses) + 1)  # width of a bar, with room for one between the kinds
    figure = Figure(figsize=(max(6.4, 1 + 0.22 * len(kinds) / slot), 5.6), layout="constrained")
    relative, norm = figure.subplots(2, 1, sharex=True)
    for i, colour in enumerate(colormaps[COLOURS[0]](np.linspace(0.1, 0.8, len(losses)))):
        of_loss = [r for r in results if r.loss == losses[i]]
        places = [kinds.index(r.kind) + slot * (i - (len(losses) - 1) / 2) for r in of_loss]
        heights, errors = _values([(r.relative, r.relative_ci95) for r in of_loss])
        relative.bar(places, heights, width=0.9 * slot, color=colour, label=losses[i])
        relative.errorbar(places, heights, errors, fmt="none", ecolor="#333333", elinewidth=1, capsize=2)
        heights, errors = _values([(r.norm, r.norm_ci95) for r in of_loss])
        norm.errorbar(places, heights, errors, fmt="o", color=colour, markersize=4, elinewidth=1, capsize=2)
    relative.axhline(100, color="#888888", linewidth=0.8)
    relative.set_ylabel("relative norm\n100: mean token of the answer", fontsize=8)
    relative.set_ylim(bottom=0)
    relative.legend(fontsize=8, frameon=False)
    norm.set_ylabel("norm of a token", fontsize=8)
    if any(r.norm > 0 for r in results):
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        norm.yaxis.set_major_formatter("{x:g}")
        norm.yaxis.set_minor_locator(NullLocator())
    norm.set_xticks(range(len(kinds)), [f"{k}\n(all but other)" if k == VISUAL else k for k in kinds], fontsize=8)
    for ax in (relative, norm):
        if kinds[0] == VISUAL:
            ax.axvspan(-0.5, 0.5, color="#f2f2f2", zorder=0)
        ax.set_xlim(-0.5, len(kinds) - 0.5)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(axis="y", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(heading, fontsize=9, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _values(measured: Sequence[tuple[float | None, tuple[float, float] | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Return values (kinds,) and how far their intervals reach below and above them (2, kinds); NaN for None.

    The interval of a few rows need not hold the value itself.
    """
    values = np.array([np.nan if value is None else value for value, _ in measured])
    bounds = np.array([(np.nan, np.nan) if ci95 is None else ci95 for _, ci95 in measured]).T
    return values, np.maximum([values - bounds[0], bounds[1] - values], 0)
