"""Results as the Hub's metadata, `model-index` and `.eval_results/*.yaml`, and their comparison with the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from pivot_hub.errors import CardError
from pivot_hub.probes.result import ProbeResult

# The Hub's task for a metric (https://huggingface.co/tasks). The Hub has no task for localisation metrics.
TASKS = {
    "image-segmentation": ("mean_iou", "pixel_accuracy", "mean_recall"),
    "visual-question-answering": ("exact_match",),
    "image-feature-extraction": ("pointing_accuracy", "energy_inside", "iou"),
}
DECIMALS = 2


def eval_results(results: Sequence[ProbeResult], benchmarks: Mapping[str, str]) -> list[EvalResult]:
    """Convert results to entries of a card's `model-index`, each with its conditions.

    Args:
        results: Results of one encoder.
        benchmarks: Hub dataset ids by benchmark, which is the first part of a result's task.

    Raises:
        CardError: A benchmark has no id.
    """
    return [
        EvalResult(
            task_type=next((t for t, metrics in TASKS.items() if r.metric in metrics), "image-classification"),
            task_name=r.task,
            dataset_type=_dataset_id(r, benchmarks),
            dataset_name=_benchmark(r),
            dataset_config=_task_id(r),
            dataset_split=r.split,
            metric_type=r.metric,
            metric_name=f"{r.metric} ({r.unit})",
            metric_value=round(r.value, DECIMALS),
            metric_args={"ci95": _interval(r), "n": r.n, "protocol": r.protocol, "partner": r.partner, "seed": r.seed},
        )
        for r in results
    ]


def eval_files(results: Sequence[ProbeResult], benchmarks: Mapping[str, str]) -> dict[str, str]:
    """Render the files `.eval_results/<benchmark>.yaml`.

    Args:
        results: Results of one encoder.
        benchmarks: Hub dataset ids by benchmark.

    Returns:
        Text of each file by its name.

    Raises:
        CardError: A benchmark has no id.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for r in results:
        low, high = _interval(r)
        entry = EvalResultEntry(
            dataset_id=_dataset_id(r, benchmarks),
            task_id=f"{_task_id(r)}/{r.metric}",
            value=round(r.value, DECIMALS),
            notes=f"{r.unit}, 95% interval {low} to {high}, {r.n} items of {r.split}, {r.protocol}"
            + (f", partner {r.partner}" if r.partner else ""),
        )
        entries.setdefault(_benchmark(r), []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(listed), sort_keys=False, width=120)
        for name, listed in entries.items()
    }


def index_differences(results: Sequence[ProbeResult], published: Sequence[EvalResult]) -> list[str]:
    """Compare a card's `model-index` with the results; one message for each number that differs."""
    measured = {(r.task, r.metric): (round(r.value, DECIMALS), _interval(r)) for r in results}
    indexed = {
        (str(p.task_name), p.metric_type): (p.metric_value, (p.metric_args or {}).get("ci95", "no interval"))
        for p in published
    }
    return [
        f"the card's model-index says {indexed.get(key, 'nothing')} for {' '.join(map(str, key))}, the results "
        f"{measured.get(key, 'nothing')}."
        for key in sorted({*measured, *indexed}, key=str)
        if measured.get(key) != indexed.get(key)
    ]


def _benchmark(result: ProbeResult) -> str:
    return result.task.split("/")[0]


def _dataset_id(result: ProbeResult, benchmarks: Mapping[str, str]) -> str:
    benchmark = _benchmark(result)
    if benchmark not in benchmarks:
        raise CardError(f"prose.benchmarks.{benchmark} is missing: name the Hub's dataset id of this benchmark.")
    return benchmarks[benchmark]


def _task_id(result: ProbeResult) -> str:
    return result.task.partition("/")[2] or result.task


def _interval(result: ProbeResult) -> list[float]:
    return [round(edge, DECIMALS) for edge in result.ci95]
