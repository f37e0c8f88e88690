"""The row index: every row read, checked and its image decoded once, then kept on disk in Arrow.

What is read a second time is the index: it is mapped into memory, so 3.2 million rows take no more of it than 3,000,
and a run goes on at an exact row. It is found by what it depends on: the recipe's data, the files, and the check.
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
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from pivot_hub.config.data_section import ShapesData
from pivot_hub.config.recipe import LoadedRecipe
from pivot_hub.data.report import Measured, RowCounter, RowReport
from pivot_hub.data.row import Row
from pivot_hub.data.source import Columns, FileSource, Source, example, files_sha256, sources_of
from pivot_hub.errors import DataError
from pivot_hub.files import whole_folder, write_json
from pivot_hub.provenance import hub_commit

CHUNK = 256  # rows that are checked together, by one process
Advance = Callable[[int, int | None, float], None]  # gets rows checked, of how many if that is known, and rows/s
LAYOUT = 2  # of the index's files
NAMED = 100  # bad rows that are named; all are counted
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.int16()),
        ("image", pa.string()),
        ("prompt", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("earlier", pa.string()),  # JSON
        ("archive", pa.string()),
        ("span", pa.list_(pa.int64())),
        ("block", pa.string()),
        ("row", pa.int64()),  # its place in the index
    ]
)


class Check(Protocol):
    """Measures rows for a stage."""

    def __call__(self, rows: Sequence[Row]) -> list[Measured]: ...

    def to_dict(self) -> dict[str, Any]:
        """All that its answers depend on besides the rows."""


@dataclass(frozen=True)
class RowIndex:
    """The rows of a stage.

    Args:
        table: one row of SCHEMA each, in the order and as often as an epoch sees them.
        names: every row's id, by its place in the index.
        sources: that the rows name by number.
        report: see there.
    """

    table: Dataset
    names: Dataset
    sources: list[Source]
    report: RowReport

    def rows(self) -> Iterator[Row]:
        """Every row, without its image."""
        for metadata in self.table:
            yield _row(metadata)

    def ids(self, places: Iterable[int]) -> list[str]:
        """Names of rows, from the column `row` of a batch."""
        return [self.names[int(place)]["id"] for place in places]

    def blocks(self) -> np.ndarray | None:
        """For each row a number of the block it lies in, or None where every row is read alone as cheaply."""
        known: dict[str | None, int] = {}
        numbers = np.empty(len(self.table), np.int64)
        done = 0
        for batch in self.table.select_columns("block").with_format("arrow").iter(1 << 16):
            codes = batch["block"].combine_chunks().dictionary_encode(null_encoding="encode")
            renamed = np.array([known.setdefault(name, len(known)) for name in codes.dictionary.to_pylist()])
            numbers[done : done + len(codes)] = renamed[codes.indices.to_numpy()]
            done += len(codes)
        if set(known) == {None}:
            return None
        alone = numbers == known.get(None, -1)
        numbers[alone] = len(known) + np.arange(int(alone.sum()))
        return numbers

    def as_dataset(self, columns: Columns, image_token: str) -> Dataset:
        """The rows in TRL's columns, and `row`, the place in the index; images are decoded as batches are read.

        Args:
            columns: see `source.example`.
            image_token: stands for the image in plain prompts.
        """

        def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            made = []
            for i, place in enumerate(batch["row"]):
                metadata = {key: values[i] for key, values in batch.items()}
                row = _row(metadata)
                images = [] if row.image is None else [self.sources[metadata["source"]].open_image(row)]
                made.append({**example(images, row, columns, image_token), "row": place})
            return {key: [e[key] for e in made] for key in made[0]}

        return self.table.with_transform(render)


def index_rows(
    loaded: LoadedRecipe,
    check: Check,
    folder: str | Path | None = None,
    advance: Advance = lambda done, total, rate: None,
    fresh: bool = False,
    workers: int | None = None,
) -> RowIndex:
    """Read and check every row before training, decoding each image once, or find it done before.

    Args:
        loaded: the recipe; its `on_bad_row` says whether a bad row stops or is skipped and counted.
        check: what is wrong with a row for this stage, and its tokens.
        folder: of all indices; below HF_HOME by default.
        advance: called as rows are checked.
        fresh: check again though it was done before.
        workers: processes that check; one a core by default.

    Raises:
        DataError: naming the file and row, when the recipe says stop, or when no row is left.
    """
    sources = sources_of(loaded)
    metadata = {
        "layout": LAYOUT,
        "data": [spec.model_dump(mode="json") for spec in loaded.recipe.data],
        "files": [source.to_dict() for source in sources],
        "check": check.to_dict(),
    }
    key = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:32]
    place = Path(folder or Path(HF_HOME) / "pivot_hub" / "rows") / key
    # Images are no part of the key: a row that was left out may have been mended since.
    doubtful = loaded.recipe.on_bad_row == "stop" and _skipped(place)
    if fresh or doubtful or not (place / "report.json").is_file():
        with whole_folder(place) as made:
            report = _build(made, loaded, sources, check, advance, os.cpu_count() or 1 if workers is None else workers)
            write_json(made / "report.json", report.to_dict())
    return _read(place, sources)


def _skipped(place: Path) -> bool:
    """Whether the index that lies there, if any, left rows out."""
    file = place / "report.json"
    return file.is_file() and json.loads(file.read_text())["skipped_rows"] > 0


def _build(
    folder: Path,
    loaded: LoadedRecipe,
    sources: list[Source],
    check: Check,
    advance: Advance,
    workers: int,
) -> RowReport:
    report, tally, specs = RowReport(), RowCounter(), loaded.recipe.data
    stop = loaded.recipe.on_bad_row == "stop"
    read, kept, began = 0, 0, time.monotonic()
    expected = [spec.rows if isinstance(spec, ShapesData) else spec.expect and spec.expect.rows for spec in specs]
    total = sum(count or 0 for count in expected) if all(expected) else None
    groups = [_Groups() for _ in sources]
    firsts: list[int] = []
    with (
        pa.OSFile(str(folder / "rows.arrow"), "wb") as file,
        pa.ipc.new_stream(file, SCHEMA) as table,
    ):
        for number, source in enumerate(sources):
            firsts.append(kept)
            for chunk in _examined(source, check, workers):
                good: list[dict[str, Any]] = []
                for row, problem, mode, measured in chunk:
                    read += 1
                    if problem is not None:
                        kind, reason = problem
                        if stop:
                            hint = "mend the row, or set `on_bad_row: skip` in the recipe to leave such rows out"
                            raise DataError(f"{reason.rstrip('.')}; {hint}.")
                        report.skipped_rows += 1
                        report.problems[kind] += 1
                        report.skipped += [reason][: NAMED - len(report.skipped)]
                        continue
                    assert row is not None
                    good.append(_facts(row, number, kept + len(good)))
                    groups[number].add(row.group)
                    report.image_modes.update([] if mode is None else [mode])
                    tally.add(row, measured)
                kept += len(good)
                if good:
                    table.write_batch(pa.RecordBatch.from_pylist(good, schema=SCHEMA))
                advance(read, total, read / max(time.monotonic() - began, 1e-9))
    if not kept:
        reason = f": {report.skipped[0]}" if report.skipped else ""
        raise DataError(f"{loaded.path}: no usable row is left{reason}")
    names = Dataset.from_file(str(folder / "rows.arrow")).select_columns("id")
    taken = []
    for number, source in enumerate(sources):
        spec = specs[number]
        sample, seed = (None, 0) if isinstance(spec, ShapesData) else (spec.sample, spec.seed)
        some = _select(groups[number], source.times(), sample, seed)
        report.sources.append(_listing(names, groups[number], some, firsts[number], source))
        taken.append(some + firsts[number])
    epoch = np.concatenate(taken)
    np.save(folder / "epoch.npy", epoch)
    report.rows = len(epoch)
    tally.fill(report)
    return report


def _read(folder: Path, sources: list[Source]) -> RowIndex:
    table = Dataset.from_file(str(folder / "rows.arrow"))
    names = table.select_columns("id")
    epoch = np.load(folder / "epoch.npy")
    if len(epoch) != len(table) or (epoch != np.arange(len(table))).any():
        table = table.select(epoch)
    metadata = json.loads((folder / "report.json").read_text())
    metadata |= {key: Counter(metadata[key]) for key in ("problems", "image_modes")}
    return RowIndex(table, names, sources, RowReport(**metadata))


Examined = tuple[Row | None, tuple[str, str] | None, str | None, Measured]


def _examined(source: Source, check: Check, workers: int) -> Iterator[list[Examined]]:
    """Chunks of rows with what is wrong with each, in order; many chunks are checked by several processes."""
    located = (_located(source, item) for item in source.rows())
    chunks = iter(lambda: list(islice(located, CHUNK)), [])
    first = list(islice(chunks, 4))
    if len(first) < 4 or workers < 2:
        for chunk in chain(first, chunks):
            yield _examine(source, check, chunk)
        return
    # A fork starts at once and shares what is loaded; where there is none, each process loads it anew.
    context = get_context("fork") if hasattr(os, "fork") else None
    with ProcessPoolExecutor(workers, context, _set_examiner, (source, check)) as pool:
        waiting: deque[Any] = deque()
        for chunk in chain(first, chunks):
            waiting.append(pool.submit(_examine_here, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_examiner: tuple[Source, Check]  # of a process of the pool


def _set_examiner(source: Source, check: Check) -> None:
    global _examiner
    _examiner = (source, check)


def _examine_here(chunk: list[Examined]) -> list[Examined]:
    return _examine(*_examiner, chunk)


def _located(source: Source, item: Row | DataError) -> Examined:
    if isinstance(item, DataError):
        return None, ("format", str(item)), None, Measured()
    try:
        return (item if item.image is None else source.locate(item)), None, None, Measured()
    except DataError as error:
        return item, ("missing image", str(error)), None, Measured()


def _examine(source: Source, check: Check, chunk: list[Examined]) -> list[Examined]:
    """Check a chunk's rows, and decode their images."""
    fit = [row for row, problem, _, _ in chunk if row is not None and problem is None]
    measures = iter(check(fit))
    made: list[Examined] = []
    for row, problem, mode, measured in chunk:
        if row is not None and problem is None:
            measured = next(measures)
            problem = measured.problem and (measured.problem[0], f"{row.id}: {measured.problem[1]}")
            if problem is None and row.image is not None and source.checks_images:
                try:
                    mode = source.open_image(row).info["mode"]
                except DataError as error:
                    problem = ("corrupt image", str(error))
        made.append((row, problem, mode, measured))
    return made


@dataclass
class _Groups:
    """The group of every row of a source: 4 bytes a row."""

    names: list[str | None] = field(default_factory=list)
    codes: array[int] = field(default_factory=lambda: array("i"))

    def add(self, group: str | None) -> None:
        if group not in self.names:
            self.names.append(group)
        self.codes.append(self.names.index(group))


def _select(groups: _Groups, times: dict[str | None, float], sample: int | None, seed: int) -> np.ndarray:
    """Places of the rows that an epoch sees, in file order: each group as often as said, of a sample by its share."""
    codes = np.frombuffer(groups.codes, np.int32)
    places = {group: np.flatnonzero(codes == code) for code, group in enumerate(groups.names)}
    exact = {group: len(some) * times.get(group, 1) for group, some in places.items()}
    total = sum(exact.values())
    if sample is not None and sample < total:
        exact = {group: sample * share / total for group, share in exact.items()}
    wanted = {group: int(share) for group, share in exact.items()}
    # Largest remainders take what rounding down left over.
    left = round(sum(exact.values())) - sum(wanted.values())
    for group in sorted(exact, key=lambda g: (wanted[g] - exact[g], str(g)))[:left]:
        wanted[group] += 1
    rng = random.Random(seed)
    taken = []
    for group, some in places.items():
        again, rest = divmod(wanted[group], len(some))
        taken += [some] * again + [some[rng.sample(range(len(some)), rest)]]
    return np.sort(np.concatenate(taken), kind="stable")


def _listing(names: Dataset, groups: _Groups, some: np.ndarray, first: int, source: Source) -> dict[str, Any]:
    """How many rows of each group an epoch sees, and hashes that tell which rows of which files."""
    made = hashlib.sha256()
    for start in range(0, len(some), 4096):
        ids = names[(some[start : start + 4096] + first).tolist()]["id"]
        made.update("".join(f"{i}\n" for i in ids).encode())
    counts = np.bincount(np.frombuffer(groups.codes, np.int32)[some], minlength=len(groups.names))
    return {
        "rows": len(some),
        "ids_sha256": made.hexdigest(),
        "groups": {name: int(n) for name, n in zip(groups.names, counts, strict=True) if name is not None},
        "files_sha256": files_sha256(source),
        "hub_commit": hub_commit(source.folder) if isinstance(source, FileSource) else None,
    }


def _facts(row: Row, source: int, place: int) -> dict[str, Any]:
    metadata = {
        name: getattr(row, name) for name in ("id", "image", "prompt", "chosen", "rejected", "archive", "block")
    }
    span = None if row.span is None else list(row.span)
    return {**metadata, "source": source, "earlier": json.dumps(row.earlier), "span": span, "row": place}


def _row(metadata: dict[str, Any]) -> Row:
    span = metadata["span"]
    return Row(
        metadata["id"],
        metadata["image"],
        metadata["prompt"],
        metadata["chosen"],
        metadata["rejected"],
        tuple((role, text) for role, text in json.loads(metadata["earlier"])),
        archive=metadata["archive"],
        span=None if span is None else (span[0], span[1], span[2]),
        block=metadata["block"],
    )
