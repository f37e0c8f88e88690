"""The built-in world: seeded scenes of coloured shapes whose every pixel and sentence is known.

A scene is a pure function of `(world, split, index)`. What is said of a scene (captions, questions,
preference pairs) needs only its layout, so a language head can read the world without rendering it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "validation", "test"]
Kind = Literal["colour", "shape", "position", "count", "presence"]
Form = Literal["describe", "question"]
Slip = Literal["visual", "fact", "format"]
Combinations = Literal["seen", "unseen"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KINDS: tuple[Kind, ...] = ("colour", "shape", "position", "count", "presence")
SLIPS: tuple[Slip, ...] = ("visual", "fact", "format")
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
SIZES = {"small": (0.130, 0.150), "large": (0.175, 0.200)}  # radius as a share of the image side
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
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CORNERS = {"circle": "no corners", "square": "four corners", "triangle": "three corners", "star": "five points"}
CORNERS |= {"cross": "four arms", "ring": "one hole"}  # what is known of shapes without looking
DARK = ("maroon", "brown", "olive", "green", "teal", "blue", "navy", "purple")  # and of colours; the others are light
DESCRIBE = "Describe the image."
SCAN_SIDE = 8  # words along the edge of a scan: as many as the base encoder has patches
SUPERSAMPLE = 4  # masks are drawn this much larger and averaged down, for smooth edges
MIN_GAP = 0.74  # centre distance over summed radii: below 1 shapes overlap, at 0.74 most stays visible


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape; lengths are shares of the image side, later things lie in front."""

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


@dataclass(frozen=True)
class Question:
    """A question on a scene with its answer; `target` indexes the thing it is about, if it is one."""

    kind: Kind
    text: str
    answer: str
    wrong: str  # the same sentence with one visual error
    target: int | None


@dataclass(frozen=True)
class Pair:
    """A preference pair: `rejected` is `chosen` with one visual error of the given kind."""

    kind: Kind
    form: Form
    question: str
    chosen: str
    rejected: str
    target: int | None


@dataclass(frozen=True)
class Fact:
    """A sentence that is true, or wrong, of any picture: it is known, not seen. They differ in one word."""

    true: str
    wrong: str


@dataclass(frozen=True)
class Picture:
    """A rendered scene: image (H, W, 3) uint8; visible masks (N, H, W) bool; boxes (N, 4) x0 y0 x1 y1 in px."""

    image: Image.Image
    masks: np.ndarray
    boxes: np.ndarray


@dataclass(frozen=True)
class Scene:
    """The layout of one scene, in reading order of its positions.

    Args:
        objects: sorted by position, so that captions carry no entropy from their order.
        depth: drawing order, back to front, as indices into `objects`.
        pixel_seed: seed of background and noise.
    """

    dataset: ShapesDataset
    objects: tuple[SceneObject, ...]
    depth: tuple[int, ...]
    pixel_seed: int

    def signature(self) -> tuple[tuple[str, str, int], ...]:
        """What the scene shows, without its pixels: splits never share one."""
        return tuple((t.shape, t.colour, t.position) for t in self.objects)

    # ------------------------------------------------------------------ what is said of it
    def caption(self) -> str:
        return describe(self.objects)

    def scan(self, side: int, rng: np.random.Generator) -> str:
        """Name one word of what lies at each cell of a grid, row by row: colour, shape or size, or `nothing`.

        It says in words, one a cell, what image tokens show: a language head that reads scans can read images.

        Args:
            side: cells along an edge; the text has side * side words.
            rng: draws which word of a thing a cell names.
        """
        words = []
        for row, column in itertools.product(range(side), repeat=2):
            x, y = (column + 0.5) / side, (row + 0.5) / side
            on = [
                i
                for i in self.depth
                if math.hypot(self.objects[i].x - x, self.objects[i].y - y) < self.objects[i].radius
            ]
            if not on:
                words.append("nothing")
                continue
            front = self.objects[on[-1]]
            words.append((front.colour, front.colour, front.shape, front.shape, front.size)[int(rng.integers(5))])
        return " ".join(words)

    def question(self, kind: Kind, rng: np.random.Generator) -> Question:
        """Ask about one aspect of the scene, with its right answer and one that holds a single error."""
        objects = self.objects
        target = int(rng.integers(len(objects)))
        thing = objects[target]
        if kind == "colour":
            noun = self._refer(thing, "shape")
            wrong = _other(COLOUR_NAMES, thing.colour, rng)
            text = f"What colour is the {noun}?"
            return Question(kind, text, f"It is {thing.colour}.", f"It is {wrong}.", target)
        if kind == "shape":
            noun = self._refer(thing, "colour")
            wrong = _other(SHAPES, thing.shape, rng)
            text = f"What shape is the {noun}?"
            return Question(kind, text, f"It is a {thing.shape}.", f"It is a {wrong}.", target)
        if kind == "position":
            free = [i for i in range(9) if i not in {t.position for t in objects}]
            moved = _moved(thing, int(rng.choice(free)))
            text = f"Where is the {thing.name}?"
            return Question(kind, text, f"It is {thing.place}.", f"It is {moved.place}.", target)
        if kind == "count":
            return self._count_question(rng)
        return self._presence_question(target, rng)

    def pair(self, kind: Kind, form: Form, rng: np.random.Generator) -> Pair:
        """Draw a preference pair with one error of `kind`, in an answer or inside a whole description."""
        if form == "question":
            asked = self.question(kind, rng)
            return Pair(kind, form, asked.text, asked.answer, asked.wrong, asked.target)
        objects = list(self.objects)
        target: int | None = int(rng.integers(len(objects)))
        assert target is not None
        thing = objects[target]
        free = [i for i in range(9) if i not in {t.position for t in objects}]
        if kind == "colour":
            objects[target] = _with(thing, colour=_other(COLOUR_NAMES, thing.colour, rng))
            rejected = describe(objects)
        elif kind == "shape":
            objects[target] = _with(thing, shape=_other(SHAPES, thing.shape, rng))
            rejected = describe(objects)
        elif kind == "position":
            objects[target] = _moved(thing, int(rng.choice(free)))
            rejected = describe(objects, keep_order=True)
        elif kind == "count":  # only the stated number is wrong
            target = None
            rejected = describe(objects, count=_near(len(objects), 1, self.dataset.things[1] + 1, rng))
        else:  # presence: one thing that is not there is added, number and all
            target = None
            names = {t.name for t in objects}
            while (ghost := f"{_pick(COLOUR_NAMES, rng)} {_pick(SHAPES, rng)}") in names:
                pass
            colour, shape = ghost.split()
            added = _with(_moved(thing, int(rng.choice(free))), colour=colour, shape=shape)
            added = _with(added, size=_pick(tuple(SIZES), rng))
            rejected = describe([*objects, added])
        return Pair(kind, form, DESCRIBE, self.caption(), rejected, target)

    def pair_with_fact(
        self, kind: Kind, form: Form, slip: Slip, rng: np.random.Generator, fact_rng: np.random.Generator
    ) -> Pair:
        """Draw the pair that `pair` draws, with a fact behind the answer; only the slip tells chosen from rejected.

        Args:
            slip: visual, the error of the pair itself; fact, a wrong fact; format, a word said twice, no capital, or no
                full stop.
            rng: as `pair` takes it.
            fact_rng: draws fact and format, the same fact for every slip.
        """
        pair = self.pair(kind, form, rng)
        fact = draw_fact(fact_rng)
        chosen = f"{pair.chosen} {fact.true}"
        rejected = {
            "visual": f"{pair.rejected} {fact.true}",
            "fact": f"{pair.chosen} {fact.wrong}",
            "format": _slipped(chosen, fact_rng),
        }
        return Pair(kind, form, pair.question, chosen, rejected[slip], pair.target)

    def _refer(self, thing: SceneObject, by: Literal["shape", "colour"]) -> str:
        """Name a thing by one attribute, adding its place when that is not unique."""
        value = getattr(thing, by)
        noun = value if by == "shape" else f"{value} shape"
        unique = sum(getattr(t, by) == value for t in self.objects) == 1
        return noun if unique else f"{noun} {thing.place}"

    def _count_question(self, rng: np.random.Generator) -> Question:
        what = rng.integers(3)
        if what == 0:
            noun, count = "shape", len(self.objects)
            wrong = _near(count, 1, self.dataset.things[1] + 1, rng)
        elif what == 1:
            colour = self._present_or_not("colour", COLOUR_NAMES, rng)
            noun, count = f"{colour} shape", sum(t.colour == colour for t in self.objects)
            wrong = _near(count, 0, 3, rng)
        else:
            noun = self._present_or_not("shape", SHAPES, rng)
            count = sum(t.shape == noun for t in self.objects)
            wrong = _near(count, 0, 3, rng)
        text = f"How many {_plural(noun)} are there?"
        return Question("count", text, f"{_there_are(count, noun)}.", f"{_there_are(wrong, noun)}.", None)

    def _presence_question(self, target: int, rng: np.random.Generator) -> Question:
        names = {t.name for t in self.objects}
        present = bool(rng.integers(2))
        if present:
            name = self.objects[target].name
        else:  # half of the absent ones take colour or shape from the scene, so that binding counts
            while True:
                colour, shape = _pick(COLOUR_NAMES, rng), _pick(SHAPES, rng)
                near = int(rng.integers(4))
                colour = self.objects[target].colour if near == 0 else colour
                shape = self.objects[target].shape if near == 1 else shape
                if (name := f"{colour} {shape}") not in names:
                    break
        article = _article(name)
        yes, no = f"Yes, there is {article} {name}.", f"No, there is no {name}."
        answer, wrong = (yes, no) if present else (no, yes)
        return Question("presence", f"Is there {article} {name}?", answer, wrong, target if present else None)

    def _present_or_not(self, by: str, values: Sequence[str], rng: np.random.Generator) -> str:
        if rng.integers(4):
            return str(getattr(self.objects[int(rng.integers(len(self.objects)))], by))
        return _pick(values, rng)

    # ------------------------------------------------------------------ what is seen of it
    def render(self) -> Picture:
        """Draw the scene with antialiased edges on a noisy, unevenly lit background."""
        dataset, px = self.dataset, self.dataset.image_px
        rng = np.random.default_rng(self.pixel_seed)
        # A coarse colour field, enlarged: shading that no object explains.
        field_ = rng.integers(40, 216, size=(3, 3, 3), dtype=np.uint8)
        canvas = np.asarray(Image.fromarray(field_).resize((px, px), Image.Resampling.BICUBIC), np.int32)
        canvas = (canvas + 2 * int(rng.integers(60, 200))) // 3  # keep it greyer than the objects
        masks = np.zeros((len(self.objects), px, px), bool)
        for i in self.depth:
            window, alpha = _alpha(self.objects[i], px)
            under = canvas[window]
            canvas[window] = under + (np.asarray(self.objects[i].rgb) - under) * alpha[..., None] // 255
            inside = np.zeros((px, px), bool)
            inside[window] = alpha >= 128
            masks[:, inside] = False
            masks[i] = inside
        # Coloured light: a colour is told by what surrounds it, as in photographs.
        canvas = canvas * (256 - rng.integers(0, int(256 * dataset.tint) + 1, size=3)) // 256
        noise = rng.integers(-dataset.noise, dataset.noise + 1, size=canvas.shape, dtype=np.int32)
        image = Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))
        return Picture(image, masks, np.stack([_box(m) for m in masks]))


@dataclass(frozen=True)
class ShapesDataset:
    """The settings of a world of scenes.

    Args:
        image_px: side of the square image.
        things: fewest and most things in a scene.
        noise: amplitude of the pixel noise, in grey levels of 255.
        jitter: how far a thing's colour strays from its name's, in grey levels per channel.
        tint: how much of one colour channel the light of a scene may lack, of 1.
        tilt: largest rotation of a shape, in radians.
        seed: worlds of different seeds share no random number.
        gap: smallest distance of two objects over their summed radii, MIN_GAP by default; the smaller, the more they
            hide of each other.
        scale: of the objects, 1 by default.
        combinations: which pairs of a colour and a shape occur: those `seen`, two in three, the `unseen`, or all.
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
        """Draw scene `index` of a split; a layout belongs to one split only, by the hash of its signature."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        while True:
            scene = self._draw(rng)
            if _split_of(scene.signature()) == split:
                return scene

    def scene_rng(self, split: Split, index: int, purpose: int) -> np.random.Generator:
        """A random stream of its own for what is asked of a scene: rendering never moves it."""
        return np.random.default_rng([self.seed, SPLITS.index(split), index, purpose])

    def _draw(self, rng: np.random.Generator) -> Scene:
        count = int(rng.integers(self.things[0], self.things[1] + 1))
        objects: list[SceneObject] = []
        while len(objects) < count:
            shape, colour, size = _pick(SHAPES, rng), _pick(COLOUR_NAMES, rng), _pick(tuple(SIZES), rng)
            position = int(rng.integers(9))
            low, high = SIZES[size]
            u, v, w, t = (float(f) for f in rng.random(4))
            radius = (low + (high - low) * u) * (self.scale or 1)
            row, column = divmod(position, 3)
            # Up to 0.06 off the middle of the cell, the whole thing inside the image.
            x = min(max((column + 0.5) / 3 + 0.12 * (v - 0.5), radius + 0.01), 0.99 - radius)
            y = min(max((row + 0.5) / 3 + 0.12 * (w - 0.5), radius + 0.01), 0.99 - radius)
            strayed = rng.integers(-self.jitter, self.jitter + 1, size=3)
            red, green, blue = (min(max(c + int(d), 0), 255) for c, d in zip(COLOURS[colour], strayed, strict=True))
            if any(o.position == position or (o.colour, o.shape) == (colour, shape) for o in objects):
                continue
            gap = MIN_GAP if self.gap is None else self.gap
            if any(math.hypot(o.x - x, o.y - y) < gap * (o.radius + radius) for o in objects):
                continue
            if self.combinations is not None and is_unseen(colour, shape) != (self.combinations == "unseen"):
                continue
            angle = self.tilt * (2 * t - 1)
            objects.append(SceneObject(shape, colour, size, position, x, y, radius, angle, (red, green, blue)))
        objects.sort(key=lambda t: t.position)
        depth = tuple(int(i) for i in rng.permutation(count))
        return Scene(self, tuple(objects), depth, int(rng.integers(2**31)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for provenance; those that are left open are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def describe(objects: Sequence[SceneObject], count: int | None = None, keep_order: bool = False) -> str:
    """Say how many objects there are, then each in reading order.

    Args:
        objects: What to name.
        count: the number to state where it should differ from the objects named.
        keep_order: name them as given, so that one moved thing changes one place only.
    """
    ordered = list(objects) if keep_order else sorted(objects, key=lambda t: t.position)
    parts = [f"{_article(t.size)} {t.size} {t.name} {t.place}" for t in ordered]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{_there_are(len(ordered) if count is None else count, 'shape')}: {listed}."


def is_unseen(colour: str, shape: str) -> bool:
    """Whether a colour and a shape meet only where a world says `unseen`; each colour and shape is in both sets."""
    return (COLOUR_NAMES.index(colour) + SHAPES.index(shape)) % 3 == 0


def draw_fact(rng: np.random.Generator) -> Fact:
    """Draw one of the facts about shapes and colours, with one that is wrong in one word."""
    if rng.integers(2):
        shape = _pick(SHAPES, rng)
        number, what = CORNERS[shape].split()
        wrong = _other(NUMBERS, number, rng)
        said = [f"{_article(shape).capitalize()} {shape} has {n} {what}." for n in (number, wrong)]
    else:
        colour = _pick(COLOUR_NAMES, rng)
        words = ("dark", "light") if colour in DARK else ("light", "dark")
        said = [f"{colour.capitalize()} is a {word} colour." for word in words]
    return Fact(*said)


def _slipped(text: str, rng: np.random.Generator) -> str:
    """The same words in a form that is not asked for."""
    what = int(rng.integers(3))
    if what == 0:
        return text[0].lower() + text[1:]
    if what == 1:
        return text.removesuffix(".")
    words = text.split(" ")
    twice = int(rng.integers(len(words)))
    return " ".join([*words[: twice + 1], *words[twice:]])


def _split_of(signature: tuple[tuple[str, str, int], ...]) -> Split:
    bucket = hashlib.sha256(repr(signature).encode()).digest()[0]
    return "validation" if bucket < 26 else "test" if bucket < 64 else "train"  # about 10, 15 and 75 in 100


def _with(thing: SceneObject, **changes: Any) -> SceneObject:
    return SceneObject(**{**asdict(thing), **changes})


def _moved(thing: SceneObject, position: int) -> SceneObject:
    return _with(thing, position=position)


def _pick(values: Sequence[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]


def _other(values: Sequence[str], value: str, rng: np.random.Generator) -> str:
    return _pick([v for v in values if v != value], rng)


def _near(count: int, low: int, high: int, rng: np.random.Generator) -> int:
    """A count that is off by one and stays within low..high."""
    return int(rng.choice([c for c in (count - 1, count + 1) if low <= c <= high]))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _there_are(count: int, noun: str) -> str:
    if count == 1:
        return f"There is one {noun}"
    return f"There are {NUMBERS[count]} {_plural(noun)}"


def _star() -> list[tuple[float, float]]:
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    radii = [1.0 if i % 2 == 0 else 0.42 for i in range(10)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


_ARM = 0.36
POLYGONS: dict[str, list[tuple[float, float]]] = {  # unit circle, y downwards
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -1.0), (0.92, 0.72), (-0.92, 0.72)],
    "star": _star(),
    "cross": [
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ],
}


def _alpha(thing: SceneObject, px: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Coverage of the pixels around a thing: their rows and columns, and (h, w) int32 from 0 to 255."""
    left, top = int((thing.x - thing.radius) * px), int((thing.y - thing.radius) * px)
    side = math.ceil(2 * thing.radius * px) + 2
    sheet = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    draw = ImageDraw.Draw(sheet)
    x, y = (thing.x * px - left) * SUPERSAMPLE, (thing.y * px - top) * SUPERSAMPLE
    r = thing.radius * px * SUPERSAMPLE
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if thing.shape == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        corners = [(x + r * (u * cos - v * sin), y + r * (u * sin + v * cos)) for u, v in POLYGONS[thing.shape]]
        draw.polygon(corners, fill=255)
    alpha = np.asarray(sheet.reduce(SUPERSAMPLE), np.int32)[: px - top, : px - left]
    return (slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])), alpha


def _box(mask: np.ndarray) -> np.ndarray:
    """Tight box of a (H, W) mask: x0, y0, x1, y1 in px, the far edges exclusive."""
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@lru_cache(maxsize=4096)
def picture(dataset: ShapesDataset, split: Split, index: int) -> Picture:
    """Render a scene, remembering the latest ones: probes and pairs ask for the same scene again."""
    return dataset.scene(split, index).render()
