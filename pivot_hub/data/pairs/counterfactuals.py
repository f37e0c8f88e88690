"""Two images made of one photograph, and a question whose answer differs between them.

Both images of a pair are edited, or a pair is asked both ways, so that no trace of the edit tells the answer: where an
object is erased from one image, a region of the same shape is filled in the other; where an object is replaced by one
of another class, both classes are asked about.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import maximum_filter

from pivot_hub.data.boxes_and_masks import Instance
from pivot_hub.data.image import open_image
from pivot_hub.data.pairs.from_labels import MOST_OBJECTS, draw_sides
from pivot_hub.data.pairs.pair_row import PHOTOGRAPH
from pivot_hub.data.pairs.photos import LabelledPhoto, Split, area, intersect
from pivot_hub.data.pairs.words import count_answer, count_question, presence_question, side_question
from pivot_hub.data.row import Box
from pivot_hub.errors import DataError

SMALLEST_REGION, LARGEST_REGION = 0.01, 0.25  # shares of the image of a region that is erased
BORDER = 0.01  # share of the image's longer side by which an erased region is widened, as outlines are rough
CROP_SHARES = (0.6, 0.5, 0.4)  # of the image's sides that a crop keeps, in the order they are tried
PLACES = 16  # of a region or a crop along each side
MOST_STRETCHED = 1.5  # ratio of the aspect ratios of an object that is pasted, and of the box that it is resized to
MOST_ENLARGED = 2.0  # ratio of the sides of that box to those of the object
MOST_LENDERS = 200  # photographs that are drawn to lend an object
PixelBox = tuple[int, int, int, int]  # x1, y1, x2, y2 in whole pixels
Pixels = np.ndarray  # (H, W, 3) uint8
DrawMask = Callable[[], np.ndarray]  # gives (H, W) bool


class Asked(NamedTuple):
    """A question whose answer differs between two images.

    Args:
        question: The question.
        first: The right answer for the first image, which is wrong for the second.
        second: The right answer for the second image, which is wrong for the first.
    """

    question: str
    first: str
    second: str


@dataclass(frozen=True)
class Counterfactual:
    """Two images, and questions whose answers differ between them.

    Args:
        kind: Kind of the questions.
        photo: The photograph that they are made of.
        asked: The questions with the right answer for each image.
        images: The images; None for the photograph as it is.
        origins: How each image was made.
    """

    kind: str
    photo: LabelledPhoto
    asked: tuple[Asked, ...]
    images: tuple[Image.Image | None, Image.Image]
    origins: tuple[str, str]


@dataclass(frozen=True)
class EditInputs:
    """What the counterfactuals of one way and one kind are made with, beside their photograph.

    Args:
        kind: Kind of the questions.
        lenders: For each split, its photographs, whose objects may be pasted.
        inpaint: Whether erased regions are filled by OpenCV's inpainting, or with their blurred surroundings.
        left_out: Counts why photographs are left out.
        rng: Random numbers.
    """

    kind: str
    lenders: Mapping[Split, Sequence[LabelledPhoto]]
    inpaint: bool
    left_out: Counter[str]
    rng: np.random.Generator

    def leave_out(self, way: str, reason: str) -> None:
        """Count a photograph that gives no counterfactual."""
        self.left_out[f"{self.kind}, {way}: {reason}"] += 1


def erase_objects(photo: LabelledPhoto, inputs: EditInputs) -> Counterfactual | None:
    """Erase all objects of a class, or one of several, from one image, and a region of that shape from the other.

    Args:
        photo: The photograph.
        inputs: With kind `presence`, all objects of a class are erased; with `count`, one of at most MOST_OBJECTS.

    Returns:
        The counterfactual; None where no class has a region of a usable size, or there is no place for another one.
    """
    reason = f"no region of {SMALLEST_REGION:.0%} to {LARGEST_REGION:.0%} of the image"
    border = max(1, round(BORDER * max(photo.image.size)))
    targets = _erasable(photo, inputs.kind)
    for i in inputs.rng.permutation(len(targets)):
        name, draw, rest = targets[i]
        exact = draw()
        if not SMALLEST_REGION <= exact.mean() <= LARGEST_REGION:
            continue
        region, others = _widen(exact, border), rest()
        if (region & others).any():
            reason = "the object touches another one of its class"
            continue
        elsewhere = _place_elsewhere(region, region | others, inputs.rng)
        if elsewhere is None:
            reason = "no place for a region of the same shape"
            continue
        pixels = np.asarray(open_image(photo.image.file, photo.name))
        kept, erased = (Image.fromarray(_fill(pixels, where, inputs.inpaint)) for where in (elsewhere, region))
        if inputs.kind == "presence":
            asked = Asked(*presence_question(name))
        else:
            count = len(photo.objects[name])
            asked = Asked(count_question(name), count_answer(name, count), count_answer(name, count - 1))
        fill = "inpainting" if inputs.inpaint else "blur"
        origins = (f"region beside the object filled ({fill})", f"object erased ({fill})")
        return Counterfactual(inputs.kind, photo, (asked,), (kept, erased), origins)
    inputs.leave_out("erase", reason)
    return None


def crop_objects(photo: LabelledPhoto, inputs: EditInputs) -> Counterfactual | None:
    """Crop a photograph to a part that holds an object of a class whole, and to a part of that size without any."""
    names = sorted(photo.outlined)
    for i in inputs.rng.permutation(len(names)):
        boxes = photo.boxes_of(names[i])
        windows = _crop_windows(boxes, photo.image.size, inputs.rng)
        if windows is None:
            continue
        image = open_image(photo.image.file, photo.name)
        asked = Asked(*presence_question(names[i]))
        images = (image.crop(windows[0]), image.crop(windows[1]))
        return Counterfactual(inputs.kind, photo, (asked,), images, ("crop with the object", "crop without it"))
    inputs.leave_out("crop", "no class fits into a crop and is missing in another")
    return None


def mirror_objects(photo: LabelledPhoto, inputs: EditInputs) -> Counterfactual | None:
    """Mirror a photograph in which a single object is wholly on one side of another."""
    sides = draw_sides(photo, inputs.rng)
    if sides is None:
        inputs.leave_out("mirror", "no two single objects beside each other")
        return None
    left_one, right_one = sides
    if inputs.rng.integers(2):
        asked = Asked(*side_question(left_one, right_one))
    else:
        question, left, right = side_question(right_one, left_one)
        asked = Asked(question, right, left)
    mirrored = ImageOps.mirror(open_image(photo.image.file, photo.name))
    return Counterfactual(inputs.kind, photo, (asked,), (None, mirrored), (PHOTOGRAPH, "mirror image"))


def swap_objects(photo: LabelledPhoto, inputs: EditInputs) -> Counterfactual | None:
    """Replace the only object of a class, in its whole box, by one of a class that the photograph does not show.

    That object is cut from another photograph of the split, which does not show the class that it replaces, and is
    resized. Both classes are asked about, so that an image that is seen to be edited has each answer once.
    """
    smallest, largest = (share * math.prod(photo.image.size) for share in (SMALLEST_REGION, LARGEST_REGION))
    boxes = {name: photo.boxes_of(name) for name in sorted(photo.outlined)}
    single = [name for name, of_class in boxes.items() if len(of_class) == 1]
    targets = [name for name in single if smallest <= area(boxes[name][0]) <= largest]
    reason = f"no class with a single object of {SMALLEST_REGION:.0%} to {LARGEST_REGION:.0%} of the image"
    for i in inputs.rng.permutation(len(targets)):
        name = targets[i]
        place = _pixel_box(boxes[name][0], photo.image.size, max(1, round(BORDER * max(photo.image.size))))
        lent = _lent_object(photo, name, place, inputs)
        if lent is None:
            reason = "no photograph lends an object of a class that is missing here, of about the same shape"
            continue
        lender, other, box = lent
        pasted = open_image(lender.image.file, lender.name).crop(box)
        swapped = open_image(photo.image.file, photo.name)
        swapped.paste(pasted.resize((place[2] - place[0], place[3] - place[1]), Image.Resampling.LANCZOS), place[:2])
        question, yes, no = presence_question(other)
        asked = (Asked(*presence_question(name)), Asked(question, no, yes))
        origins = (PHOTOGRAPH, "object replaced by one of another photograph")
        return Counterfactual(inputs.kind, photo, asked, (None, swapped), origins)
    inputs.leave_out("swap", reason)
    return None


Make = Callable[[LabelledPhoto, EditInputs], Counterfactual | None]
COUNTERFACTUALS: Mapping[str, tuple[Make, tuple[str, ...]]] = {
    "erase": (erase_objects, ("presence", "count")),
    "crop": (crop_objects, ("presence",)),
    "mirror": (mirror_objects, ("position",)),
    "swap": (swap_objects, ("presence",)),
}  # by name, with the kinds of questions whose answer it changes


def open_cv() -> Any:
    """Import OpenCV, which is no requirement of this package.

    Raises:
        DataError: It cannot be imported.
    """
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise DataError(
            f"inpainting needs OpenCV ({error}): run `pip install opencv-python-headless`, or leave out --inpaint."
        ) from None


def _erasable(photo: LabelledPhoto, kind: str) -> list[tuple[str, DrawMask, DrawMask]]:
    """List what may be erased: a class, a function that draws the region, and one that draws the rest of the class."""
    width, height = photo.image.size

    def nothing() -> np.ndarray:
        return np.zeros((height, width), bool)

    if kind == "presence":
        return [(name, photo.image.regions[name], nothing) for name in sorted(photo.outlined)]
    targets: list[tuple[str, DrawMask, DrawMask]] = []
    for name, boxes in sorted(photo.objects.items()):
        instances = photo.image.instances[name]
        if 2 <= len(boxes) <= MOST_OBJECTS:
            for one in instances:
                rest = [other for other in instances if other is not one]
                targets.append((name, one.draw, partial(_draw_all, rest)))
    return targets


def _draw_all(instances: Sequence[Instance]) -> np.ndarray:
    return np.any([instance.draw() for instance in instances], axis=0)


def _widen(region: np.ndarray, border: int) -> np.ndarray:
    return np.asarray(maximum_filter(region, size=2 * border + 1))


def _place_elsewhere(region: np.ndarray, blocked: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Move a region to a place where nothing is blocked: (H, W) bool; None where there is no such place."""
    ys, xs = np.nonzero(region)
    shape = region[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    height, width = shape.shape
    for top, left in _places(region.shape[0] - height, region.shape[1] - width, rng):
        if not (blocked[top : top + height, left : left + width] & shape).any():
            moved = np.zeros_like(region)
            moved[top : top + height, left : left + width] = shape
            return moved
    return None


def _places(bottom: int, right: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Yield places (y, x) of a grid from (0, 0) to (bottom, right), in random order."""
    ys, xs = (np.unique(np.linspace(0, last, PLACES).astype(int)) for last in (bottom, right))
    for i in rng.permutation(len(ys) * len(xs)):
        yield int(ys[i // len(xs)]), int(xs[i % len(xs)])


def _fill(pixels: Pixels, region: np.ndarray, inpaint: bool) -> Pixels:
    if inpaint:
        cv2 = open_cv()
        return np.asarray(cv2.inpaint(pixels, region.astype(np.uint8), 5, cv2.INPAINT_TELEA))
    return blurred_fill(pixels, region)


def blurred_fill(pixels: Pixels, region: np.ndarray) -> Pixels:
    """Fill a region with its blurred surroundings: the deeper inside, the coarser the means that are taken.

    Args:
        pixels: (H, W, 3) uint8.
        region: (H, W) bool.

    Returns:
        (H, W, 3) uint8, equal to the image outside of the region.
    """
    ys, xs = np.nonzero(region)
    side = int(max(np.ptp(ys), np.ptp(xs))) + 1
    window = np.s_[max(ys.min() - side, 0) : ys.max() + side + 1, max(xs.min() - side, 0) : xs.max() + side + 1]
    known = (~region[window][..., None]).astype(np.float32)  # (h, w, 1)
    levels = [np.concatenate([pixels[window] * known, known], axis=2)]  # (h, w, 4): colours times weight, weight
    while max(levels[-1].shape[:2]) > 1:
        levels.append(_halve(levels[-1]))
    filled = levels[-1][..., :3] / levels[-1][..., 3:]
    for level in reversed(levels[:-1]):
        weight = level[..., 3:]
        filled = _resize(filled, level.shape[1], level.shape[0])
        filled += np.clip(2 * weight, 0, 1) * (level[..., :3] / np.maximum(weight, 1e-6) - filled)
    result = pixels.copy()
    result[window][region[window]] = filled[region[window]].round().astype(np.uint8)
    return result


def _halve(values: np.ndarray) -> np.ndarray:
    """Average blocks of 2 x 2: (h, w, c) to (ceil(h / 2), ceil(w / 2), c), with zeros beyond the edges."""
    height, width, channels = values.shape
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even.reshape(-(-height // 2), 2, -(-width // 2), 2, channels).mean((1, 3))


def _resize(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize (h, w, 3) float32 bilinearly."""
    channels = [Image.fromarray(values[..., i]).resize((width, height), Image.Resampling.BILINEAR) for i in range(3)]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _crop_windows(
    boxes: tuple[Box, ...], size: tuple[int, int], rng: np.random.Generator
) -> tuple[PixelBox, PixelBox] | None:
    """Draw two windows of one size: one that holds a box whole, and one that no box reaches into."""
    large = [box for box in boxes if area(box) >= SMALLEST_REGION * size[0] * size[1]]
    for share in CROP_SHARES:
        width, height = (max(1, round(share * side)) for side in size)
        keeping = losing = None
        for top, left in _places(size[1] - height, size[0] - width, rng):
            window = (left, top, left + width, top + height)
            if keeping is None and any(_inside(box, window) for box in large):
                keeping = window
            if losing is None and not any(intersect(box, window) for box in boxes):
                losing = window
        if keeping and losing:
            return keeping, losing
    return None


def _lent_object(
    photo: LabelledPhoto, name: str, place: PixelBox, inputs: EditInputs
) -> tuple[LabelledPhoto, str, PixelBox] | None:
    """Draw an object to replace that of a class: its photograph, its class, and its box; None if none fits the place.

    No label of the photograph names its class, nor does a label of its own photograph name the class that it replaces,
    so that both questions have one answer.
    """
    lenders = inputs.lenders[photo.split]
    for i in inputs.rng.choice(len(lenders), min(len(lenders), MOST_LENDERS), replace=False):
        lender = lenders[i]
        if name in lender.labelled:
            continue
        found = [
            (other, box)
            for other in sorted(lender.outlined - photo.labelled)
            for box in (_pixel_box(one, lender.image.size) for one in lender.boxes_of(other))
            if _fits(box, place)
        ]
        if found:
            return lender, *found[int(inputs.rng.integers(len(found)))]
    return None


def _pixel_box(box: Box, size: tuple[int, int], border: int = 0) -> PixelBox:
    """Return the pixels that a box touches, with a border around them, inside the image."""
    left, top = (max(0, math.floor(start) - border) for start in box[:2])
    right, bottom = (min(side, math.ceil(end) + border) for end, side in zip(box[2:], size, strict=True))
    return left, top, right, bottom


def _fits(box: PixelBox, place: PixelBox) -> bool:
    """Return whether pixels may be resized to a place: not enlarged or stretched much."""
    wider, higher = ((place[axis + 2] - place[axis]) / max(1, box[axis + 2] - box[axis]) for axis in (0, 1))
    return max(wider, higher) <= MOST_ENLARGED and max(wider / higher, higher / wider) <= MOST_STRETCHED


def _inside(box: Box, window: PixelBox) -> bool:
    return window[0] <= box[0] and window[1] <= box[1] and box[2] <= window[2] and box[3] <= window[3]
