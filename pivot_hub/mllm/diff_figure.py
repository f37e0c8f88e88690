"""Figure of the difference of two vision towers: relative change of each block, and CKA of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pivot_hub.mllm.diff import TowerDiff

BLUE, GREY = "#33608c", "#888888"


def draw_diff(diff: TowerDiff, path: Path) -> None:
    """Draw the relative change of each part of a tower, and below it, where images were given, CKA of each layer.

    Args:
        diff: The difference.
        path: Path that the PNG is written to.
    """
    rows = 1 if diff.features is None else 2
    width = max(6.4, 2 + 0.2 * len(diff.parts))
    figure = Figure(figsize=(width, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    _draw_weights(axes[0], diff)
    if diff.features is not None:
        _draw_features(axes[1], diff)
    figure.suptitle(f"Vision tower of {diff.b['name']} compared with {diff.a['name']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_weights(ax: Any, diff: TowerDiff) -> None:
    """Draw a point for each part on a logarithmic scale; equal parts have hollow markers on the axis."""
    moved = [(x, part.relative_change) for x, part in enumerate(diff.parts) if part.changed]
    equal = [x for x, part in enumerate(diff.parts) if not part.changed]
    if moved:
        values = [value for _, value in moved]
        bottom, top = min(values) / 3, max(values) * 2
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 100 * bottom else (1,)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:.0e}"))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(bottom, top)
        ax.vlines([x for x, _ in moved], bottom, values, color=BLUE, linewidth=1.2, alpha=0.4)
        ax.plot([x for x, _ in moved], values, "o", color=BLUE, markersize=4.5, label="differs")
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    else:
        bottom = 0.0
        ax.set_ylim(0, 1)
        ax.set_yticks([0])
        ax.text(0.5, 0.5, "all tensors are equal", transform=ax.transAxes, ha="center", fontsize=9, color=GREY)
    style = {"color": GREY, "markerfacecolor": "white", "markersize": 4.5, "clip_on": False, "zorder": 3}
    if equal:
        ax.plot(equal, [bottom] * len(equal), "o", label="equal bit for bit", **style)
    if diff.above:
        places = [x for x, part in enumerate(diff.parts) if part.number in diff.above]
        ax.axvspan(min(places) - 0.5, max(places) + 0.5, color="#eeeeee", zorder=0, label="above the feature layer")
    if moved:
        ax.legend(fontsize=7.5, loc="best", framealpha=0.9)
    _label_parts(ax, diff)
    ax.set_ylabel("relative change of each block's weights", fontsize=8)
    ax.tick_params(labelsize=7.5)


def _label_parts(ax: Any, diff: TowerDiff) -> None:
    """Label blocks by their numbers, and the other parts by their names."""
    blocks = len(diff.blocks)
    step = max(1, round(blocks / 28))
    labels = {
        x: part.name if part.number is None else str(part.number)
        for x, part in enumerate(diff.parts)
        if part.number is None or part.number % step == 0
    }
    ax.set_xticks(list(labels), list(labels.values()))
    for label in ax.get_xticklabels():
        if not label.get_text().isdigit():
            label.set_rotation(30)
            label.set_horizontalalignment("right")
    ax.set_xlim(-0.7, len(diff.parts) - 0.3)


def _draw_features(ax: Any, diff: TowerDiff) -> None:
    """Draw CKA and the relative distance of each layer's features."""
    assert diff.features is not None
    layers = diff.features.layers
    names = [str(layer.layer) for layer in layers]
    ax.plot(range(len(layers)), [row.cka for row in layers], "o-", color=BLUE, markersize=4, linewidth=1.2)
    lowest = min((row.cka for row in layers if row.cka is not None), default=1.0)
    margin = max(1 - lowest, 1e-4)  # smaller differences are drawn as none
    ax.set_ylim(1 - 1.1 * margin, 1 + 0.1 * margin)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.set_ylabel("linear CKA", fontsize=8)
    ax.set_xlabel(f"hidden state (0 is the embeddings), on {diff.features.images} images", fontsize=8)
    step = max(1, round(len(layers) / 28))
    shown = [x for x in range(len(layers)) if x % step == 0 or not names[x].isdigit()]
    ax.set_xticks(shown, ["last" if names[x] == "last_hidden_state" else names[x] for x in shown])
    ax.set_xlim(-0.7, len(layers) - 0.3)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.tick_params(labelsize=7.5)
