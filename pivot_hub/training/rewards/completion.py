"""Completions as TRL hands them to rewards, and the answers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def text_of(completion: Completion, role: str = "assistant") -> str:
    """Return a text, or that of the last message of a role; an empty text where there is no such message.

    Args:
        completion: A text, or messages whose content is a text or a list of parts.
        role: The role whose message counts.
    """
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion if message.get("role") == role]
    content = contents[-1] if contents else None
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content)


def answer_of(completion: Completion) -> str:
    """Return what the last pair of `<answer>` tags encloses, or the whole text where there is no such pair."""
    text = text_of(completion)
    enclosed = _ANSWER.findall(text)
    return enclosed[-1] if enclosed else text


def answers_with(completions: Sequence[Completion], *columns: Sequence[Any] | None) -> Iterator[tuple[Any, ...]]:
    """Yield the answer of each completion with the row's value of each column.

    Args:
        completions: One completion a row.
        columns: Values of the rows; None for a column that the rows do not have, whose values are None.
    """
    filled = [[None] * len(completions) if column is None else column for column in columns]
    return zip(map(answer_of, completions), *filled, strict=True)
