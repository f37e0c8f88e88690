"""Figures: gradient maps over the image they are of, on one colour scale that colour-blind people can read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

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
    rows: Sequence[tuple[str, Image.Image, np.ndarray | None, Sequence[tuple[str, np.ndarray]]]], path: Path
) -> None:
    """Draw one row a scene: the image with its target outlined, then each map as an overlay.

    Maps of one row are brought to multiples of their own mean, then drawn on one scale, so that a colour means the
    same in every map of the row.

    Args:
        rows: (caption, image, (px, px) target mask or None, (title, (H, W) map) pairs).
        path: of the PNG.
    """
    columns = 1 + max(len(maps) for *_, maps in rows)
    figure = Figure(figsize=(2.4 * columns, 2.75 * len(rows)))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (caption, image, mask, maps) in zip(grid, rows, strict=True):
        spread = densities([enlarge(m, image.width) for _, m in maps])
        top = max(s.max() for s in spread)
        axes[0].imshow(image)
        axes[0].set_title(caption, fontsize=7.5, wrap=True)
        for ax, (title, _), large in zip(axes[1:], maps, spread, strict=False):
            ax.imshow(image.convert("L"), cmap="gray")
            ax.imshow(large, cmap=COLOURS[0], alpha=0.72, vmin=0, vmax=top)
            ax.set_title(title, fontsize=7.5)
        for ax in axes:
            if mask is not None:
                ax.contour(mask, levels=[0.5], colors="white", linewidths=1.2)
            ax.set_axis_off()
    figure.tight_layout()
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
            x, y = np.linspace(0, image.width - 1, subject.mask.shape[1]), np.linspace(
                0, image.height - 1, subject.mask.shape[0]
            )
            ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
        ax.set_axis_off()
    shown = [ax.imshow(m, cmap=colours, alpha=0.72, vmin=0, vmax=top) for ax, m in zip(axes[1:], large, strict=False)]
    apart = axes[3].imshow(difference, cmap=DIVERGING, alpha=0.72, vmin=-reach, vmax=reach)
    scale = {"location": "bottom", "shrink": 0.9, "aspect": 40}
    figure.colorbar(shown[0], ax=axes[1:3], label=f"{method} of {comparison.explain}, times an even spread", **scale)
    figure.colorbar(apart, ax=axes[3], **scale)
    figure.savefig(file, dpi=130, format="png")


def _plain(text: str) -> str:
    """One line of at most 48 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:47]}…"
