"""Maps as colours over a picture: one shared scale, read by colour-blind people too."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

COLOURS = ("viridis", "cividis", "magma")  # even in lightness, and safe for colour-blind people
DIVERGING = "PuOr"  # orange to purple, white where nothing differs: safe as well
FAINTEST = 0.35  # opacity of a map where it is lowest: the picture below stays readable
SIDE_PX = 320  # longer side of a map as it is shown


def densities(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Bring each non-negative map to multiples of its own mean: 1 is an even spread, and means the same in every map.

    A map that is zero everywhere stays so.
    """
    return [m / m.mean() if m.max() > 0 else m for m in maps]


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """How much of two maps falls on the same places: 1 equal shares everywhere, 0 none; grids may differ in size."""
    size = (max(first.shape[1], second.shape[1]), max(first.shape[0], second.shape[0]))
    one, other = densities([stretch(first, size), stretch(second, size)])
    return float(np.minimum(one, other).mean())


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture's maps in px: its own proportions, the longer side SIDE_PX."""
    scale = SIDE_PX / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def stretch(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation of a (H, W) map to a size in px: (height, width) float32."""
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))


def colour(values: np.ndarray, name: str, low: float, high: float) -> Image.Image:
    """Colour (H, W) values on a scale from low to high."""
    span = high - low
    places = (values - low) / span if span > 0 else np.zeros_like(values)
    return Image.fromarray(_table(name)[(255 * places.clip(0, 1)).round().astype(np.uint8)])


def translucent(values: np.ndarray, name: str, low: float, high: float, clear: float) -> Image.Image:
    """Colour a map to lie over a picture: RGBA, at `clear` see-through and the more opaque the farther from it."""
    span = max(high - clear, clear - low)
    far = np.abs(values - clear) / span if span > 0 else np.zeros_like(values)
    made = colour(values, name, low, high)
    made.putalpha(Image.fromarray((255 * (FAINTEST + (1 - FAINTEST) * far.clip(0, 1))).astype(np.uint8)))
    return made


def scale_bar(name: str) -> Image.Image:
    """The scale itself, low to high from left to right, (8, 256) px."""
    return Image.fromarray(np.broadcast_to(_table(name)[None], (8, 256, 3)).copy())


def outline(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The edge of a (px, px) mask as a white line with a dark rim, transparent elsewhere."""
    inside = Image.fromarray((255 * mask).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    inside = inside.filter(ImageFilter.GaussianBlur(0.9 * max(size) / mask.shape[0]))  # no stairs where pixels were few
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


def data_uri(image: Image.Image, form: str = "PNG") -> str:
    """A picture inside a link, as PNG or WEBP: a page shows it without asking any server."""
    file = io.BytesIO()
    image.save(file, form, **({"quality": 90} if form == "WEBP" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


@lru_cache
def _table(name: str) -> np.ndarray:
    """The 256 colours of a map: (256, 3) uint8."""
    return (255 * colormaps[name](np.arange(256))[:, :3]).round().astype(np.uint8)
