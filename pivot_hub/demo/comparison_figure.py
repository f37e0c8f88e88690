"""The figure of a comparison: what the Space shows, as one PNG."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import IO

import numpy as np

from pivot_hub.demo.comparison import Comparison
from pivot_hub.demo.image_row import ImageRow, save_png
from pivot_hub.explain.gradcam import Method
from pivot_hub.explain.heatmaps import COLOURS, DIVERGING, densities, stretch

TITLE_CHARACTERS = 42
MAP_OPACITY = 0.72


def draw_comparison(
    comparison: Comparison, file: Path | IO[bytes], method: Method = "gradcam", colours: str = COLOURS[0]
) -> None:
    """Draw the image, both saliency maps on one scale and their difference, with the colour scales below them.

    Args:
        comparison: Comparison of two MLLMs.
        file: PNG file that the figure is written to.
        method: Method of the saliency maps.
        colours: Colour scale of the maps; the difference has a diverging scale.
    """
    subject, (first, second) = comparison.subject, comparison.results
    image, grey = subject.image, subject.image.convert("L")
    maps = [stretch(m, image.size) for m in densities([result.maps[method] for result in comparison.results])]
    highest = max(float(m.max()) for m in maps) or 1.0
    difference = maps[1] - maps[0]
    reach = float(np.abs(difference).max()) or 1.0
    titles = [
        ("Image", subject.question),
        (first.name, f"says: {first.answer}"),
        (second.name, f"says: {second.answer}"),
        ("Difference", f"{second.name} minus {first.name}"),
    ]
    label = f"{method} of {comparison.explain}, 1 for an average place of the image"
    row = _row()
    with row.emptied():
        for ax, (title, subtitle) in zip(row.axes, titles, strict=True):
            ax.imshow(image if ax is row.axes[0] else grey, cmap="gray")
            ax.title.set_text(f"{_shorten(title)}\n{_shorten(subtitle)}")
            if subject.mask is not None:
                x = np.linspace(0, image.width - 1, subject.mask.shape[1])
                y = np.linspace(0, image.height - 1, subject.mask.shape[0])
                ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
        drawn_maps = [
            ax.imshow(m, cmap=colours, alpha=MAP_OPACITY, vmin=0, vmax=highest)
            for ax, m in zip(row.axes[1:3], maps, strict=True)
        ]
        drawn_difference = row.axes[3].imshow(difference, cmap=DIVERGING, alpha=MAP_OPACITY, vmin=-reach, vmax=reach)
        for scale, drawn, text in zip(row.scales, (drawn_maps[0], drawn_difference), (label, ""), strict=True):
            scale.update_normal(drawn)
            scale.set_label(text)
        drawing = row.draw()
    save_png(drawing, file)


@cache
def _row() -> ImageRow:
    """The figure that all visitors share."""
    places = [(0.005 + 0.25 * i, 0.17, 0.24, 0.7) for i in range(4)]
    return ImageRow((12.5, 4.3), places, [(0.3, 0.12, 0.4, 0.03), (0.78, 0.12, 0.19, 0.03)])


def _shorten(text: str) -> str:
    """Return a text as one line of at most TITLE_CHARACTERS characters."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"
