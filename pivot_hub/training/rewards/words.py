"""Rewards: the words for colours, shapes and positions of the synthetic Shapes dataset that an answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pivot_hub.data.synthetic import COLOUR_NAMES, POSITIONS, SHAPES
from pivot_hub.training.rewards.completion import Completion, answers_with

Texts = Sequence[str | None] | None


def colour(
    completions: Sequence[Completion], *, solution: Texts = None, kind: Texts = None, **kwargs: Any
) -> list[float | None]:
    """Reward the colour words of the solution (`data.synthetic.COLOUR_NAMES`): 1 if the answer names them, otherwise 0.

    An answer must name the same words as often, in any order, and no other; one word may be repeated. Case, a plural s
    and hyphens do not count.

    Args:
        completions: The completions; of one with `<answer>` tags, what they enclose is the answer.
        solution: The right answers.
        kind: Kinds of the questions: rows of kind `colour` and `describe`, and rows without a kind, are scored.
        kwargs: Other columns, which are not read.

    Returns:
        0 or 1 for each row; None for one of another kind, or whose solution has no such word.
    """
    return [_score("colour", COLOUR_NAMES, *row) for row in answers_with(completions, solution, kind)]


def shape(
    completions: Sequence[Completion], *, solution: Texts = None, kind: Texts = None, **kwargs: Any
) -> list[float | None]:
    """Reward the shape words of the solution (`data.synthetic.SHAPES`) as `colour` does, for rows of kind `shape`."""
    return [_score("shape", SHAPES, *row) for row in answers_with(completions, solution, kind)]


def position(
    completions: Sequence[Completion], *, solution: Texts = None, kind: Texts = None, **kwargs: Any
) -> list[float | None]:
    """Reward the position words of the solution (`data.synthetic.POSITIONS`) as `colour` does, for kind `position`.

    `top left` is one position and neither `top` nor `left`; `center` is read as `centre`.
    """
    return [_score("position", POSITIONS, *row) for row in answers_with(completions, solution, kind)]


def _score(
    own_kind: str, vocabulary: tuple[str, ...], answer: str, solution: str | None, kind: str | None
) -> float | None:
    right = _words_in(solution or "", vocabulary)
    if kind not in (None, own_kind, "describe") or not right:
        return None
    given = _words_in(answer, vocabulary)
    return float(given == right or (len(right) == 1 and set(given) == set(right)))


def _words_in(text: str, vocabulary: tuple[str, ...]) -> list[str]:
    """Return the words of a vocabulary that a text names, sorted, each as often as it is named."""
    spaced = " ".join(text.casefold().replace("-", " ").replace("center", "centre").split())
    return sorted(_pattern(vocabulary).findall(spaced))


@lru_cache
def _pattern(vocabulary: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(vocabulary, key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(longest_first)})(?:e?s)?\b")
