"""A probe that reads the text of preference rows and no image: how often it tells the chosen answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from scipy.stats import binomtest
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression

from pivot_hub.data.pairs.pair_row import PairRow, Unit
from pivot_hub.errors import DataError

CHANCE_PCT = 50.0
FEWEST_UNITS = 20  # that are measured
MOST_UNITS = 20_000  # that are measured, drawn by the seed
FOLDS = 5
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class BlindAccuracy:
    """How often a model of text alone tells which of two answers is chosen.

    Args:
        group: Kind of the rows, and how their images differ.
        rows: Number of rows that were measured.
        accuracy_pct: Share of the rows, in percent; None where there are fewer than FEWEST_UNITS units.
        ci95: Its 95% interval in percent, of a binomial distribution over units.
    """

    group: str
    rows: int
    accuracy_pct: float | None
    ci95: tuple[float, float] | None

    def exceeds(self, margin_pct: float) -> bool:
        """Return whether the lower end of the interval is more than a margin above chance."""
        return self.ci95 is not None and self.ci95[0] > CHANCE_PCT + margin_pct

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "chance_pct": CHANCE_PCT}


def measure_blind(units: Sequence[Unit], seed: int) -> list[BlindAccuracy]:
    """Measure each group of rows by 5-fold cross-validation; the rows of a unit are in one fold.

    The model is a logistic regression on the difference of the answers: their words, each word of an answer together
    with each word of the question, the whole answer, and its length.

    Args:
        units: Units of rows.
        seed: Seed of the folds.
    """
    groups: dict[str, list[Unit]] = {}
    for unit in units:
        groups.setdefault(unit[0].group, []).append(unit)
    return [_measure(group, of_group, seed) for group, of_group in sorted(groups.items())]


def check_blind(accuracies: Sequence[BlindAccuracy], margin_pct: float) -> None:
    """Refuse rows whose answers a model of text alone tells apart beyond a margin.

    Args:
        accuracies: Measured accuracies.
        margin_pct: Percentage points above chance that the lower end of an interval may reach.

    Raises:
        DataError: A group is beyond the margin.
    """
    for one in accuracies:
        if one.ci95 is not None and one.exceeds(margin_pct):
            raise DataError(
                f"{one.group}: a probe that reads no image tells chosen from rejected in {one.accuracy_pct}% of "
                f"{one.rows} rows [{one.ci95[0]}, {one.ci95[1]}], more than {margin_pct:g} points above chance: a "
                "model could learn the answers without looking. Leave this kind out by --kinds, give data whose "
                "answers vary, or write it anyway by --allow-priors. Nothing was written."
            )


def _measure(group: str, units: Sequence[Unit], seed: int) -> BlindAccuracy:
    rng = np.random.default_rng(seed)
    drawn = [units[i] for i in rng.permutation(len(units))[:MOST_UNITS]]
    rows = [row for unit in drawn for row in unit]
    if len(drawn) < FEWEST_UNITS:
        return BlindAccuracy(group, len(rows), None, None)
    folds = np.repeat(np.arange(len(drawn)) % FOLDS, [len(unit) for unit in drawn])
    signs = rng.choice([-1, 1], len(rows))  # the model has two classes: chosen first, or rejected first
    signs[0], signs[-1] = 1, -1
    differences = _differences(rows)
    right = np.empty(len(rows))
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        model = LogisticRegression(fit_intercept=False, max_iter=500)
        model.fit(differences[train].multiply(signs[train, None]).tocsr(), signs[train])
        scores = model.decision_function(differences[test])
        right[test] = (scores > 0) + 0.5 * (scores == 0)
    share = float(right.mean())
    interval = binomtest(round(share * len(drawn)), len(drawn)).proportion_ci()
    low, high = (round(100 * float(end), 1) for end in (interval.low, interval.high))
    return BlindAccuracy(group, len(rows), round(100 * share, 1), (low, high))


def _differences(rows: Sequence[PairRow]) -> csr_matrix:
    """Return the features of each row's chosen answer, minus those of its rejected one: (rows, features)."""
    vectorizer = DictVectorizer()
    answers = [
        (row.question, *texts) for row in rows for texts in ((row.chosen, row.rejected), (row.rejected, row.chosen))
    ]
    features = vectorizer.fit_transform(_features(*texts) for texts in answers)  # (2 * rows, features)
    return (features[::2] - features[1::2]).tocsr()


def _features(question: str, answer: str, other: str) -> dict[str, float]:
    words = set(_words(answer)) - set(_words(other))
    features = {f"answer {answer}": 1.0, "length": len(answer) / max(len(answer), len(other), 1)}
    for word in words:
        features[f"word {word}"] = 1.0
        features |= {f"pair {asked} {word}": 1.0 for asked in set(_words(question))}
    return features


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())
