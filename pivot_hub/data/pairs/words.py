"""Questions and answers about classes, in words."""

from __future__ import annotations

import re

IRREGULAR = {
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "mouse": "mice",
    "knife": "knives",
    "shelf": "shelves",
    "sheep": "sheep",
    "fish": "fish",
    "aircraft": "aircraft",
}
PAIRED = {"eyeglasses", "glasses", "jeans", "pants", "scissors", "shorts", "skis", "sunglasses", "trousers"}

A_BEFORE_VOWEL = re.compile(r"uni(?!n)|us[ae]|eu|ewe|one\b", re.IGNORECASE)  # which begin with a consonant's sound
AN_BEFORE_H = re.compile(r"hour|heir|honest", re.IGNORECASE)


def noun(name: str) -> str:
    """Return the words of a class name: `traffic_light` is a traffic light, and `skis` a pair of skis."""
    words = " ".join(name.replace("_", " ").split())
    return f"pair of {words}" if words.casefold() in PAIRED else words


def with_article(name: str) -> str:
    """Return the words of a class name with `a` or `an`."""
    words = noun(name)
    vowel = words[:1].casefold() in tuple("aeiou") and not A_BEFORE_VOWEL.match(words)
    return f"{'an' if vowel or AN_BEFORE_H.match(words) else 'a'} {words}"


def plural(name: str) -> str:
    """Return the words of a class name in the plural."""
    words = noun(name)
    if words != name and words.startswith("pair of "):
        return words.replace("pair", "pairs", 1)
    start, space, last = words.rpartition(" ")
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith("man") and last not in ("human", "german", "roman"):
        last = f"{last[:-3]}men"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return start + space + last


def presence_question(name: str) -> tuple[str, str, str]:
    """Return the question whether a class is in an image, and its answers if it is and if it is not."""
    return (
        f"Is there {with_article(name)} in the image?",
        f"Yes, there is {with_article(name)} in the image.",
        f"No, there is no {noun(name)} in the image.",
    )


def count_question(name: str) -> str:
    """Return the question for the number of objects of a class."""
    return f"How many {plural(name)} are in the image?"


def count_answer(name: str, count: int) -> str:
    """Return the answer that an image holds a number of objects of a class."""
    return f"There is 1 {noun(name)}." if count == 1 else f"There are {count} {plural(name)}."


def side_question(name: str, other: str) -> tuple[str, str, str]:
    """Return the question on which side of another object one is, and its answers if it is left and if it is right."""
    question = f"Is the {noun(name)} to the left or to the right of the {noun(other)}?"
    left, right = (f"The {noun(name)} is to the {side} of the {noun(other)}." for side in ("left", "right"))
    return question, left, right


def size_question(name: str, other: str) -> tuple[str, str, str]:
    """Return the question which of two objects is larger, and its answers if it is the first and if it is the other."""
    question = f"Which of the two takes up more of the image, the {noun(name)} or the {noun(other)}?"
    return question, f"The {noun(name)}.", f"The {noun(other)}."


def box_question(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Return the question what is in a box, in pixels of an image of (width, height)."""
    corners = ", ".join(f"{side:.0f}" for side in box)
    return (
        f"What is in the box [{corners}]? The image is {size[0]} x {size[1]} pixels, and the box is [x1, y1, x2, y2]."
    )


def box_answer(name: str) -> str:
    """Return the answer that a box holds an object of a class."""
    words = with_article(name)
    return f"{words[0].upper()}{words[1:]}."


def short_answers(kind: str, answer: str) -> tuple[str, ...]:
    """Return the short forms in which the answer of a question is given, the most usual first.

    Args:
        kind: presence, count, position, size or box.
        answer: The answer, as the functions above write it.
    """
    if kind == "presence":
        return (answer.partition(",")[0],)
    if kind == "count":
        return (answer.split()[2],)
    if kind == "position":
        side = answer.partition(" is to the ")[2].split()[0]
        return side.capitalize(), f"To the {side}", f"On the {side}", answer
    return noun_forms(answer.rstrip(".").partition(" ")[2])


def noun_forms(words: str) -> tuple[str, ...]:
    """Return the forms in which a class is named, from its words: `Dog`, `A dog`, `The dog`."""
    if words.startswith("pair of "):
        single = words.removeprefix("pair of ")
        return f"{single[0].upper()}{single[1:]}", f"The {single}", f"A {words}", f"The {words}"
    return f"{words[0].upper()}{words[1:]}", f"A {words}", f"An {words}", f"The {words}"
