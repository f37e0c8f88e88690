"""Reward: the answer's point lies on the right object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pivot_hub.training.rewards.completion import Completion, answers_with
from pivot_hub.training.rewards.coordinates import POINT, in_pixels, is_located, read_numbers, scales


def pointing(
    completions: Sequence[Completion],
    *,
    coordinates: str | Sequence[str],
    boxes: Sequence[Sequence[Sequence[float]] | None] | None = None,
    masks: Sequence[Any] | None = None,
    image_size: Sequence[Sequence[int] | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reward a point on the object, as the pointing game does (Zhang et al. 2016): 1 inside a mask or box, otherwise 0.

    The answer's point is its first pair of numbers, `[x, y]` or `(x, y)`, with or without JSON around it, such as
    `{"point_2d": [x, y]}`. An answer without a point gets 0.

    Args:
        completions: The completions; of one with `<answer>` tags, what they enclose is the answer.
        coordinates: What the answer's numbers are: `pixels` of the image as the row has it, `0..1000` or `0..1` for
            shares of its sides; for all rows, or a column with that of each row.
        boxes: For each row, boxes [x1, y1, x2, y2] in pixels; a point in any of them counts.
        masks: For each row, the object's pixels, (H, W) bool, which take precedence over its boxes.
        image_size: For each row, [width, height] of its image, which all scales but `pixels` need.
        kwargs: Other columns, which are not read.

    Returns:
        0 or 1 for each row; None for one without mask and boxes, or without the size that its scale needs.

    Raises:
        ValueError: There is no such scale.
    """
    per_row = scales(coordinates, len(completions))
    return [_score(*row) for row in answers_with(completions, boxes, masks, image_size, per_row)]


def _score(
    answer: str,
    boxes: Sequence[Sequence[float]] | None,
    mask: Any,
    image_size: Sequence[int] | None,
    scale: str,
) -> float | None:
    if not is_located(boxes if mask is None else mask, scale, image_size):
        return None
    numbers = read_numbers(POINT, answer)
    if numbers is None:
        return 0.0
    x, y = in_pixels(numbers, scale, image_size)
    if mask is None:
        return float(any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in boxes or ()))
    pixels = np.asarray(mask, bool)  # (H, W)
    height, width = pixels.shape
    return float(0 <= x < width and 0 <= y < height and pixels[int(y), int(x)])
