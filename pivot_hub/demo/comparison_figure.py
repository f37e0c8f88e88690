"""The figure of a comparison: what the Space shows, as one PNG."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps global state
from PIL import Image

from pivot_hub.demo.comparison import Comparison
from pivot_hub.explain.gradcam import Method
from pivot_hub.explain.heatmaps import COLOURS, DIVERGING, densities, stretch

TITLE_CHARACTERS = 42
MAP_OPACITY = 0.72
DPI = 100


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
    pixels = _canvas().draw(comparison, method, colours)
    Image.fromarray(pixels).save(file, "PNG", dpi=(DPI, DPI), compress_level=1)


class ComparisonCanvas:
    """A figure whose axes are made once: making them takes as long as drawing them."""

    def __init__(self) -> None:
        """Make the axes of the four images and of the two colour scales, at fixed places."""
        figure = Figure(figsize=(12.5, 4.3), dpi=DPI)
        self._canvas = FigureCanvasAgg(figure)
        self._axes = [figure.add_axes((0.005 + 0.25 * i, 0.17, 0.24, 0.7)) for i in range(4)]
        for ax in self._axes:
            ax.set_axis_off()
            ax.set_title("", fontsize=9, parse_math=False, y=1)  # a height that is given need not be computed
        self._scales = [
            figure.colorbar(ScalarMappable(), cax=figure.add_axes((left, 0.12, width, 0.03)), orientation="horizontal")
            for left, width in ((0.3, 0.4), (0.78, 0.19))
        ]
        self._lock = threading.Lock()

    def draw(self, comparison: Comparison, method: Method, colours: str) -> np.ndarray:
        """Draw a comparison, see `draw_comparison`.

        Returns:
            Pixels (height, width, 4) in uint8.
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
        with self._lock:
            for ax, (title, subtitle) in zip(self._axes, titles, strict=True):
                for former in (*ax.images, *ax.collections):
                    former.remove()
                ax.ignore_existing_data_limits = True  # the former image may have been larger
                ax.imshow(image if ax is self._axes[0] else grey, cmap="gray")
                ax.title.set_text(f"{_shorten(title)}\n{_shorten(subtitle)}")
                if subject.mask is not None:
                    x = np.linspace(0, image.width - 1, subject.mask.shape[1])
                    y = np.linspace(0, image.height - 1, subject.mask.shape[0])
                    ax.contour(x, y, subject.mask, levels=[0.5], colors="white", linewidths=1.2)
            drawn_maps = [
                ax.imshow(m, cmap=colours, alpha=MAP_OPACITY, vmin=0, vmax=highest)
                for ax, m in zip(self._axes[1:3], maps, strict=True)
            ]
            drawn_difference = self._axes[3].imshow(
                difference, cmap=DIVERGING, alpha=MAP_OPACITY, vmin=-reach, vmax=reach
            )
            for scale, drawn, text in zip(self._scales, (drawn_maps[0], drawn_difference), (label, ""), strict=True):
                scale.update_normal(drawn)
                scale.set_label(text)
            self._canvas.draw()
            return np.array(self._canvas.buffer_rgba())


@cache
def _canvas() -> ComparisonCanvas:
    """The canvas that all visitors share."""
    return ComparisonCanvas()


def _shorten(text: str) -> str:
    """Return a text as one line of at most TITLE_CHARACTERS characters."""
    line = " ".join(text.split())
    return line if len(line) <= TITLE_CHARACTERS else f"{line[: TITLE_CHARACTERS - 1]}…"
