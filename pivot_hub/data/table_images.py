"""Images in tables, one at a time: Parquet files, and data sets of the Hub and of `save_to_disk`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pivot_hub.data import image_blocks
from pivot_hub.data.image import MACHINE_ERRORS
from pivot_hub.data.image_blocks import Block, ImageSource, SourceImage, SourceOptions
from pivot_hub.data.image_store import open_cell
from pivot_hub.data.row import image_columns
from pivot_hub.data.stored_file import StoredFile, join_url
from pivot_hub.data.tables import image_columns as table_image_columns
from pivot_hub.data.tables import load_tables
from pivot_hub.errors import DataError, shown_text

ROWS = 32  # rows of a table that are read together
ID_COLUMNS = ("id", "key", "__key__", "image_id", "file", "file_name")
PATH_COLUMNS = ("image", "path", "image_path", "file", "file_name")


def row_groups(file: StoredFile, options: SourceOptions) -> ImageSource:
    """Open one Parquet file, whose blocks are runs of row groups."""
    with _parquet(file) as table:
        sizes = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    runs: list[list[int]] = [[]]
    for i in range(len(sizes)):
        if sum(sizes[j] for j in runs[-1]) >= image_blocks.BLOCK:
            runs.append([])
        runs[-1].append(i)

    def block(run: list[int]) -> Block:
        first = run[0] if run else 0
        return Block(f"{file.name}#{first}", lambda: parquet_images(file, run, options), file.stamp)

    return ImageSource(file.name, lambda: map(block, runs), sum(sizes))


@contextmanager
def _parquet(file: StoredFile) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; errors of its content become a DataError."""
    try:
        with file.open() as opened:
            yield pq.ParquetFile(opened)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        raise DataError(
            f"{file.url}: not a whole Parquet file ({shown_text(str(error))}); download it again."
        ) from error


def parquet_images(file: StoredFile, groups: list[int] | None, options: SourceOptions) -> Iterator[SourceImage]:
    """Yield the images of row groups, or of all; an image that is a path is read below the file's folder."""
    with _parquet(file) as table:
        schema = table.schema_arrow
        image, id_column = _columns(file.url, schema.names, _stored_columns(schema), options)
        groups = list(range(table.num_row_groups)) if groups is None else groups
        row = sum(table.metadata.row_group(i).num_rows for i in range(groups[0])) if groups else 0
        folder = file.url.rpartition("/")[0]
        columns = [image] if id_column is None else list({image, id_column})
        for rows in table.iter_batches(ROWS, row_groups=groups, columns=columns):
            for record in rows.to_pylist():
                own_id = None if id_column is None else record[id_column]
                image_id = f"{file.name}#{row}" if own_id is None else str(own_id)
                yield _cell_image(image_id, record[image], folder, not file.local)
                row += 1


def _stored_columns(schema: pa.Schema) -> list[str]:
    """List the columns that hold images, and those of strings that are named like paths."""
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    text = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    return [*image_columns(schema), *binary, *(name for name in PATH_COLUMNS if name in text)]


def _columns(owner: str, names: Sequence[str], images: Sequence[str], options: SourceOptions) -> tuple[str, str | None]:
    """Return the column of the images, and that of the ids or None.

    Raises:
        DataError: There is no such column.
    """
    for asked in (options.image_column, options.id_column):
        if asked is not None and asked not in names:
            raise DataError(f"{owner}: there is no column {asked!r} among {', '.join(names)}; give one of these.")
    image = options.image_column or next(iter(images), None)
    if image is None:
        raise DataError(f"{owner}: no column of images among {', '.join(names)}; name it with --image-column.")
    return image, options.id_column or next((name for name in ID_COLUMNS if name in names), None)


def _cell_image(image_id: str, cell: Any, folder: str, remote: bool) -> SourceImage:
    """Return the image of a cell: bytes, the path of a file, or both as the datasets library writes them."""
    if isinstance(cell, bytes):
        return SourceImage(image_id, content=cell)
    if isinstance(cell, str):
        cell = {"bytes": None, "path": cell}
    try:
        if remote and cell is not None and cell["bytes"] is None and cell["path"] is not None:
            return SourceImage(image_id, join_url(folder, cell["path"]))
        file = open_cell(cell, Path(folder), f"{image_id}: its image")
    except DataError as error:
        return SourceImage(image_id, problem=str(error))
    return SourceImage(image_id, str(file)) if isinstance(file, Path) else SourceImage(image_id, content=file.read())


def tables(data: str, name: str, options: SourceOptions) -> ImageSource:
    """Open a data set of the datasets library: of the Hub, row by row, or of `save_to_disk`."""
    splits = load_tables(data, options.revision, streaming=True)
    if options.split is not None and options.split not in splits:
        raise DataError(f"{data}: there is no split {options.split!r}, only {', '.join(splits)}; give one of these.")
    chosen = [options.split] if options.split else list(splits)
    folder = Path(data) if Path(data).is_dir() else None
    commit = None if folder else _commit(data, options.revision)
    streams = {split: _stream(splits[split]) for split in chosen}

    def block(split: str, number: int) -> Block:
        stream = streams[split]
        key = commit if folder is None else splits[split]._fingerprint
        return Block(
            f"{split}/{number:05}",
            lambda: _stream_images(data, split, number, stream, folder, options),
            None if key is None else lambda: str(key),
        )

    return ImageSource(name, lambda: (block(s, i) for s in chosen for i in range(streams[s].num_shards)))


def _stream(table: Any) -> Any:
    """Return a table as a stream of shards; one on this machine is cut into about `image_blocks.BLOCK` rows each."""
    if hasattr(table, "to_iterable_dataset"):
        return table.to_iterable_dataset(num_shards=max(1, len(table) // image_blocks.BLOCK))
    return table


def _stream_images(
    data: str, split: str, number: int, stream: Any, folder: Path | None, options: SourceOptions
) -> Iterator[SourceImage]:
    names = list(stream.features)
    image, id_column = _columns(f"{data}, {split}", names, table_image_columns(stream), options)
    shard = stream.select_columns([image] if id_column is None else list({image, id_column}))
    shard = shard.shard(num_shards=stream.num_shards, index=number)
    try:
        for row, record in enumerate(shard):
            own_id = None if id_column is None else record[id_column]
            image_id = f"{split}/{number:05}#{row}" if own_id is None else str(own_id)
            try:
                file = open_cell(record[image], folder, f"{image_id}: its image")
            except DataError as error:
                yield SourceImage(image_id, problem=str(error))
                continue
            if isinstance(file, Path):
                yield SourceImage(image_id, str(file))
            else:
                yield SourceImage(image_id, content=file.read())
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        reason = shown_text((str(error).strip().splitlines() or [type(error).__name__])[0], 160)
        raise DataError(f"{data}, {split}: shard {number} cannot be read from here on ({reason}).") from error


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a Hub data set, or None where the Hub cannot be asked."""
    try:
        return HfApi().dataset_info(name, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return None
