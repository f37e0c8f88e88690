"""Encoders that crop: they are given an image so that they see the whole of what the page shows below their maps."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from PIL import Image


class Cropping(Protocol):
    """What is known of models that may crop an image to its middle square."""

    @property
    def crops(self) -> bool: ...


def crop_for_encoders(info: Cropping, image: Image.Image) -> Image.Image:
    """Crop an image to its middle square if one of the encoders does so itself; otherwise return it whole."""
    if not info.crops:
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def crop_scale(image_processor: Any) -> float | None:
    """Return the side to which an image processor resizes the shorter edge, divided by the side of the square it crops.

    Returns:
        1 or more; None for one that does not crop.
    """
    edge = (getattr(image_processor, "size", None) or {}).get("shortest_edge")
    crop = (getattr(image_processor, "crop_size", None) or {}).get("height")
    if not getattr(image_processor, "do_center_crop", False) or not edge or not crop:
        return None
    return float(max(edge / crop, 1.0))


def with_margin(image: Image.Image, scale: float | None) -> Image.Image:
    """Add the margin to a square image that an image processor will cut off.

    DINOv2's, for example, resizes to 256 px and cuts 16 px from each side, so that its map would show less than the
    image that it is laid over. With the margin, the encoder sees the image as if it were resized to 224 px.

    Args:
        image: Image; one that is not square is returned as it is.
        scale: What `crop_scale` returns for the image processor.
    """
    if scale is None or scale == 1 or image.width != image.height:
        return image
    margin = round(image.width * (scale - 1) / 2)
    pixels = np.pad(np.asarray(image), ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    return Image.fromarray(pixels)
