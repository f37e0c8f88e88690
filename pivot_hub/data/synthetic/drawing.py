"""Rendering of a scene: its image, the visible mask of each object, and the boxes of the masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from pivot_hub.data.synthetic.objects import SceneObject

SUPERSAMPLE = 4  # shapes are drawn this many times larger and then averaged, for smooth edges


@dataclass(frozen=True)
class RenderedScene:
    """A rendered scene: image (H, W, 3) uint8; visible masks (N, H, W) bool; boxes (N, 4) x0 y0 x1 y1 in px."""

    image: Image.Image
    masks: np.ndarray
    boxes: np.ndarray


def render_objects(
    objects: Sequence[SceneObject], depth: Sequence[int], seed: int, image_px: int, tint: float, noise: int
) -> RenderedScene:
    """Draw objects with antialiased edges on a noisy, unevenly lit background.

    Args:
        objects: Objects of the scene; masks and boxes follow their order.
        depth: Drawing order, back to front, as indices into `objects`.
        seed: Seed of background, light and noise.
        image_px: Side of the square image, in px.
        tint: Largest share of a colour channel that the light may lack, 0 to 1.
        noise: Amplitude of the pixel noise, in grey levels of 255.
    """
    rng = np.random.default_rng(seed)
    # A coarse grid of 3 x 3 colours is enlarged, which gives shading that no object explains.
    coarse = rng.integers(40, 216, size=(3, 3, 3), dtype=np.uint8)
    canvas = np.asarray(Image.fromarray(coarse).resize((image_px, image_px), Image.Resampling.BICUBIC), np.int32)
    canvas = (canvas + 2 * int(rng.integers(60, 200))) // 3  # keeps the background greyer than the objects
    masks = np.zeros((len(objects), image_px, image_px), bool)
    for i in depth:
        window, coverage = _coverage(objects[i], image_px)
        behind = canvas[window]
        canvas[window] = behind + (np.asarray(objects[i].rgb) - behind) * coverage[..., None] // 255
        inside = np.zeros((image_px, image_px), bool)
        inside[window] = coverage >= 128
        masks[:, inside] = False
        masks[i] = inside
    # Under coloured light, as in photographs, a colour can be named only by comparison with its surroundings.
    canvas = canvas * (256 - rng.integers(0, int(256 * tint) + 1, size=3)) // 256
    pixel_noise = rng.integers(-noise, noise + 1, size=canvas.shape, dtype=np.int32)
    image = Image.fromarray(np.clip(canvas + pixel_noise, 0, 255).astype(np.uint8))
    return RenderedScene(image, masks, np.stack([_box(mask) for mask in masks]))


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_ARM = 0.36  # half the width of an arm of the cross
POLYGONS: dict[str, list[tuple[float, float]]] = {  # corners in units of the radius, y downwards
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.92, 0.72), (-0.92, 0.72)],
    "star": _star(),
    "cross": [
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ],
}


def _coverage(scene_object: SceneObject, px: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Compute which share of each pixel around an object it covers.

    Returns:
        The rows and columns of the pixels, and their coverage: (h, w) int32 from 0 to 255.
    """
    left = int((scene_object.x - scene_object.radius) * px)
    top = int((scene_object.y - scene_object.radius) * px)
    side = math.ceil(2 * scene_object.radius * px) + 2
    sheet = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    draw = ImageDraw.Draw(sheet)
    x, y = (scene_object.x * px - left) * SUPERSAMPLE, (scene_object.y * px - top) * SUPERSAMPLE
    r = scene_object.radius * px * SUPERSAMPLE
    if scene_object.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if scene_object.shape == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        cos, sin = math.cos(scene_object.angle), math.sin(scene_object.angle)
        polygon = POLYGONS[scene_object.shape]
        draw.polygon([(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in polygon], fill=255)
    coverage = np.asarray(sheet.reduce(SUPERSAMPLE), np.int32)[: px - top, : px - left]
    return (slice(top, top + coverage.shape[0]), slice(left, left + coverage.shape[1])), coverage


def _box(mask: np.ndarray) -> np.ndarray:
    """Compute the tight box of a (H, W) mask: x0, y0, x1, y1 in px, the far edges exclusive."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
