"""The figure of the mode for any two encoders: the images and the map of each encoder, as one PNG."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path
from typing import IO, Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from pivot_hub.demo.encoder_html import layer_name, limits, map_image
from pivot_hub.demo.encoder_service import EncoderView
from pivot_hub.demo.image_row import ImageRow, save_png
from pivot_hub.explain.heatmaps import COLOURS

NOTE_CHARACTERS = 38  # of a line of the note in place of a map
TITLES = {
    "similarity": "similarity with the marked patch",
    "matching": "similarity with the marked patch",
    "colours": "principal components as colours",
    "regions": "regions of similar features",
    "attention": "attention of CLS, relative to its highest",
    "drift": "drift, 1 - cosine",
}


def draw_encoders(view: EncoderView, file: Path | IO[bytes]) -> None:
    """Draw the image, the second image if patches are matched in it, and the map of each encoder.

    Args:
        view: Maps of the encoders.
        file: PNG file that the figure is written to.
    """
    images = [("Image", view.image), *([("Second image", view.other)] if view.other is not None else [])]
    low, high = limits(view)
    row = _row(len(images) + len(view.maps))
    finest = view.maps[view.finest]
    shown_image = view.image if view.other is None else view.other
    grey = shown_image.convert("L")
    extent = (-0.5, shown_image.width - 0.5, shown_image.height - 0.5, -0.5)
    label = f"{view.state.view}: {TITLES[view.state.view]}"
    has_scale = view.state.view not in ("colours", "regions")
    with row.emptied():
        for ax, (title, image) in zip(row.axes, images, strict=False):
            ax.imshow(image)
            ax.title.set_text(f"{title}\n")
        _mark(row.axes[0], finest.position, finest.grid, view.image)
        for ax, info, shown in zip(row.axes[len(images) :], view.info.encoders, view.maps, strict=True):
            ax.imshow(grey, cmap="gray")
            ax.title.set_text(f"{info.name[:40]}\n{layer_name(info, shown.layer)}")
            if shown.values is None:
                ax.imshow([[1.0]], cmap="gray", vmin=0, vmax=1, alpha=0.75, extent=extent)
                note = textwrap.fill(shown.note, NOTE_CHARACTERS)
                ax.text(0.5, 0.5, note, ha="center", va="center", transform=ax.transAxes, fontsize=8, parse_math=False)
                continue
            ax.imshow(map_image(view, shown.values, low, high), extent=extent, interpolation="nearest")
            for match in shown.matches:
                _mark(ax, (match.row, match.column), shown.values.shape[:2], shown_image)
        (scale,) = row.scales
        scale.ax.set_visible(has_scale)
        scale.update_normal(ScalarMappable(Normalize(low, high), COLOURS[0]))
        scale.set_label(label)
        row.figure.texts[0].set_text("" if has_scale else label)
        drawing = row.draw()
    save_png(drawing, file)


@cache
def _row(columns: int) -> ImageRow:
    """The figure of so many images and maps that all visitors share, with a line of text for views without a scale."""
    width = 1 / columns
    row = ImageRow(
        (3.1 * columns, 4.2),
        [((i + 0.02) * width, 0.17, 0.96 * width, 0.71) for i in range(columns)],
        [(width, 0.12, 1 - 1.5 * width, 0.03)],
    )
    row.figure.text(0.5, 0.06, "", ha="center", fontsize=9)
    return row


def _mark(ax: Any, position: tuple[int, int], grid: tuple[int, ...], image: Image.Image) -> None:
    """Frame a patch."""
    height, width = image.height / grid[0], image.width / grid[1]
    corner = position[1] * width - 0.5, position[0] * height - 0.5
    for colour, line in (("black", 2.6), ("white", 1.3)):
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))
