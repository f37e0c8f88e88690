"""Bootstrap over test items: the interval of one statistic, and the paired difference of two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]  # summed per-example scores (draws, ...) -> values (draws,)


@dataclass(frozen=True)
class Difference:
    """Difference of two statistics on the same items.

    Args:
        value: Difference over all items.
        ci95: 2.5th and 97.5th percentiles over resamples.
        p_value: Two-sided p-value of the hypothesis that there is no difference.
    """

    value: float
    ci95: tuple[float, float]
    p_value: float


def bootstrap(
    example_scores: np.ndarray, statistic: Statistic, seed: int, draws: int = 1000
) -> tuple[float, tuple[float, float]]:
    """Compute a statistic of per-example scores and its percentile interval over resampled items.

    Args:
        example_scores: (n, ...) scores of the test items, which are summed over items.
        statistic: Function of the summed scores.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Returns:
        The value over all items, and the 2.5th and 97.5th percentiles over resamples.
    """
    low, high = np.nanpercentile(statistic(resample(example_scores, seed, draws)), [2.5, 97.5])
    return float(statistic(example_scores.sum(0, dtype=np.float64)[None])[0]), (float(low), float(high))


def paired_difference(
    first: np.ndarray, second: np.ndarray, statistic: Statistic, seed: int, draws: int = 10_000
) -> Difference:
    """Compute how far a statistic of the first scores lies above that of the second, resampled on the same items.

    The p-value is the share of resampled differences that differ from the observed difference by at least as much as
    that differs from zero. It is counted as (1 + count) / (draws + 1), so that it is never 0 (Davison and Hinkley,
    1997, section 4.2).

    Args:
        first: (n, ...) per-example scores, see `bootstrap`.
        second: (n, ...) per-example scores of the same items in the same order.
        statistic: Function of the summed scores.
        seed: Seed of the resampling.
        draws: Number of resamples.

    Raises:
        ValueError: The shapes differ, or there are fewer than two items.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"per-example scores are {first.shape} and {second.shape}: give scores of the same items in the same order."
        )
    if len(first) < 2:
        raise ValueError(f"{len(first)} item(s): an interval over items needs at least two.")
    both = np.stack([first, second], axis=1)  # a resample counts an item equally often for both

    def gap(sums: np.ndarray) -> np.ndarray:
        return statistic(sums[:, 0]) - statistic(sums[:, 1])

    value = float(gap(both.sum(0, dtype=np.float64)[None])[0])
    drawn = gap(resample(both, seed, draws))
    drawn = drawn[np.isfinite(drawn)]  # a small resample may lack what a statistic needs
    low, high = np.percentile(drawn, [2.5, 97.5])
    # Sums of floats in another order differ in their last bits. The slack makes sure that ties count as ties.
    as_far = np.abs(drawn - value) >= abs(value) * (1 - 1e-9) - 1e-12
    return Difference(value, (float(low), float(high)), float((1 + as_far.sum()) / (len(drawn) + 1)))


def resample(example_scores: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """Sum scores (n, ...) over n items drawn with replacement: (draws, ...). The same seed draws the same items."""
    n, shape, rng = len(example_scores), example_scores.shape[1:], np.random.default_rng(seed)
    flat, even = example_scores.reshape(n, -1).astype(np.float64), np.full(n, 1 / n)
    block = max(1, 10_000_000 // n)  # 80 MB of counts at a time
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    return np.concatenate([rng.multinomial(n, even, size) @ flat for size in sizes]).reshape(draws, *shape)


def mean(sums: np.ndarray) -> np.ndarray:
    """(draws, 2) summed values and counts -> (draws,)."""
    return sums[:, 0] / sums[:, 1]


class PairedBootstrap(evaluate.Metric):
    """Paired bootstrap of the mean scores of two models on the same items."""

    def _info(self) -> evaluate.MetricInfo:
        score = datasets.Value("float64")
        return evaluate.MetricInfo(
            description="Paired bootstrap: how far the mean score of one model lies above that of another on the same "
            "items, with a 95% interval and a two-sided p-value.",
            citation="",
            inputs_description="predictions: a score of each item under the first model. references: scores of "
            "the same items under the second. seed and draws: seed and number of resamples.",
            features=datasets.Features({"predictions": score, "references": score}),
            reference_urls=["https://aclanthology.org/W04-3250"],
        )

    def _compute(self, predictions: Any, references: Any, seed: int = 0, draws: int = 10_000) -> dict[str, Any]:
        first, second = (np.asarray(s, np.float64) for s in (predictions, references))
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("a score is not finite: leave the item out of both lists.")
        ones = np.ones(len(first))
        example_scores = [np.stack([scores, ones], axis=1) for scores in (first, second)]
        result = paired_difference(example_scores[0], example_scores[1], mean, seed, draws)
        return {"difference": result.value, "ci95": list(result.ci95), "p_value": result.p_value, "n": len(first)}
