"""Reward: the completion is not too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pivot_hub.training.rewards.completion import Completion


def length(
    completions: Sequence[Completion],
    *,
    longest: int,
    zero_at: int,
    completion_ids: Sequence[Sequence[int]] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """Reward short completions: 1 up to `longest` tokens, then falling linearly to 0 at `zero_at` tokens.

    Of n tokens, (zero_at - n) / (zero_at - longest), limited to 0..1. This is the soft overlong punishment of DAPO
    (Yu et al. 2025, equation 13), which goes from 0 to -1, raised by 1.

    Args:
        completions: The completions.
        longest: Largest number of tokens with the full reward.
        zero_at: Smallest number of tokens without any.
        completion_ids: The tokens of each completion, which TRL hands to every reward.
        kwargs: Columns of the rows, which are not read.

    Returns:
        A number from 0 to 1 for each row; None for all where the tokens are not known.

    Raises:
        ValueError: `zero_at` is not above `longest`, or `longest` is negative.
    """
    if not 0 <= longest < zero_at:
        raise ValueError(f"`longest` is {longest} and `zero_at` {zero_at}; give 0 <= longest < zero_at")
    if completion_ids is None:
        return [None] * len(completions)
    return [min(1.0, max(0.0, (zero_at - len(ids)) / (zero_at - longest))) for ids in completion_ids]
