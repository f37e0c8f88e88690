"""The table of a study: one row for each result of each run, with its conditions, in one Parquet file.

It holds exactly what the report needs: values, and values on resamples of the test items. The resamples are the same
for every run, so that they give the variance over items of a difference between runs.
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
from pivot_hub.study.design import Cell, Study
from pivot_hub.study.runner import FORMAT, cell_metadata

DRAWS = 200  # resamples of the test items; the standard errors they give are accurate to 5%
STEP = 0.01  # percent; resampled values are rounded to multiples of it
SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("seed", pa.int32()),  # null for a run that all seeds share
        ("candidate", pa.float64()),  # learning rate of a candidate in a search; null for other runs
        ("status", pa.string()),  # done, failed or not started
        ("reason", pa.string()),  # why a run is not done
        ("recipe", pa.string()),
        ("recipe_sha256", pa.string()),
        ("stage", pa.string()),
        ("rate", pa.float64()),  # learning rate of every trained part; null where the recipe's own are used
        ("rows", pa.int32()),
        ("change", pa.string()),  # overrides of the recipe, as JSON
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
        ("draws", pa.list_(pa.int32())),  # values on the DRAWS resamples, in multiples of STEP
    ]
)


@dataclass(frozen=True)
class StudyTable:
    """The rows of a study with their metadata.

    Args:
        rows: Rows with the columns of `SCHEMA`.
        metadata: Values of study, study_sha256, commit, versions and machine.
    """

    rows: list[dict[str, Any]]
    metadata: dict[str, Any]

    def values(self, run: str, task: str, metric: str) -> dict[int | None, tuple[float, np.ndarray]]:
        """Return a measure of a run by seed: its value and its values on resamples (DRAWS,), in percent."""
        return {
            row["seed"]: (row["value"], np.array(row["draws"]) * STEP)
            for row in self.rows
            if (row["run"], row["task"], row["metric"]) == (run, task, metric) and row["candidate"] is None
        }


def collect_table(study: Study, output: Path, earlier: StudyTable | None = None) -> StudyTable:
    """Read the results of a study so far, in the study's order.

    Args:
        study: Study whose results are read.
        output: Folder of the study's output.
        earlier: Table of the same plan, such as that of other seeds on another machine; its rows of cells that are not
            finished in the output are kept.
    """
    kept: dict[str, list[dict[str, Any]]] = {}
    for row in earlier.rows if earlier else ():
        kept.setdefault(_cell_of(row).name, []).append(row)
    known = dict(cell_metadata(study, output))
    rows: list[dict[str, Any]] = []
    machines = []
    from_earlier = False
    for cell in study.cells():
        earlier_rows = kept.get(cell.name, [])
        finished_earlier = any(row["status"] == "done" for row in earlier_rows)
        metadata = known.get(cell, {})
        if not metadata or (finished_earlier and metadata["status"] != "done"):
            rows += earlier_rows
            from_earlier |= finished_earlier
            continue
        training = metadata.get("training", {})
        common = {
            **dict.fromkeys(SCHEMA.names),
            **{k: metadata.get(k) for k in ("run", "seed", "candidate", "status", "reason", "recipe", "recipe_sha256")},
            **{k: metadata.get(k) for k in ("stage", "rate", "rows", "duration_s")},
            "change": json.dumps(study.changes(cell.run)),
            **{k: training.get(k) for k in ("steps", "train_loss")},
        }
        machines.append(metadata.get("machine"))
        file = output / "results" / f"{cell.name}.json"
        results = read_results(file) if metadata["status"] == "done" and file.is_file() else []
        rows += [common | _result_columns(result) for result in results] or [common]
    own = {"commit": source_commit(), "versions": versions(), "machine": machines[0] if machines else None}
    others = _conditions(earlier) if earlier and from_earlier else []
    plan = {"study_sha256": study.sha256, "format": FORMAT, "recipes_sha256": study.recipes_sha256}
    return StudyTable(rows, {"study": study.name, **plan, **own, "earlier": [each for each in others if each != own]})


def _conditions(table: StudyTable) -> list[dict[str, Any]]:
    """Commit, versions and machine of a table's own runs, and of those that it took from earlier tables."""
    own = {key: table.metadata[key] for key in ("commit", "versions", "machine")}
    return [*table.metadata["earlier"], *([own] if own["machine"] else [])]


def earlier_table(study: Study, output: Path, path: Path) -> StudyTable | None:
    """Read the table that a study's command is about to write anew; None where it has nothing to keep.

    Args:
        study: Study that is about to run.
        output: Folder of the study's output, whose own results are collected again.
        path: File of the table.

    Raises:
        ProbeError: The table is that of another plan and has rows that the output has not, which would be lost.
    """
    if not path.is_file():
        return None
    table = read_table(path)
    same = {"study_sha256": study.sha256, "format": FORMAT, "recipes_sha256": study.recipes_sha256}
    if all(table.metadata.get(key) == value for key, value in same.items()):
        return table
    if all((output / "cells" / f"{cell.name}.json").is_file() for cell in map(_cell_of, table.rows)):
        return None
    raise ProbeError(
        f"{path} has rows of another plan than {study.path}, of other recipes or of other measures, and they are only "
        "there. Nothing was run: move it away, or give another --output."
    )


def write_table(table: StudyTable, path: Path) -> None:
    """Write the table as a Parquet file, which appears at its path when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    schema = SCHEMA.with_metadata({"study": json.dumps(table.metadata)})
    try:
        pq.write_table(pa.Table.from_pylist(table.rows, schema=schema), temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path) -> StudyTable:
    """Read a table that `write_table` wrote.

    Raises:
        ProbeError: The file does not exist, or is not the table of a study.
    """
    try:
        table = pq.read_table(path)
        metadata = json.loads(table.schema.metadata[b"study"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise ProbeError(f"{path} is not the table of a study ({error}); `pivot study` writes one.") from error
    return StudyTable(table.to_pylist(), metadata)


def _cell_of(row: dict[str, Any]) -> Cell:
    return Cell(row["run"], row["seed"], row["candidate"])


def _result_columns(result: ProbeResult) -> dict[str, Any]:
    """The columns of a row that come from a result."""
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
