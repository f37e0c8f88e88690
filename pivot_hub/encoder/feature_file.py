"""Outputs of `encode`: one file of features with its report, or the manifest of a folder of parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.encoder.feature_parts import LAYOUT, BlockRecord, PartFolder, check_part_folder, job_hash
from pivot_hub.encoder.feature_table import FeatureTable, StorageError, numpy_type
from pivot_hub.encoder.image_shapes import OWN_GRID
from pivot_hub.errors import DataError, OutputError
from pivot_hub.files import write_json
from pivot_hub.provenance import file_sha256, machine, versions

SUFFIXES = (".parquet", ".npy")
GROUP_BYTES = 16_000_000  # of a row group of a single file
IDS_AT_ONCE = 20_000_000  # ids whose hashes are compared together
MOST_LISTED = 1000  # ids that a manifest lists


def report_file(target: Path) -> Path:
    """Return the file of the report beside a feature file."""
    return target.with_name(f"{target.name}.json")


def partial_folder(target: Path) -> Path:
    """Return the folder of parts beside a feature file that is not finished."""
    return target.with_name(f"{target.name}.partial")


def read_report(target: Path) -> dict[str, Any] | None:
    """Return the report beside a feature file, or None if there is none that `encode` wrote."""
    try:
        report = json.loads(report_file(target).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and {"files", "corrupt", "shape", "dtype"} <= report.keys() else None


def finished_report(target: Path) -> dict[str, Any] | None:
    """Return the report of a finished feature file, or None if the file is missing, unfinished or damaged."""
    report = read_report(target)
    if report is None or "features_sha256" not in report or not target.is_file():
        return None
    return report if file_sha256(target) == report["features_sha256"] else None


def file_report(
    target: Path,
    job: Mapping[str, Any],
    table: FeatureTable,
    records: Sequence[BlockRecord],
    entries: Mapping[str, Any],
) -> dict[str, Any]:
    """Write the report beside a feature file, and return it.

    Args:
        target: The file, which is complete.
        job: Whatever the features depend on besides the images.
        table: Columns of the features.
        records: Records of the blocks, in order.
        entries: Further entries, see `write_file`.
    """
    identity = {key: value for key, value in job.items() if key not in ("shapes", "processor", "decoding")}
    report = {
        **identity,
        "shape": list(next(iter(table.shapes.values()))),
        "columns": table.schema.names,
        "job_sha256": job_hash(job),
        "features_sha256": file_sha256(target),
        "images": sum(record.images for record in records),
        "corrupt": [entry for record in records for entry in record.corrupt],
        "problems": [record.problem for record in records if record.problem],
        **entries,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(report_file(target), report)
    return report


def check_target(target: Path) -> None:
    """Refuse to replace files that `encode` did not write.

    Raises:
        OutputError: The target, its report or its folder of parts is something else. Nothing was touched.
    """
    folder = partial_folder(target)
    check_part_folder(folder)
    ours = read_report(target) is not None or folder.is_dir()
    for file in (target, report_file(target)):
        if file.is_dir() or (file.exists() and not ours):
            raise OutputError(f"{file} was not written by `pivot encode`, so it is not replaced; choose another --out.")


def check_fits(target: Path, table: FeatureTable) -> None:
    """Refuse an .npy file for features that it cannot hold.

    Raises:
        DataError: The message names the remedy.
    """
    if target.suffix != ".npy":
        return
    what, remedy = None, ""
    if table.has_grids:
        what, remedy = "patch tokens of a tower of native resolution have another shape for each image", "--tokens"
    elif len(table.shapes) > 1:
        what, remedy = "several layers are several arrays", "all but one --feature-layer"
    elif table.store in ("bfloat16", "int8"):
        what, remedy = f"features stored as {table.store} need their type or scales beside them", "--store"
    if what:
        raise DataError(
            f"{target}: {what}, which .npy does not hold; give --out a name that ends in .parquet, or leave {remedy} "
            "out."
        )


def write_file(path: Path, table: FeatureTable, tables: Iterable[pa.Table], rows: int) -> dict[str, Any]:
    """Join features to one file.

    Args:
        path: File to write, .parquet or .npy.
        table: Columns of the features.
        tables: The features in order.
        rows: Number of images.

    Returns:
        Entries of the report: the names and hashes of the images in order, their grids if they have their own, and the
        error of storing them if there is one.
    """
    entries: dict[str, Any] = {"files": [], "images_sha256": []}
    error = StorageError()

    def noted() -> Iterator[pa.Table]:
        for group in tables:
            entries["files"] += group["id"].to_pylist()
            entries["images_sha256"] += group["sha256"].to_pylist()
            if table.has_grids:
                entries.setdefault("grids", []).extend(zip(*(group[s].to_pylist() for s in OWN_GRID), strict=True))
            error.add(group)
            yield group

    if path.suffix == ".npy":
        _write_npy(path, table, noted(), rows)
    else:
        with pq.ParquetWriter(path, table.schema) as writer:
            for group in _regrouped(noted()):
                writer.write_table(group, row_group_size=len(group))
    if table.has_grids:
        entries["grids"] = [list(grid) for grid in entries.get("grids", [])]
    return {**entries, **({} if table.exact else {"error": error.to_dict()})}


def _write_npy(path: Path, table: FeatureTable, tables: Iterable[pa.Table], rows: int) -> None:
    (shape,) = table.shapes.values()
    row_shape = [int(side) for side in shape]
    merged = np.lib.format.open_memmap(path, mode="w+", dtype=numpy_type(table.store), shape=(rows, *row_shape))
    start = 0
    for group in tables:
        flat = group["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        merged[start : start + len(group)] = flat.reshape(-1, *row_shape)
        start += len(group)
    merged.flush()


def _regrouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield rows in groups of GROUP_BYTES, so that the file does not depend on the parts that it is made of."""
    pending: list[pa.Table] = []
    size = 0
    for table in tables:
        for i in range(len(table)):
            row = table.slice(i, 1)
            if pending and size + row.nbytes > GROUP_BYTES:
                yield pa.concat_tables(pending).combine_chunks()
                pending, size = [], 0
            pending.append(row)
            size += row.nbytes
    if pending:
        yield pa.concat_tables(pending).combine_chunks()


def unpacked(target: Path, report: Mapping[str, Any], table: FeatureTable, folder: Path) -> Path:
    """Return a finished feature file as Parquet with ids and hashes: itself, or a copy of an .npy file in a folder."""
    if target.suffix == ".parquet":
        return target
    copy, array = folder / "finished.parquet", np.load(target, mmap_mode="r")
    rows = max(1, GROUP_BYTES // max(int(np.prod(array.shape[1:])) * array.itemsize, 1))
    with pq.ParquetWriter(copy, table.schema) as writer:
        for start in range(0, len(array), rows):
            some = slice(start, start + rows)
            stored = [table.stored_row(values) for values in array[some]]
            writer.write_table(table.table(report["files"][some], report["images_sha256"][some], stored))
    return copy


def build_manifest(
    parts: PartFolder, records: Mapping[str, BlockRecord], blocks: int, notes: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a folder of parts.

    Ids are compared, and the error of storing is added up, only once all blocks of the source are there.

    Args:
        parts: The folder.
        records: Records of its blocks by name.
        blocks: Number of blocks of the source.
        notes: Further entries.
    """
    done = [record for record in records.values() if record.complete]
    problems = [record.problem for record in done if record.problem]
    whole = len(done) == len(records) == blocks
    manifest: dict[str, Any] = {
        "layout": LAYOUT,
        "job": parts.job,
        "job_sha256": parts.job_sha256,
        "schema": {field.name: str(field.type) for field in parts.table.schema},
        "shapes": {f"features{ending}": list(shape) for ending, shape in parts.table.shapes.items()},
        "complete": whole and not problems,
        "source_blocks": blocks,
        "missing_blocks": blocks - len(done),
        "problems": problems,
        "images": sum(record.images for record in done),
        "corrupt_images": sum(len(record.corrupt) for record in done),
        "bytes": sum(part.bytes for record in done for part in record.parts),
    }
    if whole:
        files = [parts.folder / part.file for record in done for part in record.parts]
        twice = repeated_ids(files, manifest["images"])
        manifest["repeated_ids"] = {"count": len(twice), "first": twice[:MOST_LISTED]}
        if not parts.table.exact:
            manifest["error"] = _storage_error(files)
    return {
        **manifest,
        **notes,
        "machine": machine(),
        "versions": versions(),
        "blocks": [asdict(record) for record in done],
    }


def _storage_error(files: Sequence[Path]) -> dict[str, float]:
    error = StorageError()
    for file in files:
        names = [name for name in pq.read_schema(file).names if name.startswith("error")]
        error.add(pq.read_table(file, columns=names))
    return error.to_dict()


def repeated_ids(files: Sequence[Path], rows: int) -> list[str]:
    """Return the ids that more than one image has, sorted.

    The hashes of at most about IDS_AT_ONCE ids are in memory together; files are read again for the others.

    Args:
        files: Parquet files of features.
        rows: Number of images in all of them.
    """
    rounds = -(-rows // IDS_AT_ONCE) or 1
    suspects: set[int] = set()
    for i in range(rounds):
        hashes = np.sort(np.concatenate([np.empty(0, np.int64), *(h[h % rounds == i] for h in map(_hashes, files))]))
        suspects.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return []
    counts = Counter(name for file in files for name in _ids(file) if hash(name) in suspects)
    return sorted(name for name, count in counts.items() if count > 1)


def _ids(file: Path) -> list[str]:
    ids: list[str] = pq.read_table(file, columns=["id"])["id"].to_pylist()
    return ids


def _hashes(file: Path) -> np.ndarray:
    return np.fromiter(map(hash, _ids(file)), np.int64)
