"""A figure of images in a row with colour scales below them, whose axes are made once and drawn on many times."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure  # not pyplot, which needs a display and keeps global state
from PIL import Image

DPI = 100
Place = tuple[float, float, float, float]  # left, bottom, width and height as shares of the figure


class ImageRow:
    """A figure whose axes are at fixed places: making them, or computing their places, takes longer than drawing.

    Attributes:
        figure: The figure.
        axes: Axes of the images, without ticks; their titles do not parse mathematics, which a visitor may type.
        scales: Colour scales, see `Colorbar.update_normal`.
    """

    def __init__(self, size: tuple[float, float], images: Sequence[Place], scales: Sequence[Place]) -> None:
        """Make the axes.

        Args:
            size: Width and height in inches of DPI pixels.
            images: Places of the images.
            scales: Places of the colour scales.
        """
        self.figure = Figure(figsize=size, dpi=DPI)
        self._canvas = FigureCanvasAgg(self.figure)
        self.axes: list[Any] = [self.figure.add_axes(place) for place in images]
        for ax in self.axes:
            ax.set_axis_off()
            ax.set_title("", fontsize=9, parse_math=False, y=1)  # a height that is given need not be computed
        self.scales: list[Any] = [
            self.figure.colorbar(ScalarMappable(), cax=self.figure.add_axes(place), orientation="horizontal")
            for place in scales
        ]
        self._lock = threading.Lock()

    @contextmanager
    def emptied(self) -> Iterator[None]:
        """Lock the figure for this thread, with nothing on its axes."""
        with self._lock:
            for ax in self.axes:
                for former in (*ax.images, *ax.collections, *ax.patches, *ax.texts):
                    former.remove()
                ax.ignore_existing_data_limits = True  # the former image may have been larger
            yield

    def draw(self) -> Image.Image:
        """Draw what is on the axes, within `emptied`."""
        self._canvas.draw()
        return Image.fromarray(np.array(self._canvas.buffer_rgba()))


def save_png(drawn: Image.Image, file: Any) -> None:
    """Write a drawing as a PNG file; its even areas are small at the lowest level of compression."""
    drawn.save(file, "PNG", dpi=(DPI, DPI), compress_level=1)
