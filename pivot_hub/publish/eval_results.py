"""Results as the Hub's metadata, `model-index` and `.eval_results/*.yaml`, and such metadata held against results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from pivot_hub.errors import CardError
from pivot_hub.probes.result import ProbeResult

# The Hub's task of a metric (https://huggingface.co/tasks); metrics of an answer's place have none of their own.
TASKS = {
    "image-segmentation": ("mean_iou", "pixel_accuracy", "mean_recall"),
    "visual-question-answering": ("exact_match",),
    "image-feature-extraction": ("pointing_accuracy", "energy_inside", "iou"),
}
DECIMALS = 2


def eval_results(results: Sequence[ProbeResult], benchmarks: Mapping[str, str]) -> list[EvalResult]:
    """Results for a card's `model-index`, each with its conditions.

    Args:
        results: of one encoder.
        benchmarks: the Hub's dataset id of each benchmark, the first part of a result's task.

    Raises:
        CardError: a benchmark has no id.
    """
    return [
        EvalResult(
            task_type=next((t for t, metrics in TASKS.items() if r.metric in metrics), "image-classification"),
            task_name=r.task,
            dataset_type=_dataset(r, benchmarks),
            dataset_name=r.task.split("/")[0],
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
    """`.eval_results/<benchmark>.yaml` with its text, a file a benchmark."""
    entries: dict[str, list[EvalResultEntry]] = {}
    for r in results:
        low, high = _interval(r)
        entry = EvalResultEntry(
            dataset_id=_dataset(r, benchmarks),
            task_id=f"{_task_id(r)}/{r.metric}",
            value=round(r.value, DECIMALS),
            notes=f"{r.unit}, 95% interval {low} to {high}, {r.n} items of {r.split}, {r.protocol}"
            + (f", partner {r.partner}" if r.partner else ""),
        )
        entries.setdefault(r.task.split("/")[0], []).append(entry)
    return {
        f".eval_results/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(made), sort_keys=False, width=120)
        for name, made in entries.items()
    }


def index_differences(results: Sequence[ProbeResult], published: Sequence[EvalResult]) -> list[str]:
    """Where a card's `model-index` says another number than the results."""
    measured = {(r.task, r.metric): (round(r.value, DECIMALS), _interval(r)) for r in results}
    said = {
        (str(p.task_name), p.metric_type): (p.metric_value, (p.metric_args or {}).get("ci95", "no interval"))
        for p in published
    }
    return [
        f"the card's model-index says {said.get(key, 'nothing')} for {' '.join(map(str, key))}, the results "
        f"{measured.get(key, 'nothing')}."
        for key in sorted({*measured, *said}, key=str)
        if measured.get(key) != said.get(key)
    ]


def file_differences(results: Sequence[ProbeResult], name: str, text: str) -> list[str]:
    """Where a file of `.eval_results` says another number than the results."""
    benchmark = name.removeprefix(".eval_results/").removesuffix(".yaml")
    own = [r for r in results if r.task.split("/")[0] == benchmark]
    measured = {f"{_task_id(r)}/{r.metric}": round(r.value, DECIMALS) for r in own}
    said = {entry.task_id: entry.value for entry in parse_eval_result_entries(yaml.safe_load(text))}
    return [
        f"{name} says {said.get(key, 'nothing')} for {key}, the results {measured.get(key, 'nothing')}."
        for key in sorted({*measured, *said})
        if measured.get(key) != said.get(key)
    ]


def _dataset(result: ProbeResult, benchmarks: Mapping[str, str]) -> str:
    benchmark = result.task.split("/")[0]
    if benchmark not in benchmarks:
        raise CardError(f"prose.benchmarks.{benchmark} is missing: name the Hub's dataset id of this benchmark.")
    return benchmarks[benchmark]


def _task_id(result: ProbeResult) -> str:
    return result.task.partition("/")[2] or result.task


def _interval(result: ProbeResult) -> list[float]:
    return [round(edge, DECIMALS) for edge in result.ci95]
