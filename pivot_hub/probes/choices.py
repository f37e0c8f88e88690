"""Rules that find which option of a multiple-choice question an answer means, and functions for lmms-eval tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from PIL import Image

# One option per line: "(A) yes", "A. yes", "A: yes" or "A) yes".
_OPTION = re.compile(r"^\s*(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+(\S.*?)\s*$", re.MULTILINE)
_MARKED = re.compile(r"\(([A-Za-z])\)")
# A letter alone, a marked letter at the start, and a letter that the text calls the answer. A bare "a" elsewhere may
# be an article.
_LETTER = (
    re.compile(r"\(?([A-Za-z])\)?[.:]?$"),
    re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s))"),
    re.compile(r".*\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is|:)? \(?((?<=\()[A-Za-z]|[A-Z])(?![\w'])", re.DOTALL),
)


def options_in(question: str) -> dict[str, str]:
    """Return the options that a question lists, one per line, keyed by their letter."""
    return {(a or b).upper(): text for a, b, text in _OPTION.findall(question)}


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Key options by the letters A, B, ... in their order."""
    return dict(zip(ascii_uppercase, options, strict=False))


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Find the letter of the option that an answer means.

    `(B)`, `b`, `B.`, `B) no`, `The answer is B.`, `B no` and the option's own words mean B.

    Args:
        answer: Text of the answer.
        options: Text of each option, keyed by its capital letter.

    Returns:
        A key of `options`, or None if the answer means no option or names several.
    """
    text = answer.strip()
    if len({letter.upper() for letter in _MARKED.findall(text)} & options.keys()) > 1:
        return None
    alone, *others = (match[1].upper() if (match := pattern.match(text)) else None for pattern in _LETTER)
    same = [k for k, option in options.items() if _plain(text) in (_plain(option), _plain(f"{k} {option}"))]
    worded = same[0] if len(same) == 1 else None
    # The words of an option take precedence over marked letters, because an option may be "A. Smith".
    return next((letter for letter in (alone, worded, *others) if letter in options), None)


def same_choice(answer: str, right: str, question: str) -> bool:
    """Return whether an answer means the same option as the right answer, in whatever form that is written."""
    options = options_in(question)
    right_letter = chosen_letter(right, options)
    return right_letter is not None and chosen_letter(answer, options) == right_letter


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


# Functions that an lmms-eval task names in its YAML file, for rows of `image`, `question` and `answer`.


def show(row: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a row, for `doc_to_visual`."""
    return [row["image"].convert("RGB")]


def score_choice(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Score whether the answer means the right option among those in the question, for `process_results`."""
    return {"accuracy": float(same_choice(answers[0], row["answer"], row["question"]))}


def score_words(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Score whether the answer equals the right one word for word, ignoring case, for `process_results`."""
    return {"exact_match": float(answers[0].strip().casefold() == row["answer"].casefold())}
