"""Figures: gradient maps over the image they are of, on one colour scale that colour-blind people can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed
from PIL import Image

from pivot_hub.comparison import Comparison
from pivot_hub.gradcam import Method, enlarge
from pivot_hub.overlay import COLOURS, DIVERGING, densities, stretch


def draw_maps(image: Image.Image, maps: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Draw an image and its maps side by side.

    Args:
        image: square.
        maps: (title, (H, W) map) pairs.
        path: of the PNG.
    """
    draw_rows([("", image, None, maps)], path)


def draw_rows(
    rows: Sequence[tuple[str, Image.Image, np.ndarray | None, Sequence[tuple[str, np.ndarray]]]],
    path: Path,
    heading: str = "",
    rows_a_scale: int = 1,
) -> None:
    """Draw one row a scene: the image with its target outlined, then each map as an overlay.

    Maps are brought to a share of their own sum, then drawn on one scale for each row, so that a colour means the same
    share of the gradient in every map of the row.

    Args:
        rows: (caption, image, (px, px) target mask or None, (title, (H, W) map) pairs).
        path: of the PNG.
        heading: above all.
        rows_a_scale: how many neighbouring rows share a scale; more than one get a bar that tells its values.
    """
    columns = 1 + max(len(maps) for *_, maps in rows)
    figure = Figure(figsize=(2.4 * columns, 2.65 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    shares = [[_share(enlarge(m, image.width)) for _, m in maps] for _, image, _, maps in rows]
    for number, (axes, (caption, image, mask, maps)) in enumerate(zip(grid, rows, strict=True)):
        first = number - number % rows_a_scale
        top = max(s.max() for row in shares[first : first + rows_a_scale] for s in row)
        axes[0].imshow(image)
        axes[0].set_title(caption, fontsize=7.5, wrap=True)
        for ax, (title, _), share in zip(axes[1:], maps, shares[number], strict=False):
            ax.imshow(image.convert("L"), cmap="gray")
            drawn = ax.imshow(share, cmap=COLOURS[0], alpha=0.72, vmin=0, vmax=top)
            ax.set_title(title, fontsize=7.5)
        for ax in axes:
            if mask is not None:
                ax.contour(mask, levels=[0.5], colors="white", linewidths=1.2)
            ax.set_axis_off()
        if rows_a_scale > 1 and number == first:
            bar = figure.colorbar(drawn, ax=list(grid[first : first + rows_a_scale].flat), fraction=0.02, pad=0.01)
            bar.set_label("share of the map, in percent a pixel", fontsize=7.5)
            bar.ax.tick_params(labelsize=7)
    figure.suptitle(heading, fontsize=9, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_comparison(
    comparison: Comparison, file: Path | IO[bytes], method: Method = "gradcam", colours: str = COLOURS[0]
) -> None:
    """Draw what the Space shows: the picture, both maps on one scale, their difference, with the scales beside them.

    Args:
        comparison: of two MLLMs.
        file: the PNG.
        method: whose maps.
        colours: of the maps; the difference has its own.
    """
    subject, views = comparison.subject, (comparison.first, comparison.second)
    image = subject.image
    large = [stretch(m, image.size) for m in densities([v.maps[method] for v in views])]
    top = max(float(m.max()) for m in large) or 1.0
    difference = large[1] - large[0]
    reach = float(np.abs(difference).max()) or 1.0
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 4)
    said = [f"says: {_plain(v.answer)}" for v in views]
    for ax, (title, text) in zip(
        axes,
        [
            ("The picture", _plain(subject.question)),
            (views[0].name, said[0]),
            (views[1].name, said[1]),
            ("Difference", f"{views[1].name} minus {views[0].name}"),
        ],
        strict=True,
    ):
        ax.imshow(image if ax is axes[0] else image.convert("L"), cmap="gray")
        ax.set_title(f"{_plain(title)}\n{text}", fontsize=9, parse_math=False)
        if subject.mask is not None:
            x, y = (
                np.linspace(0, image.width - 1, subject.mask.shape[1]),
                np.linspace(0, image.height - 1, subject.mask.shape[0]),
            )
            ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
        ax.set_axis_off()
    shown = [ax.imshow(m, cmap=colours, alpha=0.72, vmin=0, vmax=top) for ax, m in zip(axes[1:], large, strict=False)]
    apart = axes[3].imshow(difference, cmap=DIVERGING, alpha=0.72, vmin=-reach, vmax=reach)
    scale: Any = {"location": "bottom", "shrink": 0.9, "aspect": 40}
    figure.colorbar(shown[0], ax=axes[1:3], label=f"{method} of {comparison.explain}, times an even spread", **scale)
    figure.colorbar(apart, ax=axes[3], **scale)
    figure.savefig(file, dpi=130, format="png")


def _plain(text: str) -> str:
    """One line of at most 48 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:47]}…"


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


def _share(grid: np.ndarray) -> np.ndarray:
    total = grid.sum()
    return 100 * grid / total if total > 0 else grid
