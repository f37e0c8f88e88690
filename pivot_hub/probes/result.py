"""A result: one number with the conditions it was measured under, and its bootstrap interval."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pivot_hub.files import write_whole
from pivot_hub.provenance import versions


@dataclass(frozen=True)
class ProbeResult:
    """A number never travels without its conditions.

    Args:
        task: what was asked, as in `shapes/colour`.
        metric: as in `balanced_accuracy`.
        value: in `unit`.
        unit: `percent`, or `ratio` for numbers in 0 to 1 that are no percentage.
        n: test items the value and its interval are over.
        split: the data the value was measured on; settings were chosen elsewhere.
        seed: of sampling and bootstrap.
        protocol: how, in one line, with the chosen settings and the value of chance.
        feature_layer: hidden state the features are of.
        encoder: base, sft or dpo, or the name of a repository.
        encoder_sha256: of its weights.
        partner: the MLLM that answered or whose loss was differentiated, None for the encoder alone.
        ci95: bootstrap interval over test items.
        duration_s: time to fit and measure.
    """

    task: str
    metric: str
    value: float
    unit: str
    n: int
    split: str
    seed: int
    protocol: str
    feature_layer: int | None
    encoder: str
    encoder_sha256: str
    partner: str | None
    ci95: tuple[float, float]
    duration_s: float
    versions: dict[str, str | None] = field(default_factory=versions)

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def write_results(path: Path, results: Sequence[ProbeResult]) -> None:
    """Write results as a JSON list."""
    write_whole(path, results_text(results))


def results_text(results: Sequence[ProbeResult]) -> str:
    """Results as the JSON list that `read_results` reads."""
    return json.dumps([r.facts() for r in results], indent=2) + "\n"


def read_results(path: Path) -> list[ProbeResult]:
    """Read what `write_results` wrote."""
    return [ProbeResult(**{**r, "ci95": tuple(r["ci95"])}) for r in json.loads(path.read_text())]


def bootstrap(
    items: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], seed: int, draws: int = 1000
) -> tuple[float, tuple[float, float]]:
    """A statistic of per-item tallies with its percentile interval over resampled items.

    Args:
        items: (n, ...) tallies of each test item, which add up over items.
        statistic: maps summed tallies (draws, ...) to values (draws,).
        seed: of the resampling.
        draws: resamples.

    Returns:
        The value over all items, and the 2.5 and 97.5 percentiles over resamples.
    """
    n, shape = len(items), items.shape[1:]
    rng = np.random.default_rng(seed)
    flat = items.reshape(n, -1).astype(np.float64)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)  # (draws, n)
    resampled = statistic((counts @ flat).reshape(draws, *shape))
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    value = statistic(flat.sum(0, keepdims=True).reshape(1, *shape))[0]
    return float(value), (float(low), float(high))


def bootstrap_mean(values: np.ndarray, seed: int) -> tuple[float, tuple[float, float]]:
    """The mean of one value an item, (n,), with its interval."""
    return bootstrap(values[:, None], lambda sums: sums[:, 0] / len(values), seed)
