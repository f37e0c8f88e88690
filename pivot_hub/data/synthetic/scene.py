"""Scenes of the synthetic Shapes dataset, and the drawing of their layouts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from pivot_hub.data.synthetic import text
from pivot_hub.data.synthetic.drawing import RenderedScene, render_objects
from pivot_hub.data.synthetic.objects import COLOUR_NAMES, COLOURS, SHAPES, SIZES, SceneObject, pick

Split = Literal["train", "validation", "test"]
Combinations = Literal["seen", "unseen"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MIN_GAP = 0.74  # centre distance over summed radii: below 1 shapes overlap, at 0.74 most of each stays visible


@dataclass(frozen=True)
class Scene:
    """The layout of one scene.

    Args:
        dataset: Dataset that the scene belongs to.
        objects: Objects sorted by position, so that captions carry no entropy from their order.
        depth: Drawing order, back to front, as indices into `objects`.
        pixel_seed: Seed of background and noise.
    """

    dataset: ShapesDataset
    objects: tuple[SceneObject, ...]
    depth: tuple[int, ...]
    pixel_seed: int

    def signature(self) -> tuple[tuple[str, str, int], ...]:
        """Return (shape, colour, position) of every object; two splits never share a signature."""
        return tuple((o.shape, o.colour, o.position) for o in self.objects)

    def caption(self) -> str:
        """Describe the scene in one sentence."""
        return text.describe(self.objects)

    def scan(self, side: int, rng: np.random.Generator) -> str:
        """Name what lies at each cell of a grid, one word a cell; see `text.scan_grid`."""
        return text.scan_grid(self.objects, self.depth, side, rng)

    def question(self, kind: text.Kind, rng: np.random.Generator) -> text.Question:
        """Ask about one aspect of the scene, with the right answer and one that holds a single error."""
        return text.ask_question(self.objects, kind, self.dataset.things[1], rng)

    def pair(self, kind: text.Kind, form: text.Form, rng: np.random.Generator) -> text.Pair:
        """Draw a preference pair with one error of `kind`, in an answer or inside a whole description."""
        return text.draw_pair(self.objects, kind, form, self.dataset.things[1], rng)

    def pair_with_fact(
        self,
        kind: text.Kind,
        form: text.Form,
        error_type: text.ErrorType,
        rng: np.random.Generator,
        fact_rng: np.random.Generator,
    ) -> text.Pair:
        """Draw the pair that `pair` draws, with a fact after each answer; see `text.add_fact` for the error types."""
        return text.add_fact(self.pair(kind, form, rng), error_type, fact_rng)

    def render(self) -> RenderedScene:
        """Render the scene."""
        dataset = self.dataset
        return render_objects(self.objects, self.depth, self.pixel_seed, dataset.image_px, dataset.tint, dataset.noise)


@dataclass(frozen=True)
class ShapesDataset:
    """The settings from which the scenes of the synthetic Shapes dataset are drawn.

    Args:
        image_px: Side of the square image, in px.
        things: Smallest and largest number of objects in a scene.
        noise: Amplitude of the pixel noise, in grey levels of 255.
        jitter: Largest deviation of an object's colour from its nominal colour, in grey levels per channel.
        tint: Largest share of a colour channel that the light of a scene may lack, 0 to 1.
        tilt: Largest rotation of a shape, in radians.
        seed: Seed of all scenes; datasets of different seeds share no random numbers.
        gap: Smallest distance between two objects over their summed radii, MIN_GAP by default; the smaller it is, the
            more the objects hide of each other.
        scale: Factor on the size of all objects, 1 by default.
        combinations: Combinations of colour and shape that occur: the `seen` two thirds, the `unseen` third, or all by
            default.
    """

    image_px: int = 64
    things: tuple[int, int] = (1, 5)
    noise: int = 24
    jitter: int = 30
    tint: float = 0.5
    tilt: float = 0.3
    seed: int = 0
    gap: float | None = None
    scale: float | None = None
    combinations: Combinations | None = None

    def scene(self, split: Split, index: int) -> Scene:
        """Draw scene `index` of a split; the hash of a layout's signature assigns each layout to one split only."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        while True:
            scene = self._draw(rng)
            if split_of(scene.signature()) == split:
                return scene

    def scene_rng(self, split: Split, index: int, purpose: int) -> np.random.Generator:
        """Create the random generator of one purpose on one scene; layout and rendering do not advance it."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index, purpose])

    def _draw(self, rng: np.random.Generator) -> Scene:
        count = int(rng.integers(self.things[0], self.things[1] + 1))
        objects: list[SceneObject] = []
        while len(objects) < count:
            candidate = self.draw_object(rng)
            if self.fits(candidate, objects):
                objects.append(candidate)
        objects.sort(key=lambda o: o.position)
        depth = tuple(int(i) for i in rng.permutation(count))
        return Scene(self, tuple(objects), depth, int(rng.integers(2**31)))

    def draw_object(self, rng: np.random.Generator) -> SceneObject:
        """Draw an object of any shape, colour, size and position."""
        shape, colour, size = pick(SHAPES, rng), pick(COLOUR_NAMES, rng), pick(tuple(SIZES), rng)
        position = int(rng.integers(9))
        low, high = SIZES[size]
        u, v, w, t = (float(f) for f in rng.random(4))
        radius = (low + (high - low) * u) * (self.scale or 1)
        row, column = divmod(position, 3)
        # The centre is up to 0.06 off the middle of its cell, and the whole object lies inside the image.
        x = min(max((column + 0.5) / 3 + 0.12 * (v - 0.5), radius + 0.01), 0.99 - radius)
        y = min(max((row + 0.5) / 3 + 0.12 * (w - 0.5), radius + 0.01), 0.99 - radius)
        deviation = rng.integers(-self.jitter, self.jitter + 1, size=3)
        red, green, blue = (min(max(c + int(d), 0), 255) for c, d in zip(COLOURS[colour], deviation, strict=True))
        angle = self.tilt * (2 * t - 1)
        return SceneObject(shape, colour, size, position, x, y, radius, angle, (red, green, blue))

    def fits(self, candidate: SceneObject, objects: Sequence[SceneObject]) -> bool:
        """Return whether a scene of these objects may also hold the candidate."""
        if any(o.position == candidate.position or o.name == candidate.name for o in objects):
            return False
        gap = MIN_GAP if self.gap is None else self.gap
        for other in objects:
            if math.hypot(other.x - candidate.x, other.y - candidate.y) < gap * (other.radius + candidate.radius):
                return False
        if self.combinations is None:
            return True
        return is_unseen(candidate.colour, candidate.shape) == (self.combinations == "unseen")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for provenance; settings that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def is_unseen(colour: str, shape: str) -> bool:
    """Return whether only a dataset of `unseen` combinations joins a colour and a shape.

    Every colour and every shape occurs both in seen and in unseen combinations.
    """
    return (COLOUR_NAMES.index(colour) + SHAPES.index(shape)) % 3 == 0


def split_of(signature: tuple[tuple[str, str, int], ...]) -> Split:
    """Return the only split that holds scenes of a signature, as `Scene.signature` returns it."""
    bucket = hashlib.sha256(repr(signature).encode()).digest()[0]
    return "validation" if bucket < 26 else "test" if bucket < 64 else "train"  # about 10, 15 and 75 in 100
