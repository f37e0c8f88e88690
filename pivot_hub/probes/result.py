"""A result: one number with the conditions it was measured under, and its bootstrap interval."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pivot_hub.errors import ProbeError
from pivot_hub.files import write_whole
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou, mean_recall, pixel_accuracy
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import Statistic, bootstrap, mean
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
        data_sha256: of the items and labels that were fitted and tested on; results of one hash can be paired.
        tallies: (n, ...) what each test item adds to the metric; kept beside the JSON, for paired comparisons.
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
    data_sha256: str | None = None
    example_scores: np.ndarray | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the tallies, as JSON takes it."""
        return {k: v for k, v in asdict(replace(self, example_scores=None)).items() if k != "example_scores"}


def measure(
    task: str,
    metric: str,
    example_scores: np.ndarray,
    *,
    protocol: str,
    seed: int,
    duration_s: float,
    split: str = "test",
    partner: str | None = None,
    **conditions: Any,
) -> ProbeResult:
    """A result in percent from what each test item adds to it.

    Args:
        task: as in `shapes/colour`.
        metric: its statistic is that of STATISTICS, or the mean.
        tallies: (n,) one value in 0 to 1 an item, or (n, ...) as the metric's statistic takes them.
        protocol: how, in one line.
        seed: of sampling and bootstrap.
        duration_s: time to fit and measure.
        split: measured on.
        partner: see ProbeResult.
        **conditions: encoder, encoder_sha256, feature_layer, data_sha256.

    Raises:
        ProbeError: there is no item, or one is not finite.
    """
    if not len(example_scores) or not np.isfinite(example_scores).all():
        raise ProbeError(
            f"{task}: {metric} of {len(example_scores)} items, some not finite; check the data and the encoder."
        )
    if example_scores.ndim == 1:
        example_scores = np.stack([example_scores, np.ones(len(example_scores))], axis=1)
    value, (low, high) = bootstrap(example_scores, statistic_of(metric), seed)
    return ProbeResult(
        task=task,
        metric=metric,
        value=100 * value,
        unit="percent",
        n=len(example_scores),
        split=split,
        seed=seed,
        protocol=protocol,
        partner=partner,
        ci95=(100 * low, 100 * high),
        duration_s=round(duration_s, 2),
        example_scores=example_scores,
        **conditions,
    )


def write_results(path: Path, results: Sequence[ProbeResult]) -> None:
    """Write results as a JSON list, and their tallies beside it as `.npz`, for paired comparisons."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    example_scores: dict[str, Any] = {
        str(i): r.example_scores for i, r in enumerate(results) if r.example_scores is not None
    }
    try:
        np.savez_compressed(beside, **example_scores)
        beside.replace(path.with_suffix(".npz"))
    finally:
        beside.unlink(missing_ok=True)
    write_whole(path, results_text(results))


def results_text(results: Sequence[ProbeResult]) -> str:
    """Results as the JSON list that `read_results` reads."""
    return json.dumps([r.to_dict() for r in results], indent=2) + "\n"


def read_results(path: Path) -> list[ProbeResult]:
    """Read what `write_results` wrote; without its `.npz` beside it, results have no tallies.

    Raises:
        ProbeError: the file is no list of results.
    """
    try:
        metadata = json.loads(path.read_text())
        results = [ProbeResult(**{**r, "ci95": tuple(r["ci95"])}) for r in metadata]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ProbeError(f"{path} holds no probe results ({error}); give a file that `pivot probe` wrote.") from error
    if not path.with_suffix(".npz").is_file():
        return results
    with np.load(path.with_suffix(".npz")) as kept:
        return [replace(r, example_scores=kept.get(str(i))) for i, r in enumerate(results)]


def balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """(draws, 4, values) true positives, positives, true negatives, negatives -> (draws,).

    Recall of positives and of negatives, averaged, then over values. A value that a small resample never or always
    holds has no recall on one side and is left out of that draw.
    """
    with np.errstate(invalid="ignore"):
        return np.nanmean((sums[:, 0] / sums[:, 1] + sums[:, 2] / sums[:, 3]) / 2, axis=1)


def mean_over_parts(sums: np.ndarray) -> np.ndarray:
    """(draws, parts, 2) summed values and counts of each part -> (draws,); parts without an item are left out."""
    with np.errstate(invalid="ignore"):
        return np.nanmean(sums[:, :, 0] / sums[:, :, 1], axis=1)


STATISTICS: dict[str, Statistic] = {
    "mean_iou": mean_iou,
    "mean_recall": mean_recall,
    "pixel_accuracy": pixel_accuracy,
    "balanced_accuracy": balanced_accuracy,
    # Of MME and of CV-Bench.
    "perception_score": mean_over_parts,
    "mean_2d_3d": mean_over_parts,
}


def statistic_of(metric: str) -> Statistic:
    """How a metric comes from summed tallies; the mean of the items where nothing else is said."""
    return STATISTICS.get(metric, mean)
