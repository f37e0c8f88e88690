"""Reward: intersection over union of the answer's box with the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pivot_hub.training.rewards.completion import Completion, answers_with
from pivot_hub.training.rewards.coordinates import BOX, in_pixels, is_box, is_located, read_numbers, scales


def box_iou(
    completions: Sequence[Completion],
    *,
    coordinates: str | Sequence[str],
    boxes: Sequence[Sequence[Sequence[float]] | None] | None = None,
    image_size: Sequence[Sequence[int] | None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reward the overlap of boxes: area of the intersection over area of the union, from 0 to 1.

    The answer's box is its first list of four numbers, `[x1, y1, x2, y2]`, with or without JSON around it, such as
    `{"bbox_2d": [x1, y1, x2, y2]}`. Of several right boxes, the one with the largest overlap counts. An answer without
    a box, or with one that has no area, gets 0.

    Args:
        completions: The completions; of one with `<answer>` tags, what they enclose is the answer.
        coordinates: What the answer's numbers are: `pixels` of the image as the row has it, `0..1000` or `0..1` for
            shares of its sides; for all rows, or a column with that of each row.
        boxes: For each row, right boxes [x1, y1, x2, y2] in pixels.
        image_size: For each row, [width, height] of its image, which all scales but `pixels` need.
        kwargs: Other columns, which are not read.

    Returns:
        A number from 0 to 1 for each row; None for one without boxes, or without the size that its scale needs.

    Raises:
        ValueError: There is no such scale.
    """
    per_row = scales(coordinates, len(completions))
    return [_score(*row) for row in answers_with(completions, boxes, image_size, per_row)]


def _score(
    answer: str, boxes: Sequence[Sequence[float]] | None, image_size: Sequence[int] | None, scale: str
) -> float | None:
    if not is_located(boxes, scale, image_size):
        return None
    numbers = read_numbers(BOX, answer)
    if numbers is None or not is_box(numbers):
        return 0.0
    predicted = in_pixels(numbers, scale, image_size)
    return max(_overlap(predicted, box) for box in boxes or ())


def _overlap(first: Sequence[float], second: Sequence[float]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (_area(first) + _area(second) - shared)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
