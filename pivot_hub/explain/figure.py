"""Figures of gradient maps over the image they are of, on one colour scale that colour-blind people can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot: no display and no global state are needed
from PIL import Image

from pivot_hub.explain.gradcam import enlarge
from pivot_hub.explain.heatmaps import COLOURS


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


def _share(grid: np.ndarray) -> np.ndarray:
    total = grid.sum()
    return 100 * grid / total if total > 0 else grid
