"""Blocks of images on their way through an engine to parts on disk: what is known, what is new, what resumes."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from pivot_hub.data.image import DECODING
from pivot_hub.data.image_blocks import Block, ImageSource
from pivot_hub.encoder.batches import (
    Decoder,
    Engine,
    Item,
    Loader,
    Prepared,
    Preparer,
    RowEncoder,
)
from pivot_hub.encoder.feature_file import (
    build_manifest,
    file_report,
    finished_report,
    partial_folder,
    unpacked,
    write_file,
)
from pivot_hub.encoder.feature_parts import (
    BlockRecord,
    EarlierRows,
    PartFolder,
    block_key,
    iter_tables,
)
from pivot_hub.encoder.feature_table import StoredRow
from pivot_hub.encoder.modeling_pivot import input_names
from pivot_hub.encoder.share import Share
from pivot_hub.errors import DataError, OutputError, shown_text
from pivot_hub.outputs import lock_output

# A stopped run resumes at the last part, which holds at most so many images, bytes and seconds of work.
PART_IMAGES, PART_BYTES, PART_S = 8192, 64_000_000, 300.0
# Takes the images done, the images in all or None, and images per second.
Progress = Callable[[int, int | None, float], None]


@dataclass
class _BlockJob:
    """A block that is being encoded.

    Args:
        number: Number of the block in this run.
        record: Its record, which grows by a part at a time.
        previous: Its record before this run.
        known: Rows of its earlier parts.
        known_corrupt: Reasons and hashes of its images that could not be used.
        locked: Holds the lock of the block.
        block: The block.
        stamp: Its stamp before it was read.
    """

    number: int
    record: BlockRecord
    previous: BlockRecord
    known: EarlierRows
    known_corrupt: Mapping[str, dict[str, str]]
    locked: ExitStack
    block: Block
    stamp: str | None
    listed: int = 0
    received: int = 0
    is_listed: bool = False
    names: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    rows: list[StoredRow | None] = field(default_factory=list)  # None for rows of earlier parts
    nbytes: int = 0
    since: float = field(default_factory=time.monotonic)

    def known_hash(self, name: str) -> str | None:
        """Return the hash of an image's file whose features, or whose problem, are known."""
        if (stored := self.known.find(name)) is not None:
            return stored.sha256
        corrupt = self.known_corrupt.get(name)
        return None if corrupt is None or not corrupt["sha256"] else corrupt["sha256"]

    def add(self, image: Prepared, row: StoredRow | None) -> None:
        """Add an image that was read; without a row, its row or its problem is known."""
        self.received += 1
        problem = image.problem
        if row is None and problem is None and self.known.find(image.name) is None:
            problem = self.known_corrupt[image.name]["reason"]
        if problem is not None:
            self.record.corrupt.append({"file": image.name, "reason": problem, "sha256": image.sha256})
            return
        self.names.append(image.name)
        self.hashes.append(image.sha256)
        self.rows.append(row)
        self.nbytes += row.nbytes if row else 0

    def forget_rows(self) -> None:
        """Start a part."""
        self.names, self.hashes, self.rows, self.nbytes, self.since = [], [], [], 0, time.monotonic()

    def is_full(self) -> bool:
        """Return whether the images that are not on disk are as many as a stopped run may lose."""
        enough = len(self.names) >= PART_IMAGES or self.nbytes >= PART_BYTES
        return enough or (len(self.names) > 0 and time.monotonic() - self.since > PART_S)


class EncodingRun:
    """Encodes the blocks of sources with one encoder.

    Args:
        rows: Holder of the encoder.
        processor: Its image processor.
        loader: Reader of the images.
        batch: Number of images in a forward pass.
        progress: Function that is called after every batch.
        engine: What decodes and encodes.
    """

    def __init__(
        self,
        rows: RowEncoder,
        processor: Any,
        loader: Loader,
        batch: int,
        progress: Progress,
        engine: Engine,
    ) -> None:
        self.encoder, self.table = rows.encoder, rows.table
        self.decoder = Decoder(loader, Preparer(processor, input_names(self.encoder.model.config)))
        self.batch, self.progress, self.engine = batch, progress, engine
        self.done = self.resumed = 0
        self.seen: list[str] = []  # names of the blocks of all processes
        self.busy: list[str] = []  # names of the blocks that other processes work on
        self.unreadable: list[str] = []
        self._jobs: deque[_BlockJob] = deque()
        self._number = 0
        self._started, self._started_at = time.monotonic(), time.time()

    def job(self, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return whatever the features depend on besides the images."""
        layers = self.encoder.layers
        return {
            **metadata,
            "feature_layer": layers[0] if len(layers) == 1 else layers,
            "shapes": self.table.shapes,
            "dtype": self.table.dtype,
            "store": self.table.store,
            "processor": self.decoder.prepare.processor.to_dict(),
            "decoding": DECODING,
        }

    def to_file(self, source: ImageSource, target: Path, job: dict[str, Any], reuse: bool) -> dict[str, Any]:
        """Encode a source into one file, whose lock is held.

        Args:
            source: The images.
            target: File to write.
            job: Whatever the features depend on besides the images.
            reuse: Whether features of a finished file are used for images whose hashes are the same.
        """
        parts = PartFolder(partial_folder(target), job, self.table)
        parts.open()
        report = finished_report(target) if reuse else None
        finished, known_corrupt = None, {}
        if report is not None and report.get("job_sha256") == parts.job_sha256:
            finished = EarlierRows([unpacked(target, report, self.table, parts.work)])
            known_corrupt = {entry["file"]: entry for entry in report["corrupt"]}
        self.encode(source, Share(), parts, finished, known_corrupt)
        records = parts.records()
        ordered = [records[name] for name in self.seen if name in records and records[name].complete]
        images = sum(record.images for record in ordered)
        temporary = parts.work / f"merged{target.suffix}"
        entries = write_file(temporary, self.table, iter_tables(parts.folder, ordered), images)
        temporary.replace(target)
        duration = time.monotonic() - self._started
        report = file_report(
            target,
            job,
            self.table,
            ordered,
            {
                "resumed_images": self.resumed,
                "duration_s": round(duration, 2),
                "images_per_s": round((self.done - self.resumed) / duration, 2),
                **entries,
                "not_read": source.not_read,
                "problems": [*(record.problem for record in ordered if record.problem), *self.unreadable],
                "missing_blocks": len(self.seen) - len(ordered),
                "source_blocks": len(self.seen),
            },
        )
        if not report["missing_blocks"]:
            shutil.rmtree(parts.folder)
        return report

    def to_folder(self, source: ImageSource, folder: Path, job: dict[str, Any], share: Share) -> dict[str, Any]:
        """Encode a share of a source into a folder of parts."""
        parts = PartFolder(folder, job, self.table)
        folder.mkdir(parents=True, exist_ok=True)
        with lock_output(folder, wait=True):
            parts.open()
        self.encode(source, share, parts)
        duration = time.monotonic() - self._started
        with lock_output(folder, wait=True):
            records = parts.records()
            if source.is_listing:  # its images are in other blocks now
                parts.forget([records.pop(name) for name in records.keys() - set(self.seen)])
            manifest = build_manifest(parts, records, len({*self.seen, *records}), {"not_read": source.not_read})
            parts.finish(manifest, manifest["missing_blocks"] == 0)
        return {
            **manifest,
            "problems": [*manifest["problems"], *self.unreadable],
            "busy_blocks": self.busy,
            "resumed_images": self.resumed,
            "images_per_s": round((self.done - self.resumed) / duration, 2),
        }

    def encode(
        self,
        source: ImageSource,
        share: Share,
        parts: PartFolder,
        finished: EarlierRows | None = None,
        known_corrupt: Mapping[str, dict[str, str]] = {},
    ) -> None:
        """Encode the blocks of a share that are not on disk yet.

        Args:
            source: The images.
            share: Which of several processes this is.
            parts: Folder of the features, which is open.
            finished: Further rows of known images.
            known_corrupt: Records of images that could not be used.
        """
        items = self._items(source, share, parts, finished, known_corrupt)
        try:
            for batch in self.engine(items, self.decoder, self.batch):
                job = next(job for job in self._jobs if job.number == batch[0][0].block)
                for image, row in batch:
                    job.add(image, row)
                    self.done += 1
                    self.resumed += row is None and image.problem is None
                if job.is_full():
                    self._write_part(job, parts)
                self._close_complete(parts)
                speed = (self.done - self.resumed) / (time.monotonic() - self._started)
                self.progress(self.done, source.count if share.count == 1 else None, speed)
            self._close_complete(parts)
        finally:
            for job in self._jobs:
                job.locked.close()

    def _items(
        self,
        source: ImageSource,
        share: Share,
        parts: PartFolder,
        finished: EarlierRows | None,
        known_corrupt: Mapping[str, dict[str, str]],
    ) -> Iterator[Item]:
        """Yield the images of the blocks that are not on disk yet, and hold the lock of each block."""
        for block in self._blocks(source, share):
            job = self._open(block, parts, finished, known_corrupt)
            if job is None:
                continue
            self._jobs.append(job)
            try:
                for image in block.images():
                    job.listed += 1
                    yield Item(job.number, image.id, image, job.known_hash(image.id))
            except DataError as error:
                job.record.problem = str(error)
            job.is_listed = True

    def _blocks(self, source: ImageSource, share: Share) -> Iterator[Block]:
        """Yield the blocks of this process, then those of others that it helps."""
        names: set[str] = set()
        for i, block in enumerate(source.blocks()):
            if block.name in names:
                raise DataError(f"{source.name}: two blocks are called {shown_text(block.name)}; rename one.")
            names.add(block.name)
            self.seen.append(block.name)
            if share.owns(i):
                yield block
        for i, block in enumerate(source.blocks() if share.helps else ()):
            if not share.owns(i):
                yield block

    def _open(
        self,
        block: Block,
        parts: PartFolder,
        finished: EarlierRows | None,
        known_corrupt: Mapping[str, dict[str, str]],
    ) -> _BlockJob | None:
        """Take a block unless it is complete, or another process works on it."""
        if parts.written_at(block.name) >= self._started_at and parts.record(block.name).complete:
            return None  # another process has just encoded it
        locked = ExitStack()
        try:
            locked.enter_context(lock_output(parts.work / block_key(block.name)))
        except OutputError as error:
            self.busy.append(str(error))
            return None
        record = parts.record(block.name)
        stamp, problem = _stamp(block)
        is_done = record.complete and stamp is not None and stamp == record.stamp
        if problem is not None or is_done:
            locked.close()
            self.unreadable += [problem] if problem else []
            self.done += len(record)
            self.resumed += len(record)
            return None
        self._number += 1
        earlier = {part.file: part for part in (*record.earlier, *record.parts)}
        return _BlockJob(
            number=self._number,
            record=BlockRecord(block.name, earlier=list(earlier.values())),
            previous=record,
            known=EarlierRows([parts.folder / file for file in earlier], finished),
            known_corrupt={**known_corrupt, **{entry["file"]: entry for entry in record.corrupt}},
            locked=locked,
            block=block,
            stamp=stamp,
        )

    def _write_part(self, job: _BlockJob, parts: PartFolder) -> None:
        """Write the images of a block that are in memory to a part, in order."""
        tables: list[pa.Table] = []
        images = zip(job.names, job.hashes, job.rows, strict=True)
        for is_known, run in groupby(images, key=lambda image: image[2] is None):
            if is_known:
                tables += [job.known.table(name) for name, _, _ in run]
            else:
                names, hashes, rows = zip(*run, strict=True)
                tables.append(self.table.table(names, hashes, cast(Sequence[StoredRow], rows)))
        job.record.parts.append(parts.write_part(job.record.block, len(job.record.parts), tables))
        parts.write_record(job.record)
        job.forget_rows()

    def _close_complete(self, parts: PartFolder) -> None:
        """Write the records of blocks whose images were all read."""
        while self._jobs and self._jobs[0].is_listed and self._jobs[0].received == self._jobs[0].listed:
            job = self._jobs[0]
            if job.names:
                self._write_part(job, parts)
            if job.record.problem is not None and job.record.earlier:
                self._restore(job, parts)
            else:
                stamp, problem = _stamp(job.block)
                if problem is None and stamp != job.stamp:
                    problem = f"{job.block.name}: changed while it was read; run the same command again."
                job.record.problem = job.record.problem or problem
                # What has a problem is looked at again in the next run.
                job.record.stamp = stamp if job.record.problem is None else None
                job.record.complete = True
                parts.write_record(job.record)
            job.locked.close()
            self._jobs.popleft()

    def _restore(self, job: _BlockJob, parts: PartFolder) -> None:
        """Keep what was there of a block that could not be read to its end, since it may reach further."""
        previous, problem = job.previous, job.record.problem
        if previous.complete:
            previous.stamp, previous.problem, previous.earlier = None, problem, job.record.parts
        else:
            previous.earlier += job.record.parts
            self.unreadable.append(str(problem))
        parts.write_record(previous)


def _stamp(block: Block) -> tuple[str | None, str | None]:
    """Return the stamp of a block, and why there is none if its file is gone."""
    try:
        return (None if block.stamp is None else block.stamp()), None
    except DataError as error:
        return None, str(error)
