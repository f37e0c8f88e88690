"""Which option of a multiple-choice question an answer means, by rule; and such questions as an lmms-eval task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from PIL import Image

# An option a line: "(A) yes", "A. yes", "A: yes" or "A) yes".
_OPTION = re.compile(r"^\s*(?:\(([A-Za-z])\)|([A-Za-z])[.:)])\s+(\S.*?)\s*$", re.MULTILINE)
_MARKED = re.compile(r"\(([A-Za-z])\)")
# A letter alone, a marked letter first, and a letter that is said to be the answer: a bare "a" may be an article.
_LETTER = (
    re.compile(r"\(?([A-Za-z])\)?[.:]?$"),
    re.compile(r"\(?([A-Za-z])(?:\)|[.:](?=\s))"),
    re.compile(r".*\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?: is|:)? \(?((?<=\()[A-Za-z]|[A-Z])(?![\w'])", re.DOTALL),
)


def options_in(question: str) -> dict[str, str]:
    """The options that a question's text lists, a line each, by their letter."""
    return {(a or b).upper(): text for a, b, text in _OPTION.findall(question)}


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Options by the letters A, B, ... in their order."""
    return dict(zip(ascii_uppercase, options, strict=False))


def chosen_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer means.

    `(B)`, `b`, `B.`, `B) no`, `The answer is B.`, `B no` and the option's own words mean B.

    Args:
        answer: what was said.
        options: text of each option by its letter, in capitals.

    Returns:
        A key of the options; None where the answer means none of them, or names several.
    """
    said = answer.strip()
    if len({letter.upper() for letter in _MARKED.findall(said)} & options.keys()) > 1:
        return None
    alone, *others = (found[1].upper() if (found := pattern.match(said)) else None for pattern in _LETTER)
    same = [k for k, text in options.items() if _plain(said) in (_plain(text), _plain(f"{k} {text}"))]
    worded = same[0] if len(same) == 1 else None
    # Words stand before marked letters: an option may be "A. Smith".
    return next((letter for letter in (alone, worded, *others) if letter in options), None)


def same_choice(answer: str, right: str, question: str) -> bool:
    """Whether an answer means the option that the right answer, in whatever form, means."""
    options = options_in(question)
    wanted = chosen_letter(right, options)
    return wanted is not None and chosen_letter(answer, options) == wanted


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


# What an lmms-eval task names in its YAML, for rows of `image`, `question` and `answer`.


def show(row: dict[str, Any]) -> list[Image.Image]:
    """`doc_to_visual`: the row's image."""
    return [row["image"].convert("RGB")]


def score_choice(row: dict[str, Any], said: Sequence[str]) -> dict[str, float]:
    """`process_results`: whether the answer means the right option of those in the question."""
    return {"accuracy": float(same_choice(said[0], row["answer"], row["question"]))}


def score_words(row: dict[str, Any], said: Sequence[str]) -> dict[str, float]:
    """`process_results`: whether the answer is the right one word for word, whatever its case."""
    return {"exact_match": float(said[0].strip().casefold() == row["answer"].casefold())}
