"""The objects of a scene: their shapes, colours, sizes and positions, by the words that name them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "maroon": (128, 28, 52),
    "orange": (240, 130, 30),
    "brown": (135, 85, 45),
    "yellow": (236, 208, 50),
    "olive": (128, 128, 40),
    "lime": (150, 220, 70),
    "green": (45, 150, 75),
    "teal": (30, 120, 120),
    "cyan": (70, 205, 210),
    "blue": (60, 110, 225),
    "navy": (35, 45, 130),
    "purple": (130, 60, 180),
    "pink": (240, 130, 185),
}
COLOUR_NAMES = tuple(COLOURS)
SIZES = {"small": (0.130, 0.150), "large": (0.175, 0.200)}  # smallest and largest radius, as shares of the image side
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; lengths are shares of the image side."""

    shape: str
    colour: str
    size: str
    position: int  # index into POSITIONS
    x: float
    y: float
    radius: float
    angle: float  # radians
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return f"{'in' if POSITIONS[self.position] == 'centre' else 'at'} the {POSITIONS[self.position]}"


def pick(values: Sequence[str], rng: np.random.Generator) -> str:
    """Draw one of the values, each with the same probability."""
    return values[int(rng.integers(len(values)))]
