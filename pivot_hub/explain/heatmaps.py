"""Saliency maps as colours over an image, on colour scales that colour-blind people can read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

COLOURS = ("viridis", "cividis", "magma")  # perceptually uniform, and safe for colour-blind people
DIVERGING = "PuOr"  # orange to purple, white for no difference; safe as well
FAINTEST = 0.35  # opacity of a map at its lowest value, which leaves the image below it readable
SIDE_PX = 320  # longer side of a displayed map


def densities(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Divide each non-negative map by its own mean, so that its values can be compared with other maps.

    A map that is 1 everywhere is spread evenly. A map of zeros stays as it is.
    """
    return [m / m.mean() if m.max() > 0 else m for m in maps]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap of two maps, from 0 (no common place) to 1 (equal shares everywhere); grids may differ in size."""
    size = (max(first.shape[1], second.shape[1]), max(first.shape[0], second.shape[0]))
    one, other = densities([stretch(first, size), stretch(second, size)])
    return float(np.minimum(one, other).mean())


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image's displayed maps in pixels: the longer side is SIDE_PX, the proportions are kept."""
    scale = SIDE_PX / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def stretch(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a (H, W) map to a size (width, height) in pixels by bilinear interpolation; (height, width) float32."""
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def colour(values: np.ndarray, name: str, low: float, high: float) -> Image.Image:
    """Colour (H, W) values on the named colour scale from low to high."""
    span = high - low
    places = (values - low) / span if span > 0 else np.zeros_like(values)
    return Image.fromarray(_table(name)[(255 * places.clip(0, 1)).round().astype(np.uint8)])


def translucent(values: np.ndarray, name: str, low: float, high: float, clear: float) -> Image.Image:
    """Colour a map as a transparent RGBA overlay.

    Args:
        values: Values (H, W) of the map.
        name: Name of the colour scale.
        low: Value at the lower end of the scale.
        high: Value at the upper end of the scale.
        clear: Value with the lowest opacity; opacity increases with the distance from it.
    """
    span = max(high - clear, clear - low)
    distance = np.abs(values - clear) / span if span > 0 else np.zeros_like(values)
    overlay = colour(values, name, low, high)
    overlay.putalpha(Image.fromarray((255 * (FAINTEST + (1 - FAINTEST) * distance.clip(0, 1))).astype(np.uint8)))
    return overlay


def scale_bar(name: str) -> Image.Image:
    """Image of a colour scale, low to high from left to right, 256 pixels wide and 8 high."""
    return Image.fromarray(np.broadcast_to(_table(name)[None], (8, 256, 3)).copy())


def outline(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Draw the edge of a (px, px) mask as a white line with a dark rim on a transparent image of a size in pixels."""
    inside = Image.fromarray((255 * mask).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    inside = inside.filter(
        ImageFilter.GaussianBlur(0.9 * max(size) / mask.shape[0])
    )  # no jagged edges for a coarse mask
    inside = inside.point(lambda v: 255 * (v >= 128))
    rings = [
        np.asarray(inside.filter(ImageFilter.MaxFilter(2 * w + 1)))
        > np.asarray(inside.filter(ImageFilter.MinFilter(3)))
        for w in (2, 1)
    ]
    pixels = np.zeros((*rings[0].shape, 4), np.uint8)
    pixels[rings[0]] = (0, 0, 0, 200)
    pixels[rings[1]] = (255, 255, 255, 255)
    return Image.fromarray(pixels)


@lru_cache
def _table(name: str) -> np.ndarray:
    """The 256 colours of a colour scale: (256, 3) uint8."""
    return (255 * colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8)
