"""Reward: the answer is the right one, word for word or as the option that it means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pivot_hub.data.choices import chosen_letter, options_in, plain
from pivot_hub.training.rewards.completion import Completion, answers_with, text_of

_VERDICT = re.compile(r"(yes|no)(?=[,.;:]|$)")


def exact_match(
    completions: Sequence[Completion],
    *,
    solution: Sequence[str | None] | None = None,
    kind: Sequence[str | None] | None = None,
    prompts: Sequence[Completion] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reward the right answer: 1 if the answer is the solution, otherwise 0.

    Where the question lists options, one per line, the answer is right if it means the option that the solution means
    (`data.choices.chosen_letter`). Where the solution says yes or no, alone or before a comma, the answer's first word
    decides. Otherwise both are compared without case, doubled spaces and final full stops.

    Args:
        completions: The completions; of one with `<answer>` tags, what they enclose is the answer.
        solution: The right answers.
        kind: Kinds of the questions; rows of kind `box` are left to `box_iou`.
        prompts: The prompts, whose last user turn is the question.
        kwargs: Other columns, which are not read.

    Returns:
        0 or 1 for each row; None for one without a solution, or of kind `box`.
    """
    return [_score(*row) for row in answers_with(completions, solution, kind, prompts)]


def _score(answer: str, solution: str | None, kind: str | None, prompt: Completion | None) -> float | None:
    if solution is None or not plain(solution) or kind == "box":
        return None
    options = options_in(text_of(prompt, "user")) if prompt is not None else {}
    if right_letter := chosen_letter(solution, options):
        return float(chosen_letter(answer, options) == right_letter)
    if verdict := _VERDICT.match(plain(solution)):
        given = _VERDICT.match(plain(answer))
        return float(given is not None and given[1] == verdict[1])
    return float(plain(answer) == plain(solution))
