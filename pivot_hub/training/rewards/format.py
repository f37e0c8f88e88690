"""Reward: the completion has the form that was asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pivot_hub.training.rewards.completion import Completion, text_of

ANSWER_TAGS = r"(<think>.*</think>\s*)?<answer>((?!</?answer>).)+</answer>"


def format(completions: Sequence[Completion], *, pattern: str = ANSWER_TAGS, **kwargs: Any) -> list[float | None]:
    """Reward a form: 1 if the whole completion matches a pattern, otherwise 0.

    Args:
        completions: The completions, whose spaces at both ends do not count.
        pattern: A regular expression, whose dot matches newlines too. By default an answer in `<answer>` tags, which
            `<think>` tags may precede, the form of DeepSeek-R1 (Guo et al. 2025, table 1).
        kwargs: Columns of the rows, which are not read.

    Returns:
        0 or 1 for each row.

    Raises:
        re.error: The pattern is no regular expression.
    """
    whole = re.compile(pattern, re.DOTALL)
    return [float(whole.fullmatch(text_of(completion).strip()) is not None) for completion in completions]
