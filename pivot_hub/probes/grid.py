"""Choice of a setting from a grid, which is continued where its end is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from pivot_hub.errors import ProbeError

T = TypeVar("T")
MORE = 6  # values that a grid is continued by at an end: three orders of magnitude in steps of half of one


@dataclass(frozen=True)
class Choice(Generic[T]):
    """The chosen setting.

    Args:
        value: The setting.
        fit: What was fitted with the setting.
        at_end: Whether a still smaller or larger setting may be better, because none was tried.
    """

    value: float
    fit: T
    at_end: bool

    def __str__(self) -> str:
        return described(self.value, self.at_end)


def described(value: float, at_end: bool) -> str:
    """Write a chosen setting for a protocol, and say whether it is at the end of its grid."""
    return f"{value:g} (the end of the grid)" if at_end else f"{value:g}"


def choose(
    grid: Sequence[float], fit: Callable[[Sequence[float]], Sequence[T]], score: Callable[[T], float]
) -> Choice[T]:
    """Fit every setting of a grid and choose the best; among equals the smallest.

    While the best is the first or the last and better than the value beside it, the grid is continued there by 1, 3.16,
    10, 31.6, 100 and so on, by MORE values at most.

    Args:
        grid: Settings in ascending order.
        fit: Function that fits settings and returns their fits in the same order.
        score: Function that returns the score of a fit on data that it was not fitted on.
    """
    fits = dict(zip(grid, fit(grid), strict=True))
    scores = {value: score(f) for value, f in fits.items()}
    low = high = 0
    while True:
        best = max(scores, key=lambda value: (scores[value], -value))
        at_low, at_high = best == min(scores), best == max(scores)
        if at_low and not at_high:  # the smallest may only be chosen because it equals the one beside it
            at_low = scores[best] > scores[sorted(scores)[1]]
        if not ((at_low and low < MORE) or (at_high and high < MORE)):
            return Choice(best, fits[best], at_low or at_high)
        low, high = low + at_low, high + at_high
        power = (round(2 * math.log10(best)) + (1 if at_high else -1)) / 2
        more = float(f"{10**power:.3g}")
        try:
            (fits[more],) = fit([more])
        except ProbeError:  # far from the grid a fit may not converge
            return Choice(best, fits[best], True)
        scores[more] = score(fits[more])
