"""The row index: every row read, checked and its image decoded once, then kept on disk in Arrow.

Training reads rows from the index. It is mapped into memory, so 3.2 million rows take no more memory than 3,000, and a
run resumes at an exact row. Its folder is named by a hash of all it depends on: the recipe's data, the files, and the
check. Its files are compared with their hashes whenever it is read; an index that differs is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from pivot_hub.config.data_section import OnBadRow, ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.image import DECODING
from pivot_hub.data.report import CheckResult, RowReport, RowStatistics
from pivot_hub.data.row import ImageSize, Row
from pivot_hub.data.source import Columns, FileSource, Source, example, files_sha256, sources_of
from pivot_hub.errors import DataError
from pivot_hub.files import write_json
from pivot_hub.outputs import OutputKind, lock_output, whole_folder
from pivot_hub.provenance import hub_commit

CHUNK = 256  # rows that one process checks at a time
Advance = Callable[[int, int | None, float], None]  # takes rows checked, their total if known, and rows per second
LAYOUT = 5  # version of the index's files
ROWS, EPOCH, REPORT, MANIFEST = "rows.arrow", "epoch.npy", "report.json", "index.json"
NAMED = 100  # bad rows whose reasons are kept; all are counted
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.int16()),
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("earlier", pa.string()),  # JSON
        ("boxes", pa.string()),  # JSON
        ("kind", pa.string()),
        ("archive", pa.string()),
        ("span", pa.list_(pa.int64())),
        ("block", pa.string()),
        ("rejected_image", pa.string()),
        ("rejected_archive", pa.string()),
        ("rejected_span", pa.list_(pa.int64())),
        ("row", pa.int64()),  # position in the index
    ]
)


class IndexFolder(OutputKind):
    """The folder of an index, a cache: whatever its files hold, it is replaced by a new one."""

    def foreign_file(self, folder: Path) -> str | None:
        return next((f.name for f in folder.iterdir() if f.name not in (ROWS, EPOCH, REPORT, MANIFEST)), None)


INDEX = IndexFolder("a row index", MANIFEST, "pivot data check")


class Check(Protocol):
    """Checks rows for a stage, and counts their tokens.

    Attributes:
        reads_rejected_images: Whether the stage reads the rejected image of a row, which is left out otherwise.
    """

    reads_rejected_images: bool

    def __call__(
        self, rows: Sequence[Row], sizes: Sequence[ImageSize | None], rejected_sizes: Sequence[ImageSize | None], /
    ) -> list[CheckResult]:
        """Return the result of each row.

        Args:
            rows: The rows.
            sizes: Size of each row's image; None for text alone.
            rejected_sizes: Size of each row's rejected image; None where it has none.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return all that the results depend on besides the rows."""


class CheckedRow(NamedTuple):
    """A row, or what is known of a row that could not be parsed, with the result of its checks.

    Args:
        row: The row; None where it could not be parsed.
        problem: Kind and error message of a row that cannot be used, or None.
        image_mode: Mode of the decoded image, as stored; None where no image was decoded.
        result: Result of the stage's check.
    """

    row: Row | None
    problem: tuple[str, str] | None = None
    image_mode: str | None = None
    result: CheckResult = CheckResult()


@dataclass(frozen=True)
class RowIndex:
    """The rows of a stage.

    Args:
        table: Rows of SCHEMA, in the order and as often as an epoch sees them.
        names: Id of every row, by its position in the index.
        sources: Sources, which the rows name by number.
        report: Report on the rows.
    """

    table: Dataset
    names: Dataset
    sources: list[Source]
    report: RowReport

    def rows(self) -> Iterator[Row]:
        """Yield every row, without its image."""
        for record in self.table:
            yield _from_record(record)

    def ids(self, positions: Iterable[int]) -> list[str]:
        """Return the ids of rows.

        Args:
            positions: Positions in the index, from the column `row` of a batch.
        """
        return [self.names[int(position)]["id"] for position in positions]

    def blocks(self) -> np.ndarray | None:
        """Number the block that each row is read with: (rows,) int64; None where all rows are cheap to read alone."""
        number_of: dict[str | None, int] = {}
        numbers = np.empty(len(self.table), np.int64)
        start = 0
        for batch in self.table.select_columns("block").with_format("arrow").iter(1 << 16):
            codes = batch["block"].combine_chunks().dictionary_encode(null_encoding="encode")
            batch_numbers = np.array(
                [number_of.setdefault(name, len(number_of)) for name in codes.dictionary.to_pylist()]
            )
            numbers[start : start + len(codes)] = batch_numbers[codes.indices.to_numpy()]
            start += len(codes)
        if set(number_of) == {None}:
            return None
        # Each row without a block becomes a block of its own.
        alone = numbers == number_of.get(None, -1)
        numbers[alone] = len(number_of) + np.arange(int(alone.sum()))
        return numbers

    def as_dataset(self, columns: Columns, image_token: str) -> Dataset:
        """Return the rows in TRL's columns, and their positions as `row`; images are decoded as batches are read.

        Args:
            columns: Form of the columns; see `source.example`.
            image_token: Token that stands for the image in plain prompts.
        """

        def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            examples = []
            for i, position in enumerate(batch["row"]):
                record = {key: values[i] for key, values in batch.items()}
                row = _from_record(record)
                source, rejected = self.sources[record["source"]], None
                images = [] if row.image is None else [source.open_image(row)]
                if row.rejected_image is not None and columns == "image_preference":
                    rejected = [source.open_image(row.with_rejected_image())]
                examples.append({**example(images, row, columns, image_token, rejected), "row": position})
            return {key: [one[key] for one in examples] for key in examples[0]}

        return self.table.with_transform(render)


def index_rows(
    loaded: LoadedRecipe,
    check: Check,
    folder: str | Path | None = None,
    advance: Advance = lambda done, total, rows_per_second: None,
    fresh: bool = False,
    workers: int | None = None,
) -> RowIndex:
    """Read and check every row before training, decoding each image once; an index that exists is read instead.

    Args:
        loaded: Recipe; its `on_bad_row` says whether a bad row raises an error or is skipped and counted.
        check: Check of a row for this stage, which also counts its tokens.
        folder: Folder of all indices; `pivot_hub/rows` below HF_HOME by default.
        advance: Function that is called as rows are checked.
        fresh: Whether to check the rows again although an index exists.
        workers: Number of processes that check; one per core by default.

    Raises:
        DataError: A row is bad and the recipe does not skip it, or no row is left; the message names file and row.
    """
    sources = sources_of(loaded)
    metadata = {
        "layout": LAYOUT,
        "decoding": DECODING,
        "data": [spec.model_dump(mode="json") for spec in loaded.recipe.data],
        "files": [source.to_dict() for source in sources],
        "check": check.to_dict(),
    }
    key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:32]
    target = Path(folder or Path(HF_HOME) / "pivot_hub" / "rows") / key
    may_skip = loaded.recipe.on_bad_row == OnBadRow.SKIP
    workers = os.cpu_count() or 1 if workers is None else workers
    if fresh or not _is_usable(target, sources, may_skip):
        # One process builds an index; others wait for it, and then find it.
        with lock_output(target.with_name(f"{key}.build"), wait=True):
            if fresh or not _is_usable(target, sources, may_skip):
                with whole_folder(target, INDEX) as partial:
                    report, archives = _build(partial, loaded, sources, check, advance, workers)
                    write_json(partial / REPORT, report.to_dict())
                    write_json(partial / MANIFEST, _manifest(partial, sources, archives))
    return _read(target, sources)


def _is_usable(folder: Path, sources: list[Source], may_skip: bool) -> bool:
    """Return whether a folder holds a whole index, whose archives have not changed.

    Args:
        folder: Folder of the index.
        sources: Sources of its rows.
        may_skip: Whether rows may have been skipped. Images are no part of an index's key, so a row that was skipped
            for its image may have been fixed since.
    """
    try:
        stored = json.loads((folder / MANIFEST).read_text())
        if stored != _manifest(folder, sources, ((number, name) for number, name, *_ in stored["archives"])):
            return False
        return may_skip or json.loads((folder / REPORT).read_text())["skipped_rows"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _manifest(folder: Path, sources: list[Source], archives: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """Describe an index for later readers: the hash of each file, and the archives that its rows point into.

    Args:
        folder: Folder of the index.
        sources: Sources of its rows.
        archives: Number of the source and name of each archive that holds images.
    """
    files = {}
    for name in (ROWS, EPOCH, REPORT):
        with (folder / name).open("rb") as file:
            files[name] = hashlib.file_digest(file, "sha256").hexdigest()
    listing = []
    for number, name in sorted(archives):
        source = sources[number]
        assert isinstance(source, FileSource)
        assert source.images is not None
        status = (source.images.root / name).stat()
        listing.append([number, name, status.st_size, status.st_mtime_ns])
    return {"files": files, "archives": listing}


def _build(
    folder: Path,
    loaded: LoadedRecipe,
    sources: list[Source],
    check: Check,
    advance: Advance,
    workers: int,
) -> tuple[RowReport, set[tuple[int, str]]]:
    """Check all rows, and write the usable ones and the order of an epoch into the folder.

    Returns:
        The report, and the number of the source and the name of each archive that holds images.
    """
    report, statistics = RowReport(), RowStatistics()
    rows_read, rows_kept, started = 0, 0, time.monotonic()
    total = _expected_rows(loaded)
    groups = [_Groups() for _ in sources]
    first_rows: list[int] = []  # position of each source's first row in the index
    first_reasons: dict[int, str] = {}  # why the first skipped row of a source is skipped
    archives: set[tuple[int, str]] = set()
    with (
        pa.OSFile(str(folder / ROWS), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as table,
    ):
        for number, source in enumerate(sources):
            first_rows.append(rows_kept)
            for chunk in _checked_chunks(source, check, workers):
                rows_read += len(chunk)
                records: list[dict[str, Any]] = []
                for row, problem, image_mode, result in chunk:
                    if problem is not None:
                        _skip(report, problem, loaded.recipe.on_bad_row)
                        first_reasons.setdefault(number, problem[1])
                        continue
                    assert row is not None
                    records.append(_to_record(row, number, rows_kept + len(records)))
                    groups[number].add(row.group)
                    archives |= {(number, name) for name in (row.archive, row.rejected_archive) if name is not None}
                    if image_mode is not None:
                        report.image_modes[image_mode] += 1
                    statistics.add(row, result)
                rows_kept += len(records)
                if records:
                    table.write_batch(pa.RecordBatch.from_pylist(records, schema=SCHEMA))
                advance(rows_read, total, rows_read / max(time.monotonic() - started, 1e-9))
    for number, source_groups in enumerate(groups):
        if not source_groups.codes:
            place = _source_place(loaded, number)
            reason = first_reasons.get(number, "it has no row")
            raise DataError(f"{loaded.path}: {place}: no usable row is left: {reason}")
    names = Dataset.from_file(str(folder / ROWS)).select_columns("id")
    epoch_parts: list[np.ndarray] = []
    for spec, source, source_groups, first_row in zip(loaded.recipe.data, sources, groups, first_rows, strict=True):
        sample, seed = (None, 0) if isinstance(spec, ShapesData) else (spec.sample, spec.seed)
        positions = _select(source_groups, source.times(), sample, seed)
        if not len(positions):
            place = _source_place(loaded, len(epoch_parts))
            raise DataError(f"{loaded.path}: {place}: `subsets` and `sample` leave no row; give larger numbers.")
        report.sources.append(_summarise(names, source_groups, positions, first_row, source))
        epoch_parts.append(positions + first_row)
    epoch = np.concatenate(epoch_parts)
    np.save(folder / EPOCH, epoch)
    report.rows = len(epoch)
    statistics.fill(report)
    return report, archives


def _source_place(loaded: LoadedRecipe, number: int) -> str:
    """Name a source of a recipe for an error message."""
    spec = loaded.recipe.data[number]
    return f"data {number} ({'shapes' if isinstance(spec, ShapesData) else spec.path})"


def _expected_rows(loaded: LoadedRecipe) -> int | None:
    """Return how many rows the sources should hold, or None where the recipe does not say it of each."""
    total = 0
    for spec in loaded.recipe.data:
        if isinstance(spec, ShapesData):
            total += spec.rows
        elif spec.expect is not None:
            total += spec.expect.rows
        else:
            return None
    return total


def _skip(report: RowReport, problem: tuple[str, str], on_bad_row: OnBadRow) -> None:
    """Count a bad row as skipped, or raise its error where the recipe says so."""
    kind, reason = problem
    if on_bad_row == OnBadRow.STOP:
        hint = "fix the row, or set `on_bad_row: skip` in the recipe to skip such rows"
        raise DataError(f"{reason.rstrip('.')}; {hint}.")
    report.skipped_rows += 1
    report.problems[kind] += 1
    if len(report.skipped) < NAMED:
        report.skipped.append(reason)


def _read(folder: Path, sources: list[Source]) -> RowIndex:
    table = Dataset.from_file(str(folder / ROWS))
    names = table.select_columns("id")
    epoch = np.load(folder / EPOCH)
    if len(epoch) != len(table) or (epoch != np.arange(len(table))).any():
        table = table.select(epoch)
    report = json.loads((folder / REPORT).read_text())
    report |= {key: Counter(report[key]) for key in ("problems", "image_modes", "rewards")}
    return RowIndex(table, names, sources, RowReport(**report))


def _checked_chunks(source: Source, check: Check, workers: int) -> Iterator[list[CheckedRow]]:
    """Yield chunks of checked rows, in order; a source of many chunks is checked by several processes."""
    rows = (_locate(source, row, check.reads_rejected_images) for row in source.rows())
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    first = list(islice(chunks, 4))
    if len(first) < 4 or workers < 2:
        for chunk in chain(first, chunks):
            yield _check_chunk(source, check, chunk)
        return
    # A forked process starts at once and shares what is loaded; where fork is missing, each process loads it again.
    context = get_context("fork") if hasattr(os, "fork") else None
    with ProcessPoolExecutor(workers, context, _init_worker, (source, check)) as pool:
        waiting: deque[Any] = deque()
        for chunk in chain(first, chunks):
            waiting.append(pool.submit(_check_chunk_in_worker, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_worker: tuple[Source, Check]  # source and check of a process of the pool


def _init_worker(source: Source, check: Check) -> None:
    global _worker
    _worker = (source, check)


def _check_chunk_in_worker(chunk: list[CheckedRow]) -> list[CheckedRow]:
    return _check_chunk(*_worker, chunk)


def _locate(source: Source, row: Row | DataError, reads_rejected_images: bool) -> CheckedRow:
    """Locate the images of a row that could be parsed; a rejected image that the stage does not read is left out."""
    if isinstance(row, DataError):
        return CheckedRow(None, ("format", str(row)))
    try:
        located = row if row.image is None else source.locate(row)
        if row.rejected_image is None:
            return CheckedRow(located)
        if not reads_rejected_images:
            return CheckedRow(replace(located, rejected_image=None))
        rejected = source.locate(row.with_rejected_image())
        return CheckedRow(replace(located, rejected_archive=rejected.archive, rejected_span=rejected.span))
    except DataError as error:
        return CheckedRow(row, ("missing image", str(error)))


def _check_chunk(source: Source, check: Check, chunk: list[CheckedRow]) -> list[CheckedRow]:
    """Measure the images of a chunk's rows that have no problem yet, decoding those of files, and check the rows."""
    measured = [_measure(source, checked) for checked in chunk]
    usable = [(c.row, *sizes) for c, *sizes in measured if c.row is not None and c.problem is None]
    rows, sizes, rejected_sizes = zip(*usable, strict=True) if usable else ((), (), ())
    results = iter(check(rows, sizes, rejected_sizes))
    return [_with_result(c, next(results)) if c.row is not None and c.problem is None else c for c, *_ in measured]


def _measure(source: Source, checked: CheckedRow) -> tuple[CheckedRow, ImageSize | None, ImageSize | None]:
    """Add the mode of a row's image, or the problem that its images have; and return the sizes of both images."""
    row = checked.row
    if row is None or checked.problem is not None or row.image is None:
        return checked, None, None
    rejected_size = None
    try:
        size, mode = source.measure_image(row)
        if row.rejected_image is not None:
            rejected = row.with_rejected_image()
            rejected_size, _ = source.measure_image(rejected)
            is_decoded = mode is not None  # rendered images differ by construction
            if is_decoded and size == rejected_size and _pixels(source, row) == _pixels(source, rejected):
                reason = f"{row.id}: image and rejected image are the same; give one that the answer does not describe"
                return checked._replace(problem=("same images", reason)), None, None
    except DataError as error:
        return checked._replace(problem=("corrupt image", str(error))), None, None
    return checked._replace(image_mode=mode), size, rejected_size


def _pixels(source: Source, row: Row) -> bytes:
    return source.open_image(row).tobytes()


def _with_result(checked: CheckedRow, result: CheckResult) -> CheckedRow:
    """Add the result of the stage's check, and the row's name to its problem."""
    assert checked.row is not None
    if result.problem is None:
        return checked._replace(result=result)
    kind, reason = result.problem
    return checked._replace(problem=(kind, f"{checked.row.id}: {reason}"), result=result)


@dataclass
class _Groups:
    """The group of every row of a source, in 4 bytes a row."""

    names: list[str | None] = field(default_factory=list)
    codes: array[int] = field(default_factory=lambda: array("i"))

    def add(self, group: str | None) -> None:
        if group not in self.names:
            self.names.append(group)
        self.codes.append(self.names.index(group))


def _select(groups: _Groups, times: dict[str | None, float], sample: int | None, seed: int) -> np.ndarray:
    """Select the rows of a source that an epoch sees.

    Args:
        groups: Group of every row.
        times: How often the rows of each group are seen in an epoch, 1 by default.
        sample: Number of rows to draw, each group by its share; None for all rows.
        seed: Seed of the draw.

    Returns:
        Positions of the rows in the source, in file order: (rows,) int.
    """
    codes = np.frombuffer(groups.codes, np.int32)
    positions = {group: np.flatnonzero(codes == code) for code, group in enumerate(groups.names)}
    shares = {group: len(rows) * times.get(group, 1) for group, rows in positions.items()}
    total = sum(shares.values())
    if sample is not None and sample < total:
        shares = {group: sample * share / total for group, share in shares.items()}
    counts = {group: int(share) for group, share in shares.items()}
    # Rounding down leaves rows over; the groups with the largest remainders get one more each.
    left_over = round(sum(shares.values())) - sum(counts.values())
    for group in sorted(shares, key=lambda g: (counts[g] - shares[g], str(g)))[:left_over]:
        counts[group] += 1
    rng = random.Random(seed)
    selected = []
    for group, rows in positions.items():
        repeats, rest = divmod(counts[group], len(rows))
        selected += [rows] * repeats + [rows[rng.sample(range(len(rows)), rest)]]
    return np.sort(np.concatenate(selected), kind="stable")


def _summarise(
    names: Dataset, groups: _Groups, positions: np.ndarray, first_row: int, source: Source
) -> dict[str, Any]:
    """Count the rows of each group that an epoch sees, with hashes that identify the rows and their files."""
    ids_digest = hashlib.sha256()
    for start in range(0, len(positions), 4096):
        ids = names[(positions[start : start + 4096] + first_row).tolist()]["id"]
        ids_digest.update("".join(f"{i}\n" for i in ids).encode())
    counts = np.bincount(np.frombuffer(groups.codes, np.int32)[positions], minlength=len(groups.names))
    return {
        "rows": len(positions),
        "ids_sha256": ids_digest.hexdigest(),
        "groups": {name: int(n) for name, n in zip(groups.names, counts, strict=True) if name is not None},
        "files_sha256": files_sha256(source),
        "hub_commit": hub_commit(source.folder) if isinstance(source, FileSource) else None,
    }


def _to_record(row: Row, source: int, position: int) -> dict[str, Any]:
    """Convert a row to a record of SCHEMA."""
    record = {name: getattr(row, name) for name in SCHEMA.names if name not in ("source", "row")}
    texts = {"earlier": json.dumps(row.earlier), "boxes": json.dumps(row.boxes)}
    return {**record, **texts, "source": source, "row": position}


def _from_record(record: dict[str, Any]) -> Row:
    """Convert a record of SCHEMA back to a row, without its group."""
    values = {key: value for key, value in record.items() if key not in ("source", "row")}
    for key in ("span", "rejected_span"):
        values[key] = None if values[key] is None else tuple(values[key])
    values["earlier"] = tuple((role, text) for role, text in json.loads(values["earlier"]))
    values["boxes"] = tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in json.loads(values["boxes"]))
    return Row(**values)
