"""A study's table: one row for each result of each run, with its conditions, in one Parquet file.

It holds what the report needs and no more: values, and the same few resamples of the test items for every run, from
which differences of runs have their variance over items.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.errors import ProbeError
from pivot_hub.metrics.paired_bootstrap.paired_bootstrap import resample
from pivot_hub.probes.result import ProbeResult, read_results, statistic_of
from pivot_hub.provenance import source_commit, versions
from pivot_hub.study.design import Study
from pivot_hub.study.runner import cell_metadata

DRAWS = 200  # resamples of the test items: the standard error they give is right to 5 in 100
STEP = 0.01  # percent: resampled values are kept in whole steps
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("seed", pa.int32()),  # none of what is made once
        ("candidate", pa.float64()),  # the rate of a run that took part in a search
        ("status", pa.string()),  # done, failed, not started
        ("reason", pa.string()),  # of those that are not done
        ("recipe", pa.string()),
        ("recipe_sha256", pa.string()),
        ("stage", pa.string()),
        ("rate", pa.float64()),  # of every trained part; none where the recipe's own stand
        ("rows", pa.int32()),
        ("change", pa.string()),  # JSON: overrides of the recipe
        ("steps", pa.int32()),
        ("train_loss", pa.float64()),
        ("duration_s", pa.float64()),  # training and measuring
        ("task", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),  # percent
        ("low", pa.float64()),  # 95% interval over test items
        ("high", pa.float64()),
        ("n", pa.int32()),
        ("split", pa.string()),
        ("protocol", pa.string()),
        ("encoder_sha256", pa.string()),
        ("data_sha256", pa.string()),
        ("draws", pa.list_(pa.int32())),  # values of DRAWS resamples, in steps of STEP percent
    ]
)


@dataclass(frozen=True)
class StudyTable:
    """The rows of a study, and the study and machine they were made with.

    Args:
        rows: as SCHEMA has them.
        facts: study_sha256, commit, versions, machine.
    """

    rows: list[dict[str, Any]]
    metadata: dict[str, Any]

    def values(self, run: str, task: str, metric: str) -> dict[int | None, tuple[float, np.ndarray]]:
        """Value and resampled values (DRAWS,) of a measure of a run, by seed, in percent."""
        return {
            row["seed"]: (row["value"], np.array(row["draws"]) * STEP)
            for row in self.rows
            if (row["run"], row["task"], row["metric"]) == (run, task, metric) and row["candidate"] is None
        }


def collect_table(study: Study, output: Path) -> StudyTable:
    """Read what a study has made so far, in the study's order."""
    rows, machines = [], []
    for cell, metadata in cell_metadata(study, output):
        made = metadata.get("training", {})
        common = {
            **dict.fromkeys(SCHEMA.names),
            **{k: metadata.get(k) for k in ("run", "seed", "candidate", "status", "reason", "recipe", "recipe_sha256")},
            **{k: metadata.get(k) for k in ("stage", "rate", "rows", "duration_s")},
            "change": json.dumps([*study.spec.change, *study.spec.runs[cell.run].change]),
            **{k: made.get(k) for k in ("steps", "train_loss")},
        }
        machines.append(metadata.get("machine"))
        file = output / "results" / f"{cell.name}.json"
        results = read_results(file) if metadata["status"] == "done" and file.is_file() else []
        rows += [common | _result(r) for r in results] or [common]
    metadata = {
        "study": study.name,
        "study_sha256": study.sha256,
        "commit": source_commit(),
        "versions": versions(),
        "machine": machines[0] if machines else None,
    }
    return StudyTable(rows, metadata)


def write_table(table: StudyTable, path: Path) -> None:
    """Write the Parquet file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    schema = SCHEMA.with_metadata({"study": json.dumps(table.metadata)})
    try:
        pq.write_table(pa.Table.from_pylist(table.rows, schema=schema), beside, compression="zstd")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_table(path: Path) -> StudyTable:
    """Read what `write_table` wrote.

    Raises:
        ProbeError: there is no such file, or it is no study's table.
    """
    try:
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"study"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ProbeError(f"{path} is no study's table ({error}); `pivot study` writes one.") from error
    return StudyTable(table.to_pylist(), metadata)


def _result(result: ProbeResult) -> dict[str, Any]:
    assert result.example_scores is not None
    drawn = 100 * statistic_of(result.metric)(resample(result.example_scores, 0, DRAWS))
    return {
        **{k: getattr(result, k) for k in ("task", "metric", "value", "n", "split", "protocol")},
        "low": result.ci95[0],
        "high": result.ci95[1],
        "encoder_sha256": result.encoder_sha256,
        "data_sha256": result.data_sha256,
        "draws": [int(v) for v in np.round(np.nan_to_num(drawn, nan=result.value) / STEP)],
    }
