"""Join folders of parts, which processes wrote apart, into one folder or one file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pivot_hub.encoder.feature_file import (
    SUFFIXES,
    build_manifest,
    check_fits,
    check_target,
    file_report,
    write_file,
)
from pivot_hub.encoder.feature_parts import (
    BlockRecord,
    PartFolder,
    check_part_folder,
    differing_keys,
    iter_tables,
    read_manifest,
    to_record,
)
from pivot_hub.encoder.feature_table import FeatureTable
from pivot_hub.errors import DataError
from pivot_hub.outputs import lock_output
from pivot_hub.provenance import file_sha256


def merge_features(folders: Sequence[Path], output: Path) -> dict[str, Any]:
    """Join folders of one job. The images are in the order of their blocks' names.

    A block that several folders hold is taken from the first that holds it without a problem. Parts are linked, or
    copied where that is not possible.

    Args:
        folders: Folders that `encode_source` wrote.
        output: Folder, or file that ends in .parquet or .npy. It may be the first of the folders.

    Returns:
        The manifest of the folder, or the report of the file.

    Raises:
        DataError: A folder is not finished, is of another job, or has a damaged part; or the features do not fit.
        OutputError: The output was not written by `encode`, or another process is writing it.
    """
    manifests = {folder: _manifest(folder) for folder in folders}
    first = next(iter(manifests.values()))
    for folder, manifest in manifests.items():
        if differing := differing_keys(first["job"], manifest["job"]):
            raise DataError(f"{folder} is of another run than {folders[0]}: {', '.join(differing)}; merge each alone.")
    chosen: dict[str, tuple[Path, BlockRecord]] = {}
    for folder, manifest in manifests.items():
        for record in map(to_record, manifest["blocks"]):
            other = chosen.get(record.block)
            if other is None or (other[1].problem and not record.problem):
                chosen[record.block] = (folder, record)
    chosen = {name: chosen[name] for name in sorted(chosen)}
    for folder, record in chosen.values():
        for part in record.parts:
            if not (folder / part.file).is_file() or file_sha256(folder / part.file) != part.sha256:
                raise DataError(f"{folder / part.file} is damaged; run the command that wrote {folder} again.")
    blocks = max(manifest["source_blocks"] for manifest in manifests.values())
    job = first["job"]
    table = FeatureTable(job["shapes"], job["store"], job["dtype"])
    if output.suffix in SUFFIXES:
        return _to_file(output, table, job, chosen, blocks)
    return _to_folder(output, table, job, chosen, max(blocks, len(chosen)))


def _manifest(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(
            f"{folder} holds no manifest.json of `pivot encode`; run the command that writes it to its end."
        )
    return manifest


def _to_file(
    output: Path, table: FeatureTable, job: dict[str, Any], chosen: dict[str, tuple[Path, BlockRecord]], blocks: int
) -> dict[str, Any]:
    check_fits(output, table)
    with lock_output(output):
        check_target(output)
        records = [record for _, record in chosen.values()]
        tables = (group for folder, record in chosen.values() for group in iter_tables(folder, [record]))
        temporary = output.with_name(f".{output.name}.{os.getpid()}{output.suffix}")
        try:
            entries = write_file(temporary, table, tables, sum(record.images for record in records))
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)
        return file_report(output, job, table, records, {**entries, "missing_blocks": blocks - len(records)})


def _to_folder(
    output: Path, table: FeatureTable, job: dict[str, Any], chosen: dict[str, tuple[Path, BlockRecord]], blocks: int
) -> dict[str, Any]:
    check_part_folder(output)
    parts = PartFolder(output, job, table)
    with lock_output(output):
        parts.open()
        for folder, record in chosen.values():
            for part in record.parts:
                _link(folder / part.file, output / part.file)
        manifest = build_manifest(parts, {name: record for name, (_, record) in chosen.items()}, blocks, {})
        parts.finish(manifest, manifest["missing_blocks"] == 0)
    return manifest


def _link(source: Path, target: Path) -> None:
    """Link a file, or copy it; a reader sees it whole."""
    if target.exists():
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
