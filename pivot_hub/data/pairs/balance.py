"""Rows are left out until no answer is right more often than it is wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from pivot_hub.data.pairs.pair_row import PairRow, Unit
from pivot_hub.data.pairs.photos import SPLITS

FREQUENT = 5  # answers of so many rows of a split are balanced; a rarer one tells little about other rows
UNBALANCED = "rows whose answer is right more often than wrong"  # a reason to leave rows out
AnswerNames = Callable[[PairRow], Sequence[tuple[str, str]]]


def balance(units: Sequence[Unit], names: AnswerNames, rng: np.random.Generator, slack: float = 0) -> list[Unit]:
    """Leave out rows until frequent answers are about as often right as wrong, in each split.

    A row adds one to how often its chosen answer is right beyond how often it is wrong, and takes one from its rejected
    answer. It is left out where that brings them nearer to zero, or to what chance alone leaves: for an answer of n
    rows that is right as often as wrong, a deviation of sqrt(n).

    Args:
        units: Units, whose rows are left out one by one.
        names: Function that names the chosen and the rejected answer of a row, in one or several ways that are all
            balanced.
        rng: Random numbers.
        slack: Number of such deviations that an answer may keep.
    """
    kept: list[Unit] = []
    for split in SPLITS:
        rows = [(i, row) for i, unit in enumerate(units) for row in unit if row.split == split]
        answers = Counter(name for _, row in rows for pair in names(row) for name in pair)
        surplus = Counter({answer: 0 for answer, count in answers.items() if count >= FREQUENT})
        allowed = {answer: slack * math.sqrt(answers[answer]) for answer in surplus}
        for _, row in rows:
            _count(surplus, names(row), 1)

        def excess(answer: str, surplus: Counter[str] = surplus, allowed: dict[str, float] = allowed) -> float:
            beyond = max(abs(surplus[answer]) - allowed.get(answer, 0), 0)
            return math.copysign(beyond, surplus[answer])

        before = len(rows) + 1
        while len(rows) < before:
            before = len(rows)
            remaining = []
            for k in rng.permutation(len(rows)):
                i, row = rows[k]
                if any(excess(chosen) - excess(rejected) > 1 for chosen, rejected in names(row)):
                    _count(surplus, names(row), -1)
                else:
                    remaining.append((i, row))
            rows = remaining
        by_unit: dict[int, list[PairRow]] = {}
        for i, row in sorted(rows, key=lambda one: (one[0], one[1].rejected)):
            by_unit.setdefault(i, []).append(row)
        kept += [tuple(unit) for unit in by_unit.values()]
    return kept


def _count(surplus: Counter[str], pairs: Sequence[tuple[str, str]], change: int) -> None:
    for chosen, rejected in pairs:
        for answer, sign in ((chosen, change), (rejected, -change)):
            if answer in surplus:
                surplus[answer] += sign
