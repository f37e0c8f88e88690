"""Probe results: one number with the conditions it was measured under, and its bootstrap interval."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pivot_hub.errors import ProbeError
from pivot_hub.files import write_whole
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou, mean_recall, pixel_accuracy
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import Statistic, bootstrap, mean
from pivot_hub.provenance import versions

# Raised when the meaning of a field changes or a field is removed. A new field alone needs no new version, because
# readers keep the fields that they do not know.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ProbeResult:
    """One measured number together with the conditions it was measured under.

    Args:
        task: What was measured, such as `shapes/colour`.
        metric: Name of the metric, such as `balanced_accuracy`.
        value: The measured number, in `unit`.
        unit: `percent`, or `ratio` for a number from 0 to 1 that is not a percentage.
        n: Number of test items that the value and its interval are computed over.
        split: Split of the data that was measured; settings were chosen on other splits.
        seed: Seed of the sampling and of the bootstrap.
        protocol: One line that describes the method, the chosen settings and the chance level.
        feature_layer: Hidden state that the features are taken from, or `last_hidden_state`, which has passed the final
            norm; None where there is no encoder.
        encoder: `base`, `sft`, `dpo` or the name of a repository.
        encoder_sha256: Hash of the encoder's weights.
        partner: The MLLM that answered or whose loss was differentiated; None if the encoder was measured alone.
        ci95: Bootstrap interval over the test items.
        duration_s: Time to fit and measure, in seconds.
        versions: Versions of the packages that the number depends on.
        data_sha256: Hash of the items and labels that were fitted and tested on. Results with the same hash can be
            compared item by item.
        example_scores: (n, ...) what each test item adds to the metric. Stored beside the JSON file, for paired
            comparisons.
        schema_version: Version of the file format that the result was read from.
        extra: Fields of a newer file format that this version does not know. They are written back unchanged.
    """

    task: str
    metric: str
    value: float
    unit: str
    n: int
    split: str
    seed: int
    protocol: str
    feature_layer: int | str | None
    encoder: str
    encoder_sha256: str
    partner: str | None
    ci95: tuple[float, float]
    duration_s: float
    versions: dict[str, str | None] = field(default_factory=versions)
    data_sha256: str | None = None
    example_scores: np.ndarray | None = field(default=None, repr=False, compare=False)
    schema_version: int = field(default=SCHEMA_VERSION, repr=False, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields except the per-example scores, ready for JSON."""
        stored = asdict(replace(self, example_scores=None, extra={}))
        del stored["example_scores"], stored["extra"]
        return {"schema_version": stored.pop("schema_version"), **stored, **self.extra}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> ProbeResult:
        """Build a result from what `to_dict` returned, in this or in any other version of the file format.

        Raises:
            KeyError: The interval is missing.
            TypeError: Another required field is missing, or the schema version is not an integer.
        """
        known = {f.name for f in fields(cls)} - {"example_scores", "extra"}
        version = stored.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int):
            raise TypeError(f"schema_version is {version!r}, not an integer")
        values = {name: value for name, value in stored.items() if name in known}
        unknown = {name: value for name, value in stored.items() if name not in known}
        return cls(**{**values, "ci95": tuple(stored["ci95"]), "extra": unknown})


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
    """Compute a result in percent from the scores of single test items.

    Args:
        task: What was measured, such as `shapes/colour`.
        metric: Name of the metric; its statistic is the one in STATISTICS, or the mean.
        example_scores: (n,) one value from 0 to 1 for each item, or (n, ...) in the form that the metric's statistic
            takes.
        protocol: One line that describes the method.
        seed: Seed of the sampling and of the bootstrap.
        duration_s: Time to fit and measure, in seconds.
        split: Split of the data that was measured.
        partner: MLLM that answered, see `ProbeResult`.
        **conditions: Further fields of the result: encoder, encoder_sha256, feature_layer, data_sha256.

    Raises:
        ProbeError: There is no item, or a score is not finite.
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
    """Write results as a JSON list, and their per-example scores beside it as `.npz`, for paired comparisons."""
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
    """Return results as the JSON list that `read_results` reads."""
    return json.dumps([r.to_dict() for r in results], indent=2) + "\n"


def read_results(path: Path) -> list[ProbeResult]:
    """Read a file that `write_results` wrote, in this or in another version of the format.

    Fields that only a newer version knows are kept in `ProbeResult.extra`. Without the `.npz` file beside the JSON,
    results have no per-example scores.

    Raises:
        ProbeError: The file is not a list of results, a result lacks a required field, the per-example scores are
            damaged, or a value does not follow from them.
    """
    try:
        results = [ProbeResult.from_dict(stored) for stored in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ProbeError(f"{path} holds no probe results ({error}); give a file that `pivot probe` wrote.") from error
    scores_file = path.with_suffix(".npz")
    if not scores_file.is_file():
        return results
    try:
        with np.load(scores_file) as stored_scores:
            results = [replace(r, example_scores=stored_scores.get(str(i))) for i, r in enumerate(results)]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ProbeError(
            f"{scores_file} is damaged ({error}); write it again with `--json`, or delete it: the results are then "
            "without per-example scores."
        ) from error
    for row, result in enumerate(results):
        _check_value(path, row, result)
    return results


def _check_value(path: Path, row: int, result: ProbeResult) -> None:
    """Raise a ProbeError if a value does not follow from the per-example scores beside it."""
    if result.example_scores is None:
        return
    sums = result.example_scores.sum(0, dtype=np.float64)[None]
    try:
        value = float(statistic_of(result.metric)(sums)[0]) * (100 if result.unit == "percent" else 1)
    except (IndexError, ValueError, TypeError):
        value = math.nan
    n = len(result.example_scores)
    if n != result.n or not math.isclose(value, result.value, rel_tol=1e-6, abs_tol=1e-6):
        raise ProbeError(
            f"{path}, result {row} ({result.task}, {result.metric}): it says {result.value:g} over {result.n} items, "
            f"and its per-example scores give {value:g} over {n}; one of the two files was changed, so measure again."
        )


def balanced_accuracy(sums: np.ndarray) -> np.ndarray:
    """(draws, 4, values) true positives, positives, true negatives, negatives -> (draws,).

    The recall of positives and the recall of negatives are averaged for each value, then over all values. If a
    resample contains a value always or never, one of its two recalls is undefined and that draw leaves the value out.
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
    "perception_score": mean_over_parts,  # MME
    "mean_2d_3d": mean_over_parts,  # CV-Bench
}


def statistic_of(metric: str) -> Statistic:
    """Return the function that computes a metric from summed per-example scores; the mean by default."""
    return STATISTICS.get(metric, mean)
