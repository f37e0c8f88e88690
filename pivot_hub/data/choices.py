"""Rules that find which option of a multiple-choice question an answer means."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

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
    return dict(option_lines(question))


def option_lines(question: str) -> list[tuple[str, str]]:
    """Return letter and text of each line of a question that is an option."""
    return [((a or b).upper(), text) for a, b, text in _OPTION.findall(question)]


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
    same = [k for k, option in options.items() if plain(text) in (plain(option), plain(f"{k} {option}"))]
    worded = same[0] if len(same) == 1 else None
    # The words of an option take precedence over marked letters, because an option may be "A. Smith".
    return next((letter for letter in (alone, worded, *others) if letter in options), None)


def same_choice(answer: str, right: str, question: str) -> bool:
    """Return whether an answer means the same option as the right answer, in whatever form that is written."""
    options = options_in(question)
    right_letter = chosen_letter(right, options)
    return right_letter is not None and chosen_letter(answer, options) == right_letter


def plain(text: str) -> str:
    """Return a text without case, doubled spaces, and spaces and full stops at its ends."""
    return " ".join(text.casefold().split()).strip(" .")
