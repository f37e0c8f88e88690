"""Coordinates in answers: numbers between brackets, and the scale that they are given in."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import cycle

_SIDE = {"pixels": None, "0..1000": 1000, "0..1": 1}  # what the side of an image is in each scale
_NUMBER = r"\s*([-+]?\d{1,20}(?:\.\d{1,20})?)\s*"
BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
POINT = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}[\])]")


def scales(coordinates: str | Sequence[str], rows: int) -> list[str]:
    """Return the scale of each row.

    Args:
        coordinates: One scale for all rows, or a column with that of each row.
        rows: Number of rows.

    Raises:
        ValueError: There is no such scale.
    """
    per_row = [coordinates] * rows if isinstance(coordinates, str) else list(coordinates)
    given = {coordinates} if isinstance(coordinates, str) else set(per_row)
    if unknown := given - _SIDE.keys():
        raise ValueError(f"`coordinates` is {unknown.pop()!r}; give one of {', '.join(_SIDE)}")
    return per_row


def read_numbers(pattern: re.Pattern[str], answer: str) -> list[float] | None:
    """Return the numbers of the first match in an answer, or None where there is no match."""
    match = pattern.search(answer)
    return None if match is None else [float(number) for number in match.groups()]


def in_pixels(numbers: Sequence[float], scale: str, image_size: Sequence[int] | None) -> list[float]:
    """Convert x, y, x, y, ... from a scale to pixels of the image, whose size [width, height] pixels need not have."""
    side = _SIDE[scale]
    if side is None:
        return list(numbers)
    assert image_size is not None
    return [number * length / side for number, length in zip(numbers, cycle(image_size), strict=False)]


def is_located(regions: Sequence[object] | None, scale: str, image_size: Sequence[int] | None) -> bool:
    """Return whether a row has regions, and the size of its image where the scale needs it."""
    return regions is not None and len(regions) > 0 and (image_size is not None or scale == "pixels")


def is_box(numbers: Sequence[float]) -> bool:
    """Return whether four numbers are finite corners x1 < x2, y1 < y2."""
    x1, y1, x2, y2 = numbers
    return all(map(math.isfinite, numbers)) and x1 < x2 and y1 < y2
