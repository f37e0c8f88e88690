"""Features on disk: Parquet parts, a record for each block of the source, and the manifest of a folder.

A block is complete when its record says so; until then, and when its images may have changed, its parts are the place
where rows of known images are taken from. Records are files of their own, so that processes share a folder without
waiting for each other. Once all blocks are complete, the manifest holds them, and the records are deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.encoder.feature_table import FeatureTable
from pivot_hub.errors import DataError, OutputError
from pivot_hub.files import write_json
from pivot_hub.outputs import is_bystander, lock_output
from pivot_hub.provenance import file_sha256

MANIFEST, WORK, JOB_FILE = "manifest.json", "work", "job.json"
LAYOUT = 1  # version of parts, records and manifest
_PART = re.compile(r"[0-9a-f]{16}-\d{4}-[0-9a-f]{8}\.parquet")
KEY = 16  # characters of the key that a block's files are named by
KEPT_GROUPS = 2  # row groups of earlier parts in memory


@dataclass(frozen=True)
class Part:
    """A Parquet file of features.

    Args:
        file: Name of the file.
        sha256: Hash of the file.
        rows: Number of images.
        row_groups: Number of row groups.
        bytes: Size of the file.
    """

    file: str
    sha256: str
    rows: int
    row_groups: int
    bytes: int


@dataclass
class BlockRecord:
    """What is on disk of a block.

    Args:
        block: Name of the block.
        stamp: Stamp of its contents when it was read; None where they must be looked at again.
        parts: Parts with the block's images in order.
        earlier: Parts of an earlier state, from which rows of known images are taken until the block is complete.
        corrupt: Images that cannot be used: id, reason and sha256.
        problem: Why the block could not be read to its end.
        complete: Whether the block was read to its end, or to its problem.
    """

    block: str
    stamp: str | None = None
    parts: list[Part] = field(default_factory=list)
    earlier: list[Part] = field(default_factory=list)
    corrupt: list[dict[str, str]] = field(default_factory=list)
    problem: str | None = None
    complete: bool = False

    @property
    def images(self) -> int:
        return sum(part.rows for part in self.parts)

    def __len__(self) -> int:
        return self.images + len(self.corrupt)


def job_hash(job: Mapping[str, Any]) -> str:
    """Return the hash of whatever features depend on besides the images."""
    return hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()


def differing_keys(job: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return what two jobs differ in."""
    return sorted(key for key in {*job, *other} if job.get(key) != other.get(key))


def block_key(name: str) -> str:
    """Return the key that the files of a block are named by."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:KEY]


class PartFolder:
    """A folder of features of one job.

    Args:
        folder: The folder, which need not exist.
        job: Whatever the features depend on besides the images.
        table: Columns of the features.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], table: FeatureTable) -> None:
        self.folder, self.table = folder, table
        self.job: dict[str, Any] = json.loads(json.dumps(job, default=str))
        self.job_sha256 = job_hash(job)
        self.work = folder / WORK
        self._manifest: tuple[int, dict[str, BlockRecord]] | None = None

    def open(self) -> None:
        """Create the folder.

        Raises:
            DataError: It holds parts of another job; the message names what differs.
        """
        job = self._stored_job()
        if job is not None and (differing := differing_keys(job, self.job)):
            raise DataError(
                f"{self.folder} holds parts of another run, which differs in {', '.join(differing)}; delete it or "
                "choose another --out."
            )
        self.work.mkdir(parents=True, exist_ok=True)
        if job is None:
            write_json(self.work / JOB_FILE, self.job)

    def _stored_job(self) -> dict[str, Any] | None:
        manifest = read_manifest(self.folder)
        if manifest is not None:
            return manifest["job"]
        try:
            job = json.loads((self.work / JOB_FILE).read_text())
        except (OSError, ValueError):
            return None
        return job if isinstance(job, dict) else None

    def record(self, name: str) -> BlockRecord:
        """Return the record of a block, without parts that are missing or damaged; an empty one of a new block."""
        record = self._read_record(name)
        for parts in (record.parts, record.earlier):
            whole = [part for part in parts if self._is_whole(part)]
            record.complete &= len(whole) == len(parts)
            parts[:] = whole
        return record

    def _read_record(self, name: str) -> BlockRecord:
        try:
            values = json.loads(self._record_file(name).read_text())
            if values.pop("job_sha256") == self.job_sha256:
                return to_record(values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or not written by this version
            pass
        # Read after the record: whoever deletes records has written them to the manifest before.
        return self._manifest_records().get(name) or BlockRecord(name)

    def _manifest_records(self) -> dict[str, BlockRecord]:
        try:
            changed = (self.folder / MANIFEST).stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if self._manifest is None or self._manifest[0] != changed:
            manifest = read_manifest(self.folder)
            records = [] if manifest is None else [to_record(values) for values in manifest["blocks"]]
            self._manifest = (changed, {record.block: record for record in records})
        return self._manifest[1]

    def _is_whole(self, part: Part) -> bool:
        file = self.folder / part.file
        return file.is_file() and file.stat().st_size == part.bytes and file_sha256(file) == part.sha256

    def write_record(self, record: BlockRecord) -> None:
        """Write the record of a block; of a complete one, the earlier parts that it no longer needs are deleted."""
        earlier = [part.file for part in record.earlier]
        if record.complete:
            record.earlier = []
        write_json(self._record_file(record.block), {"job_sha256": self.job_sha256, **asdict(record)})
        if record.complete:
            self._delete_parts(set(earlier) - {part.file for part in record.parts})

    def written_at(self, name: str) -> float:
        """Return when the record of a block was written, in seconds since the epoch; 0 if there is none."""
        try:
            return self._record_file(name).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def write_part(self, name: str, number: int, tables: Sequence[pa.Table]) -> Part:
        """Write a part of a block; the file's name follows from its content."""
        temporary = self.work / f"{block_key(name)}.{os.getpid()}.parquet"
        table = pa.concat_tables(tables)
        with pq.ParquetWriter(temporary, self.table.schema, write_page_index=True) as writer:
            writer.write_table(table, row_group_size=max(len(table), 1))
        sha256 = file_sha256(temporary)
        file = f"{block_key(name)}-{number:04}-{sha256[:8]}.parquet"
        size = temporary.stat().st_size
        temporary.replace(self.folder / file)
        return Part(file, sha256, len(table), pq.read_metadata(self.folder / file).num_row_groups, size)

    def records(self) -> dict[str, BlockRecord]:
        """Return the records of all blocks by their names, in the order of their names."""
        records = dict(self._manifest_records())
        for file in self.work.glob("*.json"):
            if file.name == JOB_FILE:
                continue
            try:
                values = json.loads(file.read_text())
                if values.pop("job_sha256") == self.job_sha256:
                    record = to_record(values)
                    records[record.block] = record
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                continue
        return {name: records[name] for name in sorted(records)}

    def forget(self, records: Iterable[BlockRecord]) -> None:
        """Delete the records and the parts of blocks."""
        for record in records:
            self._record_file(record.block).unlink(missing_ok=True)
            self._delete_parts({part.file for part in (*record.parts, *record.earlier)})

    def _delete_parts(self, names: Iterable[str]) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def finish(self, manifest: Mapping[str, Any], complete: bool) -> None:
        """Write the manifest; once it is complete, delete the records, and the parts that killed processes left.

        Blocks that other processes work on are left alone.
        """
        write_json(self.folder / MANIFEST, manifest)
        if not complete:
            return
        named = {part["file"] for block in manifest["blocks"] for part in block["parts"]}
        keys = {file.name[:KEY] for file in self.folder.glob("*.parquet") if file.name not in named}
        keys |= {file.name[:KEY] for file in self.work.glob("*") if file.name != JOB_FILE and file.name[0] != "."}
        for key in keys:
            with suppress(OutputError), lock_output(self.work / key):
                for file in (*self.work.glob(f"{key}*"), *self.folder.glob(f"{key}-*.parquet")):
                    if file.name not in named:
                        file.unlink()
        (self.work / JOB_FILE).unlink(missing_ok=True)
        with suppress(OSError):  # another process works on a block
            self.work.rmdir()

    def _record_file(self, name: str) -> Path:
        return self.work / f"{block_key(name)}.json"


def to_record(values: dict[str, Any]) -> BlockRecord:
    """Return the record of a block from its JSON form."""
    parts = {key: [Part(**part) for part in values[key]] for key in ("parts", "earlier")}
    return BlockRecord(**{**values, **parts})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder of features, or None if there is none that `encode` wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    keys = {"layout", "job", "job_sha256", "blocks"}
    return manifest if isinstance(manifest, dict) and keys <= manifest.keys() else None


def check_part_folder(folder: Path) -> None:
    """Refuse a folder that holds files which `encode` did not write.

    Raises:
        OutputError: There is such a file, or the folder is a file. Nothing was touched.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} was not written by `pivot encode`, so it is not replaced; choose another --out.")
    for file in sorted(folder.glob("*")):
        ours = _PART.fullmatch(file.name) or file.name in (MANIFEST, WORK) or re.search(r"\.\d+$", file.name)
        if file.name == MANIFEST and read_manifest(folder) is None:
            ours = None
        if not ours and not is_bystander(file.name):
            raise OutputError(f"{file} is no part of features, so {folder} is not used; choose another --out.")


@dataclass(frozen=True)
class StoredFeatures:
    """Place of an image's features: a Parquet file, and the row in it."""

    file: Path
    row: int
    sha256: str


class EarlierRows:
    """Rows of Parquet files by the ids of their images, read a row group at a time.

    Args:
        files: Files with the columns of features.
        others: Further rows, which are asked for ids that the files lack.
    """

    def __init__(self, files: Sequence[Path], others: EarlierRows | None = None) -> None:
        self.others = others
        self._rows: dict[str, StoredFeatures] = {}
        for file in files:
            columns = pq.read_table(file, columns=["id", "sha256"])
            pairs = zip(columns["id"].to_pylist(), columns["sha256"].to_pylist(), strict=True)
            self._rows |= {name: StoredFeatures(file, row, sha256) for row, (name, sha256) in enumerate(pairs)}
        self._group = lru_cache(KEPT_GROUPS)(_row_group)
        self._starts = cache(_group_starts)

    def find(self, name: str) -> StoredFeatures | None:
        """Return the place of an image's features, or None."""
        own = self._rows.get(name)
        return own if own is not None or self.others is None else self.others.find(name)

    def table(self, name: str) -> pa.Table:
        """Read the row of an image."""
        stored = self._rows.get(name)
        if stored is None:
            assert self.others is not None
            return self.others.table(name)
        starts = self._starts(stored.file)
        group = bisect_right(starts, stored.row) - 1
        return self._group(stored.file, group).slice(stored.row - starts[group], 1)


def _row_group(file: Path, group: int) -> pa.Table:
    with pq.ParquetFile(file) as opened:
        return opened.read_row_group(group)


def _group_starts(file: Path) -> list[int]:
    """Return the first row of each row group."""
    metadata = pq.read_metadata(file)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [0, *accumulate(sizes)][:-1]


def iter_tables(folder: Path, records: Iterable[BlockRecord]) -> Iterator[pa.Table]:
    """Yield the features of blocks, a row group at a time."""
    for record in records:
        for part in record.parts:
            with pq.ParquetFile(folder / part.file) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)
