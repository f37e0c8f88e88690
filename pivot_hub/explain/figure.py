"""Figures that overlay saliency maps on their image, with colour scales that colour-blind people can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed
from PIL import Image

from pivot_hub.explain.gradcam import enlarge
from pivot_hub.explain.heatmaps import COLOURS


def draw_maps(image: Image.Image, maps: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Draw an image and its saliency maps side by side.

    Args:
        image: Image of the maps.
        maps: Title and (H, W) values of each map.
        path: Path that the PNG is written to.
    """
    draw_rows([("", image, None, maps)], path)


def draw_rows(
    rows: Sequence[tuple[str, Image.Image, np.ndarray | None, Sequence[tuple[str, np.ndarray]]]],
    path: Path,
    heading: str = "",
    rows_per_scale: int = 1,
) -> None:
    """Draw one row for each scene: the image with its target outlined, then each saliency map as an overlay.

    Maps are divided by their own sum and all maps of a row are drawn on one colour scale, so that a colour means the
    same share of the gradient in each of them.

    Args:
        rows: Caption, image, (height, width) target mask or None, and title and (H, W) values of each map of a row.
        path: Path that the PNG is written to.
        heading: Heading of the figure.
        rows_per_scale: Number of neighbouring rows that share a colour scale. If it is more than one, a colour bar
            shows the values.
    """
    columns = 1 + max(len(maps) for *_, maps in rows)
    figure = Figure(figsize=(2.4 * columns, 2.65 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    shares = [[_share(enlarge(m, (image.height, image.width))) for _, m in maps] for _, image, _, maps in rows]
    for number, (axes, (caption, image, mask, maps)) in enumerate(zip(grid, rows, strict=True)):
        first = number - number % rows_per_scale
        highest = max(share.max() for row in shares[first : first + rows_per_scale] for share in row)
        axes[0].imshow(image)
        axes[0].set_title(caption, fontsize=7.5, wrap=True)
        for ax, (title, _), share in zip(axes[1:], maps, shares[number], strict=False):
            ax.imshow(image.convert("L"), cmap="gray")
            overlay = ax.imshow(share, cmap=COLOURS[0], alpha=0.72, vmin=0, vmax=highest)
            ax.set_title(title, fontsize=7.5)
        for ax in axes:
            if mask is not None:
                ax.contour(mask, levels=[0.5], colors="white", linewidths=1.2)
            ax.set_axis_off()
        if rows_per_scale > 1 and number == first:
            bar = figure.colorbar(overlay, ax=list(grid[first : first + rows_per_scale].flat), fraction=0.02, pad=0.01)
            bar.set_label("share of the map, in percent per pixel", fontsize=7.5)
            bar.ax.tick_params(labelsize=7)
    figure.suptitle(heading, fontsize=9, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _share(grid: np.ndarray) -> np.ndarray:
    """Divide a map by its sum, in percent; a map of zeros stays as it is."""
    total = grid.sum()
    return 100 * grid / total if total > 0 else grid
