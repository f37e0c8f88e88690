"""Questions that boxes and masks answer, in units in which each answer of a question is right as often as it is wrong.

A model that reads text alone is therefore at chance on every kind but `position`, whose words alone are balanced: which
of two classes is more often on the left is not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np

from pivot_hub.data.pairs.pair_row import PairRow, Unit, photograph
from pivot_hub.data.pairs.photos import SPLITS, LabelledPhoto, area, intersect
from pivot_hub.data.pairs.words import (
    box_answer,
    box_question,
    count_answer,
    count_question,
    presence_question,
    side_question,
    size_question,
)
from pivot_hub.data.row import Box

FEWEST_PHOTOS = 2  # of a class: of one seen once, nothing says what it occurs with
MOST_OBJECTS = 10  # of a class, in questions for their number
SIZE_RATIO = 2.0  # of the pixels of two objects, of which one is called the larger
SMALLEST_BOX = 0.01  # share of the image of a box that is asked about

Photos = Sequence[LabelledPhoto]


def asked_classes(photos: Photos, left_out: Counter[str]) -> list[str]:
    """List the classes that are asked about, sorted; the others are counted by reason."""
    counts = Counter(name for photo in photos for name in photo.present)
    rare = [name for name, count in counts.items() if count < FEWEST_PHOTOS]
    if rare:
        left_out["classes that one photograph shows"] += len(rare)
    return sorted(name for name, count in counts.items() if count >= FEWEST_PHOTOS)


def presence_units(photos: Photos, left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Ask for each class in photographs that show it, and in as many that do not.

    The latter are drawn by how often their classes occur together with the class: a photograph of a road is asked about
    traffic lights. Photographs whose classes never occur with it are not drawn.
    """
    names = asked_classes(photos, left_out)
    together = Counter(pair for photo in photos for pair in _pairs_of(photo))
    units: list[Unit] = []
    for name in names:
        question, yes, no = presence_question(name)
        for split in SPLITS:
            of_split = [photo for photo in photos if photo.split == split]
            showing = [photo for photo in of_split if name in photo.present]
            weights = {
                i: sum(together[name, other] for other in photo.present)
                for i, photo in enumerate(of_split)
                if name not in photo.labelled
            }
            places = [i for i, weight in weights.items() if weight]
            pairs = min(len(showing), len(places))
            left_out["presence: photographs without another to balance them"] += len(showing) - pairs
            if not pairs:
                continue
            shares = np.array([weights[i] for i in places], float)
            drawn = rng.choice(places, pairs, replace=False, p=shares / shares.sum())
            for i, j in zip(rng.permutation(len(showing))[:pairs], drawn, strict=True):
                with_it, without = showing[i], of_split[j]
                units.append(
                    (_row("presence", with_it, question, yes, no), _row("presence", without, question, no, yes))
                )
    return units


def count_units(photos: Photos, left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Ask for the number of objects of a class in two photographs; the right answer of one is the other's wrong one."""
    units: list[Unit] = []
    for split in SPLITS:
        by_class: dict[str, dict[int, list[LabelledPhoto]]] = defaultdict(lambda: defaultdict(list))
        for photo in photos:
            if photo.split == split:
                left_out["count: classes of a photograph with a crowd or an empty mask"] += len(
                    photo.image.instances.keys() - photo.objects.keys()
                )
                for name, boxes in photo.objects.items():
                    if len(boxes) <= MOST_OBJECTS:
                        by_class[name][len(boxes)].append(photo)
        for name, by_count in sorted(by_class.items()):
            question = count_question(name)
            for (first, m), (second, n) in _pair_different(by_count, rng):
                right, wrong = count_answer(name, m), count_answer(name, n)
                units.append(
                    (_row("count", first, question, right, wrong), _row("count", second, question, wrong, right))
                )
            left_out["count: photographs without another to balance them"] += sum(map(len, by_count.values()))
    return units


def position_units(photos: Photos, left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Ask on which side of another object one is, and the reverse, where their boxes do not overlap horizontally."""
    units: list[Unit] = []
    for photo in photos:
        if (found := draw_sides(photo, rng)) is None:
            left_out["position: photographs without two single objects beside each other"] += 1
            continue
        left_one, right_one = found
        question, left, right = side_question(left_one, right_one)
        reverse, reverse_left, reverse_right = side_question(right_one, left_one)
        units.append(
            (
                _row("position", photo, question, left, right),
                _row("position", photo, reverse, reverse_right, reverse_left),
            )
        )
    return units


def draw_sides(photo: LabelledPhoto, rng: np.random.Generator) -> tuple[str, str] | None:
    """Draw two classes of one object each, of which the first is wholly to the left of the second."""
    boxes = sorted(photo.single.items())
    pairs = [(a, b) for a, first in boxes for b, second in boxes if first[2] <= second[0]]
    return pairs[int(rng.integers(len(pairs)))] if pairs else None


def size_units(photos: Photos, left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Ask which of two single objects is larger, in two photographs of the same classes that answer differently."""
    units: list[Unit] = []
    for split in SPLITS:
        larger: dict[tuple[str, str], list[LabelledPhoto]] = defaultdict(list)  # by (larger, smaller)
        for photo in photos:
            pixels = photo.single_pixels.items() if photo.split == split else ()
            for a, first in pixels:
                for b, second in pixels:
                    if a != b and first >= SIZE_RATIO * second:
                        larger[a, b].append(photo)
        for a, b in sorted({tuple(sorted(pair)) for pair in larger}):
            first_larger, second_larger = larger.get((a, b), []), larger.get((b, a), [])
            question, first_answer, second_answer = size_question(a, b)
            pairs = min(len(first_larger), len(second_larger))
            left_out["size: photographs without another to balance them"] += (
                len(first_larger) + len(second_larger) - 2 * pairs
            )
            for i, j in zip(
                rng.permutation(len(first_larger))[:pairs], rng.permutation(len(second_larger))[:pairs], strict=True
            ):
                units.append(
                    (
                        _row("size", first_larger[i], question, first_answer, second_answer),
                        _row("size", second_larger[j], question, second_answer, first_answer),
                    )
                )
    return units


def box_units(photos: Photos, left_out: Counter[str], rng: np.random.Generator) -> list[Unit]:
    """Ask what is in two boxes of a photograph; the wrong answer of each is the class in the other."""
    units: list[Unit] = []
    for photo in photos:
        classes = sorted(photo.objects)
        pairs = list(combinations(classes, 2))
        rng.shuffle(pairs)
        for a, b in pairs:
            first, second = _apart(photo, a, b), _apart(photo, b, a)
            if first and second:
                questions = [box_question(box, photo.image.size) for box in (first, second)]
                units.append(
                    (
                        _row("box", photo, questions[0], box_answer(a), box_answer(b)),
                        _row("box", photo, questions[1], box_answer(b), box_answer(a)),
                    )
                )
                break
        else:
            left_out["box: photographs without boxes of two classes that lie apart"] += 1
    return units


KINDS: Mapping[str, Callable[[Photos, Counter[str], np.random.Generator], list[Unit]]] = {
    "presence": presence_units,
    "count": count_units,
    "position": position_units,
    "size": size_units,
    "box": box_units,
}


def _row(kind: str, photo: LabelledPhoto, question: str, chosen: str, rejected: str) -> PairRow:
    return PairRow(kind, photo.split, photograph(photo.name), question, chosen, rejected)


def _pairs_of(photo: LabelledPhoto) -> list[tuple[str, str]]:
    return [(a, b) for a in photo.present for b in photo.present if a != b]


def _pair_different(
    by_count: dict[int, list[LabelledPhoto]], rng: np.random.Generator
) -> list[tuple[tuple[LabelledPhoto, int], tuple[LabelledPhoto, int]]]:
    """Take two photographs of different counts at a time, the counts as near as possible, and leave the rest."""
    for count in by_count:
        by_count[count] = [by_count[count][i] for i in rng.permutation(len(by_count[count]))]
    pairs = []
    while len(filled := sorted(count for count, photos in by_count.items() if photos)) > 1:
        most = max(filled, key=lambda count: (len(by_count[count]), -count))
        nearest = min((c for c in filled if c != most), key=lambda c: (abs(c - most), -len(by_count[c]), c))
        pairs.append(((by_count[most].pop(), most), (by_count[nearest].pop(), nearest)))
    return pairs


def _apart(photo: LabelledPhoto, name: str, other: str) -> Box | None:
    """Return the largest box of a class that no object of the other class reaches into; None if it is too small."""
    width, height = photo.image.size
    boxes = [box for box in photo.objects[name] if not any(intersect(box, o) for o in photo.objects[other])]
    largest = max(boxes, key=area, default=None)
    return largest if largest and area(largest) >= SMALLEST_BOX * width * height else None
