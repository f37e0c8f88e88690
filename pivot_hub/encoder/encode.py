"""Encode the images of any source, and write their features to one file or to a folder of parts."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa
import torch
from PIL import Image
from torch import nn

from pivot_hub.data.image import DECODING
from pivot_hub.data.image_blocks import BLOCK, Block, ImageSource, SourceImage, SourceOptions
from pivot_hub.data.image_source import open_source
from pivot_hub.encoder.batches import (
    BatchEncoder,
    Decoder,
    Engine,
    Item,
    Loader,
    Prepared,
    Preparer,
    Processes,
    RowEncoder,
)
from pivot_hub.encoder.device import compute_device
from pivot_hub.encoder.feature_file import (
    SUFFIXES,
    build_manifest,
    check_fits,
    check_target,
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
    check_part_folder,
    iter_tables,
)
from pivot_hub.encoder.feature_table import STORES, FeatureTable, StoredRow
from pivot_hub.encoder.modeling_pivot import input_names
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.encoder.share import Share
from pivot_hub.errors import CheckpointError, DataError, OutputError, shown_text
from pivot_hub.outputs import lock_output

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A stopped run resumes at the last part, which holds at most so many images, bytes and seconds of work.
PART_IMAGES, PART_BYTES, PART_S = 8192, 64_000_000, 300.0
# Takes the images done, the images in all or None, and images per second.
Progress = Callable[[int, int | None, float], None]


@dataclass(frozen=True)
class EncodeOptions:
    """How images are encoded.

    Args:
        tokens: Whether to write all patch tokens (H*W, D) of an image instead of their mean (D). Those of a tower of
            native resolution are written as Parquet only, in which the columns `height` and `width` are the shape of
            the image's own grid.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 or bfloat16.
        store: Type of the stored features: float32, float16, bfloat16 (as its bits, uint16) or int8 (with the number
            that an image's features are multiplied by, in the column `scale`). By default float32, and float16 if that
            is the precision.
        workers: Number of processes that decode images; by default one for each core, 0 for none.
    """

    tokens: bool = False
    batch: int = 32
    dtype: str = "float32"
    store: str | None = None
    workers: int | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            DataError: The message names the value and the range.
        """
        if self.dtype not in DTYPES:
            raise DataError(f"dtype {self.dtype!r} is not known; give one of {', '.join(DTYPES)}.")
        if self.store is not None and self.store not in STORES:
            raise DataError(f"store {self.store!r} is not known; give one of {', '.join(STORES)}.")
        if self.batch < 1:
            raise DataError(f"batch {self.batch}: give 1 image or more.")
        if self.workers is not None and self.workers < 0:
            raise DataError(f"workers {self.workers}: give 0 or more processes.")

    def row_encoder(self, model: Any, further_layers: Sequence[int] = ()) -> RowEncoder:
        """Return the holder of an encoder that is on its device in the precision of the options.

        Args:
            model: The encoder.
            further_layers: Numbers of hidden states besides the model's own feature layer.
        """
        encoder = BatchEncoder(model, self.tokens, further_layers)
        store = self.store or ("float16" if self.dtype == "float16" else "float32")
        return RowEncoder(encoder, FeatureTable(encoder.shapes(), store, self.dtype))


def encode_source(
    encoder: str | Path,
    source: str | Path,
    output: str | Path,
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, speed: None,
    feature_layer: int | str | Sequence[int | str] | None = None,
    store: str | None = None,
    share: Share = Share(),
    source_options: SourceOptions = SourceOptions(),
    ray: str | None = None,
) -> dict[str, Any]:
    """Encode every image of a source; a stopped run resumes when it is called again.

    If images were added to a source or replaced since a finished run, only those are encoded.

    Args:
        encoder: Folder or Hub name of the encoder.
        source: Images, see `pivot_hub.data.image_source.open_source`.
        output: File to write, `.parquet` with the columns `id`, `sha256` and `features`, or `.npy`, for which the
            report lists the file of each row; or a folder of such Parquet parts with a `manifest.json`.
        tokens: Whether to write all patch tokens, see `EncodeOptions`.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 or bfloat16.
        workers: Number of processes that decode images; by default one for each core, 0 for none.
        progress: Function that is called after every batch.
        feature_layer: Hidden state to write, see `PivotVisionModel.from_pretrained`; the repository's own by default.
            Of several, the further ones are numbers, and each has its columns, as in `features_26`.
        store: Type of the stored features, see `EncodeOptions`.
        share: Which of several processes this is. They write to a folder.
        source_options: How tables are read.
        ray: Address of a Ray cluster that decodes and encodes the images, see `pivot_hub.encoder.ray_cluster`; by
            default this process does.

    Returns:
        Of a file, the report, which is also written beside it as `<output>.json`: encoder, shape of an image's
        features, ids in order (`files`), corrupt images with their reason, what was not read, images per second. Of a
        folder, its manifest, with what this process did.

    Raises:
        CheckpointError: The encoder cannot be loaded, or gives other features than it was published with.
        DataError: There is no image, the output has an unknown suffix or one that the features do not fit, the parts
            of another run are in its place, features are not finite, or Ray cannot be used.
        OutputError: The output was not written by this function, or another process is writing it.
    """
    target = Path(output)
    is_file = target.suffix in SUFFIXES
    if target.suffix and not is_file and not target.is_dir():
        raise DataError(f"{target}: features are written as .parquet or .npy, or to a folder; give --out such a name.")
    if is_file and share.count > 1:
        raise DataError(f"{target}: several processes write to a folder; give --out one, then join it with --merge.")
    options = EncodeOptions(tokens, batch, dtype, store, workers)
    options.check()
    opened = open_source(str(source), source_options)
    if opened.once and share.count > 1:
        raise DataError("stdin reaches one process only; write the paths to a .txt file for several.")
    (check_target if is_file else check_part_folder)(target)
    layers: Sequence[Any] = feature_layer if isinstance(feature_layer, (list, tuple)) else [feature_layer]
    model, processor = read_encoder(encoder, dtype=DTYPES[options.dtype], feature_layer=layers[0])
    metadata = encoder_metadata(encoder)
    rows = options.row_encoder(model, layers[1:])
    if ray is None:
        cast(nn.Module, model).to(compute_device())
        engine: Engine = Processes(rows, workers)
    else:
        from pivot_hub.encoder.ray_cluster import RayCluster

        place = Path(encoder).absolute() if Path(encoder).exists() else encoder
        engine = RayCluster(ray, EncoderLoader(place, metadata["encoder_sha256"], layers, options), workers)
    run = _Run(rows, processor, _Sources(), options, progress, engine)
    job = run.job(metadata)
    if is_file:
        check_fits(target, run.table)
        with lock_output(target):
            check_target(target)
            return run.to_file(opened, target, job, reuse=True)
    return run.to_folder(opened, target, {**job, "source": opened.name, **vars(source_options)}, share)


@dataclass(frozen=True)
class EncoderLoader:
    """Loads the encoder of a run in another process.

    Args:
        encoder: Folder or Hub name of the encoder.
        sha256: Hash of its weights.
        layers: Hidden state that the model returns, None for that of its config, and the numbers of further ones.
        options: How images are encoded.
    """

    encoder: str | Path
    sha256: str
    layers: Sequence[Any]
    options: EncodeOptions

    def __call__(self) -> RowEncoder:
        """Load the encoder onto this process's device.

        Raises:
            CheckpointError: It cannot be loaded here, or has other weights here.
        """
        model, _ = read_encoder(self.encoder, dtype=DTYPES[self.options.dtype], feature_layer=self.layers[0])
        if encoder_metadata(self.encoder)["encoder_sha256"] != self.sha256:
            raise CheckpointError(f"{self.encoder} has other weights on another machine; give all the same ones.")
        cast(nn.Module, model).to(compute_device())
        return self.options.row_encoder(model, self.layers[1:])


class Images(Protocol):
    """Sequence of named images, which is copied to worker processes."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, index: int) -> Image.Image:
        """Decode an image as RGB, or raise a DataError that names it if it cannot be decoded."""


def encode_images(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    options: EncodeOptions = EncodeOptions(),
    progress: Progress = lambda done, total, speed: None,
) -> dict[str, Any]:
    """Encode named images into one file that is a cache; a stopped run resumes with the same metadata.

    Another process that writes the file is waited for, and whatever is in its place is replaced.

    Args:
        model: The encoder, on its device in the precision of the options.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File to write, `.parquet` or `.npy` as in `encode_source`.
        metadata: Identity of the encoder and of the images, which decides whether a stopped run can be resumed.
        options: How images are encoded.
        progress: Function that is called after every batch.

    Returns:
        The report that `encode_source` describes.

    Raises:
        DataError: The features do not fit the output, are not finite, or the processes that decode images cannot run.
    """
    run = _named_run(model, processor, images, target, options, progress)
    with lock_output(target, wait=True):
        return run.to_file(_named_source(images), target, run.job(metadata), reuse=False)


def encode_share(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    share: Share,
    options: EncodeOptions = EncodeOptions(),
    progress: Progress = lambda done, total, speed: None,
) -> None:
    """Encode one process's share of named images, before one process writes them all by `encode_images`.

    Args:
        model: The encoder, on its device in the precision of the options.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File that `encode_images` is to write.
        metadata: Identity of the encoder and of the images.
        share: Which of the processes this is.
        options: How images are encoded.
        progress: Function that is called after every batch.

    Raises:
        DataError: As in `encode_images`.
    """
    run = _named_run(model, processor, images, target, options, progress)
    parts = PartFolder(partial_folder(target), run.job(metadata), run.table)
    with lock_output(target, wait=True):
        parts.open()
    run.encode(_named_source(images), share, parts)


def _named_run(
    model: Any, processor: Any, images: Images, target: Path, options: EncodeOptions, progress: Progress
) -> _Run:
    rows = options.row_encoder(model)
    check_fits(target, rows.table)
    return _Run(rows, processor, _NamedImages(images), options, progress, Processes(rows, options.workers))


@dataclass(frozen=True)
class _Index:
    """An image of a sequence."""

    id: str
    index: int


def _named_source(images: Images) -> ImageSource:
    count = len(images.names)

    def block(start: int) -> Block:
        indices = range(start, min(start + BLOCK, count))
        return Block(f"{start:012}", lambda: (_Index(images.names[i], i) for i in indices), lambda: "")

    return ImageSource("", lambda: map(block, range(0, count, BLOCK)), count)


@dataclass(frozen=True)
class _NamedImages:
    """Loader of a sequence of images, whose contents are known by the job."""

    images: Images

    def load(self, place: _Index, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        try:
            return "", None if known is not None else self.images.open(place.index)
        except DataError as error:
            return "", error


class _Sources:
    """Loader of the images of a source."""

    def load(self, place: SourceImage, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        return place.load(known)


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


class _Run:
    """Encodes the blocks of sources with one encoder.

    Args:
        rows: Holder of the encoder.
        processor: Its image processor.
        loader: Reader of the images.
        options: How images are encoded.
        progress: Function that is called after every batch.
        engine: What decodes and encodes.
    """

    def __init__(
        self,
        rows: RowEncoder,
        processor: Any,
        loader: Loader,
        options: EncodeOptions,
        progress: Progress,
        engine: Engine,
    ) -> None:
        self.encoder, self.table = rows.encoder, rows.table
        self.decoder = Decoder(loader, Preparer(processor, input_names(self.encoder.model.config)))
        self.options, self.progress, self.engine = options, progress, engine
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
            "dtype": self.options.dtype,
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
            for batch in self.engine(items, self.decoder, self.options.batch):
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
