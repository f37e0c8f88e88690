"""Text about a scene: captions, scans, questions and preference pairs, all written from its objects alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pivot_hub.data.synthetic.objects import COLOUR_NAMES, POSITIONS, SHAPES, SIZES, SceneObject, pick

Kind = Literal["colour", "shape", "position", "count", "presence"]
Form = Literal["describe", "question"]
ErrorType = Literal["visual", "fact", "format"]

KINDS: tuple[Kind, ...] = ("colour", "shape", "position", "count", "presence")
ERROR_TYPES: tuple[ErrorType, ...] = ("visual", "fact", "format")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPE_PARTS = {  # general knowledge about shapes, which needs no image
    "circle": "no corners",
    "square": "four corners",
    "triangle": "three corners",
    "star": "five points",
    "cross": "four arms",
    "ring": "one hole",
}
DARK_COLOURS = ("maroon", "brown", "olive", "green", "teal", "blue", "navy", "purple")  # all others are light
DESCRIBE = "Describe the image."
DESCRIBE_WITH_FACTS = "Describe the image, between facts about shapes and colours."
FACTS = 3  # facts on either side of a description, which make an answer of about 100 tokens
SCAN_SIDE = 8  # words along the edge of a scan: as many as the base encoder has patches


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its answer.

    Args:
        kind: Aspect of the scene that the question is about.
        text: Text of the question.
        answer: Right answer.
        wrong: The answer with one visual error.
        target: Index of the object that the question is about; None for a question about no single object.
    """

    kind: Kind
    text: str
    answer: str
    wrong: str
    target: int | None


@dataclass(frozen=True)
class Pair:
    """A preference pair: `rejected` is `chosen` with one error of the given kind."""

    kind: Kind
    form: Form
    question: str
    chosen: str
    rejected: str
    target: int | None


@dataclass(frozen=True)
class Fact:
    """A true sentence about shapes or colours in general, and a wrong one that differs in one word."""

    true: str
    wrong: str


def describe(objects: Sequence[SceneObject], count: int | None = None, keep_order: bool = False) -> str:
    """State how many objects there are, then name each in reading order.

    Args:
        objects: Objects to name.
        count: Number to state; the number of objects by default.
        keep_order: Whether to name the objects in the given order, so that moving one changes one place of the text.
    """
    ordered = list(objects) if keep_order else sorted(objects, key=lambda o: o.position)
    parts = [f"{_article(o.size)} {o.size} {o.name} {o.place}" for o in ordered]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{_there_are(len(ordered) if count is None else count, 'shape')}: {listed}."


def scan_grid(objects: Sequence[SceneObject], depth: Sequence[int], side: int, rng: np.random.Generator) -> str:
    """Name what lies at each cell of a grid, row by row, with one word: colour, shape or size, or `nothing`.

    A scan holds in words, one per cell, what image tokens hold: a language model that reads scans can read images.

    Args:
        objects: Objects of the scene.
        depth: Drawing order, back to front, as indices into `objects`.
        side: Number of cells along an edge; the text has side * side words.
        rng: Generator that draws which word of an object each cell gets.
    """
    words = []
    for row, column in itertools.product(range(side), repeat=2):
        x, y = (column + 0.5) / side, (row + 0.5) / side
        here = [i for i in depth if math.hypot(objects[i].x - x, objects[i].y - y) < objects[i].radius]
        if not here:
            words.append("nothing")
            continue
        front = objects[here[-1]]
        words.append((front.colour, front.colour, front.shape, front.shape, front.size)[int(rng.integers(5))])
    return " ".join(words)


def ask_question(objects: Sequence[SceneObject], kind: Kind, max_objects: int, rng: np.random.Generator) -> Question:
    """Ask about one aspect of a scene, with the right answer and one that holds a single error.

    Args:
        objects: Objects of the scene.
        kind: Aspect to ask about.
        max_objects: Largest number of objects in any scene of the dataset; a wrong number is at most one more.
        rng: Generator that draws the question and its wrong answer.
    """
    target = int(rng.integers(len(objects)))
    subject = objects[target]
    if kind == "colour":
        noun = _refer(objects, subject, "shape")
        wrong = _pick_other(COLOUR_NAMES, subject.colour, rng)
        text = f"What colour is the {noun}?"
        return Question(kind, text, f"It is {subject.colour}.", f"It is {wrong}.", target)
    if kind == "shape":
        noun = _refer(objects, subject, "colour")
        wrong = _pick_other(SHAPES, subject.shape, rng)
        text = f"What shape is the {noun}?"
        return Question(kind, text, f"It is a {subject.shape}.", f"It is a {wrong}.", target)
    if kind == "position":
        moved = replace(subject, position=int(rng.choice(_free_positions(objects))))
        text = f"Where is the {subject.name}?"
        return Question(kind, text, f"It is {subject.place}.", f"It is {moved.place}.", target)
    if kind == "count":
        return _count_question(objects, max_objects, rng)
    return _presence_question(objects, target, rng)


def ask_difference(
    objects: Sequence[SceneObject],
    others: Sequence[SceneObject],
    before: SceneObject | None,
    after: SceneObject | None,
    kind: Kind,
    rng: np.random.Generator,
) -> tuple[str, str, str]:
    """Ask about what differs between two scenes.

    Args:
        objects: Objects of the scene.
        others: Objects of the other scene, which has `after` in the place of `before`.
        before: The object that only the scene has; None where the other one has one more.
        after: The object that only the other scene has; None where it has one less.
        kind: What differs.
        rng: Generator that draws the question.

    Returns:
        The question, the answer that is right for the scene, and the one that is right for the other scene.
    """
    if kind == "count":
        changed = before or after
        assert changed is not None
        noun = ("shape", f"{changed.colour} shape", changed.shape)[int(rng.integers(3))]
        counts = [sum(noun in ("shape", f"{o.colour} shape", o.shape) for o in each) for each in (objects, others)]
        chosen, rejected = (f"{_there_are(count, noun)}." for count in counts)
        return f"How many {_plural(noun)} are there?", chosen, rejected
    assert before is not None
    assert after is not None
    if kind == "colour":
        noun = _refer(objects, before, "shape")
        return f"What colour is the {noun}?", f"It is {before.colour}.", f"It is {after.colour}."
    if kind == "shape":
        noun = _refer(objects, before, "colour")
        chosen, rejected = (f"It is {_article(o.shape)} {o.shape}." for o in (before, after))
        return f"What shape is the {noun}?", chosen, rejected
    if kind == "position":
        return f"Where is the {before.name}?", f"It is {before.place}.", f"It is {after.place}."
    name = (before, after)[int(rng.integers(2))].name
    article = _article(name)
    answers = [f"Yes, there is {article} {name}.", f"No, there is no {name}."]
    chosen, rejected = answers if name == before.name else reversed(answers)
    return f"Is there {article} {name}?", chosen, rejected


def draw_pair(
    objects: Sequence[SceneObject], kind: Kind, form: Form, max_objects: int, rng: np.random.Generator
) -> Pair:
    """Draw a preference pair with one error of `kind`, in an answer or inside a whole description.

    Args:
        objects: Objects of the scene.
        kind: Aspect of the scene that the error is about.
        form: Form of the pair: a question with its answers, or two descriptions.
        max_objects: Largest number of objects in any scene of the dataset; a wrong number is at most one more.
        rng: Generator that draws the pair.
    """
    if form == "question":
        question = ask_question(objects, kind, max_objects, rng)
        return Pair(kind, form, question.text, question.answer, question.wrong, question.target)
    changed = list(objects)
    target = int(rng.integers(len(objects)))
    subject = objects[target]
    free = _free_positions(objects)
    if kind == "colour":
        changed[target] = replace(subject, colour=_pick_other(COLOUR_NAMES, subject.colour, rng))
        rejected = describe(changed)
    elif kind == "shape":
        changed[target] = replace(subject, shape=_pick_other(SHAPES, subject.shape, rng))
        rejected = describe(changed)
    elif kind == "position":
        changed[target] = replace(subject, position=int(rng.choice(free)))
        rejected = describe(changed, keep_order=True)
    elif kind == "count":  # only the stated number is wrong
        rejected = describe(objects, count=_off_by_one(len(objects), 1, max_objects + 1, rng))
    else:  # presence: an object that is not in the scene is added, and counted in the stated number
        rejected = describe([*objects, _absent_object(objects, subject, free, rng)])
    has_target = kind in ("colour", "shape", "position")
    return Pair(kind, form, DESCRIBE, describe(objects), rejected, target if has_target else None)


def add_fact(pair: Pair, error_type: ErrorType, rng: np.random.Generator) -> Pair:
    """Put a fact after each answer of a pair, so that only an error of the given type tells chosen from rejected.

    Args:
        pair: Pair whose rejected answer holds a visual error.
        error_type: Error of the rejected answer: `visual`, the pair's own error; `fact`, a wrong fact; `format`, a
            repeated word, no initial capital, or no final full stop.
        rng: Generator that draws fact and format error; the fact does not depend on the error type.
    """
    fact = draw_fact(rng)
    chosen = f"{pair.chosen} {fact.true}"
    rejected = {
        "visual": f"{pair.rejected} {fact.true}",
        "fact": f"{pair.chosen} {fact.wrong}",
        "format": _break_format(chosen, rng),
    }
    return replace(pair, chosen=chosen, rejected=rejected[error_type])


def draw_fact(rng: np.random.Generator) -> Fact:
    """Draw one of the facts about shapes and colours, with a wrong version that differs in one word."""
    if rng.integers(2):
        shape = pick(SHAPES, rng)
        number, part = SHAPE_PARTS[shape].split()
        wrong = _pick_other(NUMBERS, number, rng)
        return Fact(*(f"{_article(shape).capitalize()} {shape} has {n} {part}." for n in (number, wrong)))
    colour = pick(COLOUR_NAMES, rng)
    shades = ("dark", "light") if colour in DARK_COLOURS else ("light", "dark")
    return Fact(*(f"{colour.capitalize()} is a {shade} colour." for shade in shades))


def put_between_facts(answers: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Put each answer between the same true facts, which need no image.

    Args:
        answers: Answers about a scene, such as the two of a preference pair.
        rng: Generator that draws the facts, FACTS on either side.
    """
    facts = [draw_fact(rng).true for _ in range(2 * FACTS)]
    return [" ".join([*facts[:FACTS], answer, *facts[FACTS:]]) for answer in answers]


def _refer(objects: Sequence[SceneObject], subject: SceneObject, by: Literal["shape", "colour"]) -> str:
    """Name an object by one attribute, and by its place too where the attribute is not unique."""
    value = getattr(subject, by)
    noun = value if by == "shape" else f"{value} shape"
    unique = sum(getattr(o, by) == value for o in objects) == 1
    return noun if unique else f"{noun} {subject.place}"


def _count_question(objects: Sequence[SceneObject], max_objects: int, rng: np.random.Generator) -> Question:
    counted = ("all", "colour", "shape")[int(rng.integers(3))]
    if counted == "all":
        noun, count = "shape", len(objects)
        wrong = _off_by_one(count, 1, max_objects + 1, rng)
    elif counted == "colour":
        colour = _mostly_present(objects, "colour", COLOUR_NAMES, rng)
        noun, count = f"{colour} shape", sum(o.colour == colour for o in objects)
        wrong = _off_by_one(count, 0, 3, rng)
    else:
        noun = _mostly_present(objects, "shape", SHAPES, rng)
        count = sum(o.shape == noun for o in objects)
        wrong = _off_by_one(count, 0, 3, rng)
    text = f"How many {_plural(noun)} are there?"
    return Question("count", text, f"{_there_are(count, noun)}.", f"{_there_are(wrong, noun)}.", None)


def _presence_question(objects: Sequence[SceneObject], target: int, rng: np.random.Generator) -> Question:
    names = {o.name for o in objects}
    present = bool(rng.integers(2))
    if present:
        name = objects[target].name
    else:  # half of the absent objects share a colour or a shape with the scene, so that the combination must be seen
        while True:
            colour, shape = pick(COLOUR_NAMES, rng), pick(SHAPES, rng)
            shared = int(rng.integers(4))
            colour = objects[target].colour if shared == 0 else colour
            shape = objects[target].shape if shared == 1 else shape
            name = f"{colour} {shape}"
            if name not in names:
                break
    article = _article(name)
    yes, no = f"Yes, there is {article} {name}.", f"No, there is no {name}."
    answer, wrong = (yes, no) if present else (no, yes)
    return Question("presence", f"Is there {article} {name}?", answer, wrong, target if present else None)


def _mostly_present(
    objects: Sequence[SceneObject], attribute: str, values: Sequence[str], rng: np.random.Generator
) -> str:
    """Draw a value of an attribute: three times in four from an object of the scene, otherwise from all values."""
    if rng.integers(4):
        return str(getattr(objects[int(rng.integers(len(objects)))], attribute))
    return pick(values, rng)


def _absent_object(
    objects: Sequence[SceneObject], template: SceneObject, free: Sequence[int], rng: np.random.Generator
) -> SceneObject:
    """Draw an object that the scene does not hold, at a free position."""
    names = {o.name for o in objects}
    while True:
        colour, shape = pick(COLOUR_NAMES, rng), pick(SHAPES, rng)
        if f"{colour} {shape}" not in names:
            break
    position = int(rng.choice(free))
    return replace(template, position=position, colour=colour, shape=shape, size=pick(tuple(SIZES), rng))


def _free_positions(objects: Sequence[SceneObject]) -> list[int]:
    taken = {o.position for o in objects}
    return [i for i in range(len(POSITIONS)) if i not in taken]


def _break_format(text: str, rng: np.random.Generator) -> str:
    """Return the same words without initial capital, without final full stop, or with one word repeated."""
    error = ("capital", "full stop", "repeated word")[int(rng.integers(3))]
    if error == "capital":
        return text[0].lower() + text[1:]
    if error == "full stop":
        return text.removesuffix(".")
    words = text.split(" ")
    repeated = int(rng.integers(len(words)))
    return " ".join([*words[: repeated + 1], *words[repeated:]])


def _pick_other(values: Sequence[str], value: str, rng: np.random.Generator) -> str:
    return pick([v for v in values if v != value], rng)


def _off_by_one(count: int, low: int, high: int, rng: np.random.Generator) -> int:
    """Draw a number that differs from the count by one and lies within low..high."""
    return int(rng.choice([c for c in (count - 1, count + 1) if low <= c <= high]))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _there_are(count: int, noun: str) -> str:
    if count == 1:
        return f"There is one {noun}"
    return f"There are {NUMBERS[count]} {_plural(noun)}"
