"""The figure of the mode for any two encoders: the images and the map of each encoder, as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps global state
from matplotlib.patches import Rectangle
from PIL import Image

from pivot_hub.demo.encoder_html import layer_name, limits, map_image
from pivot_hub.demo.encoder_service import EncoderView
from pivot_hub.explain.heatmaps import COLOURS

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
    columns = len(images) + len(view.maps)
    figure = Figure(figsize=(3.1 * columns, 3.9), layout="constrained")
    axes = figure.subplots(1, columns)
    for ax, (title, image) in zip(axes, images, strict=False):
        ax.imshow(image)
        ax.set_title(f"{title}\n", fontsize=9)
    finest = view.maps[view.finest]
    _mark(axes[0], finest.position, finest.grid, view.image)
    shown_image = view.image if view.other is None else view.other
    extent = (-0.5, shown_image.width - 0.5, shown_image.height - 0.5, -0.5)
    for ax, info, shown in zip(axes[len(images) :], view.info.encoders, view.maps, strict=True):
        ax.imshow(shown_image.convert("L"), cmap="gray")
        ax.set_title(f"{info.name[:40]}\n{layer_name(info, shown.layer)}", fontsize=9, parse_math=False)
        if shown.values is None:
            ax.text(0.5, 0.5, shown.note, wrap=True, ha="center", va="center", transform=ax.transAxes, fontsize=8)
            continue
        ax.imshow(map_image(view, shown.values, low, high), extent=extent, interpolation="nearest")
        for match in shown.matches:
            _mark(ax, (match.row, match.column), shown.values.shape[:2], shown_image)
    for ax in axes:
        ax.set_axis_off()
    label: dict[str, Any] = {"label": f"{view.state.view}: {TITLES[view.state.view]}"}
    if view.state.view in ("colours", "regions"):
        figure.supxlabel(label["label"], fontsize=9)
    else:
        scale = ScalarMappable(Normalize(low, high), COLOURS[0])
        figure.colorbar(scale, ax=axes[len(images) :], location="bottom", shrink=0.9, aspect=40, **label)
    figure.savefig(file, dpi=130, format="png", bbox_inches="tight", pad_inches=0.1)


def _mark(ax: Any, position: tuple[int, int], grid: tuple[int, ...], image: Image.Image) -> None:
    """Frame a patch."""
    height, width = image.height / grid[0], image.width / grid[1]
    corner = position[1] * width - 0.5, position[0] * height - 0.5
    for colour, line in (("black", 2.6), ("white", 1.3)):
        ax.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))
