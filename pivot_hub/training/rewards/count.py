"""Reward: the number in the answer, with partial credit for one that is near."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pivot_hub.data.choices import plain
from pivot_hub.data.synthetic import NUMBERS
from pivot_hub.training.rewards.completion import Completion, answers_with

_DIGITS = re.compile(r"-?\b\d{1,9}\b")
_VALUES = {"zero": 0, **{word: value for value, word in enumerate(NUMBERS) if value}}
_NOTHING = {"no", "none", "nothing"}


def count(
    completions: Sequence[Completion],
    *,
    solution: Sequence[str | None] | None = None,
    kind: Sequence[str | None] | None = None,
    within: int = 3,
    **kwargs: Any,
) -> list[float | None]:
    """Reward the right number, and a near one in part: max(0, 1 - distance / within), from 0 to 1.

    A number is written in digits or as a word from zero to nine; `no`, `none` and `nothing` are 0 in a text without
    another number. An answer without a number, or with several different ones, gets 0.

    Args:
        completions: The completions; of one with `<answer>` tags, what they enclose is the answer.
        solution: The right answers, which hold one number.
        kind: Kinds of the questions: rows of kind `count` and `describe` are scored. Of a row without a kind, the
            solution must be a number and nothing else.
        within: Distance from which on the reward is 0; 1 rewards the right number alone.
        kwargs: Other columns, which are not read.

    Returns:
        A number from 0 to 1 for each row; None for one whose solution does not count.

    Raises:
        ValueError: `within` is below 1.
    """
    if within < 1:
        raise ValueError(f"`within` is {within}; give 1 or more")
    return [_score(within, *row) for row in answers_with(completions, solution, kind)]


def _score(within: int, answer: str, solution: str | None, kind: str | None) -> float | None:
    if solution is None or kind not in (None, "count", "describe"):
        return None
    alone = plain(solution)
    if kind is None and alone not in _VALUES and not _DIGITS.fullmatch(alone):
        return None
    right, given = number_in(solution), number_in(answer)
    if right is None:
        return None
    return 0.0 if given is None else max(0.0, 1 - abs(given - right) / within)


def number_in(text: str) -> int | None:
    """Return the only number of a text, or None where there is none, or several different ones."""
    words = set(re.findall(r"[a-z]+", text.casefold()))
    numbers = {int(digits) for digits in _DIGITS.findall(text)} | {_VALUES[word] for word in words & _VALUES.keys()}
    if not numbers and words & _NOTHING:
        return 0
    return numbers.pop() if len(numbers) == 1 else None
