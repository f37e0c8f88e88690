"""A row: what every annotation format becomes, and the reading of annotation files, a row at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.errors import DataError

IMAGE_TAG = "<image>"
SUFFIXES = (".json", ".jsonl", ".parquet")  # of annotation files
Span = tuple[int, int, int]  # where an archive holds a file: offset of its data, bytes there, zip's method


@dataclass(frozen=True)
class Row:
    """One training row.

    Args:
        id: names the row in its file, as in `train.jsonl:12`.
        image: name of the image in its store, `split/index` of a scene, or None for text alone.
        prompt: what the user says last; an image goes where IMAGE_TAG stands, in front if it stands nowhere.
        chosen: the answer.
        rejected: the worse answer of a preference pair.
        earlier: turns before the prompt, as (role, text).
        group: the source within the file, where it has several; a sample keeps their shares.
        archive: the archive that holds the image, from the folder of the images; `.` where the store is one archive.
        span: where in it.
        block: rows of one block lie together on disk; None for a row that is read alone as cheaply.
    """

    id: str
    image: str | None
    prompt: str
    chosen: str
    rejected: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    group: str | None = None
    archive: str | None = None
    span: Span | None = None
    block: str | None = None


def read_records(file: Path, name: str | None = None) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yield the objects of a JSON list, a JSONL or a Parquet file, each named `file:row`, rows counted from 1.

    Memory does not grow with the file. Images that lie inside a Parquet file are not read: the record has a reference
    `file#row` in their place, for `store.ParquetStore`.

    Args:
        file: .json, .jsonl or .parquet.
        name: of the file in row names and references; its own name by default.

    Raises:
        DataError: the file as a whole is not what its suffix says.
    """
    name = name or file.name
    if file.suffix == ".parquet":
        yield from _parquet_records(file, name)
        return
    with file.open(encoding="utf-8") as text:
        if file.suffix == ".jsonl":
            for i, line in enumerate(text, 1):
                if line.strip():
                    yield f"{name}:{i}", _parsed(line, f"{name}:{i}")
            return
        for i, record in enumerate(_list_items(text, file), 1):
            yield f"{name}:{i}", _as_object(record, f"{name}:{i}")


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that hold images as the datasets library writes them: `bytes` and `path`, or lists of these."""
    found = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes", "path"}:
            found.append(field.name)
    return found


def image_name(record: dict[str, Any], name: str, *keys: str) -> str | DataError | None:
    """The image of a record, under the first of the keys that it has: a name in its store, or None for text alone."""
    image = next((record[k] for k in keys or ("image",) if record.get(k) is not None), None)
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None or image == []:
        return None
    if not isinstance(image, str):
        return DataError(f"{name}: `image` names one image file, not {image!r}")
    if Path(image).is_absolute() or ".." in Path(image).parts:
        return DataError(f"{name}: image {image!r} leaves the images folder")
    return image


def _parsed(line: str, name: str) -> dict[str, Any] | DataError:
    try:
        return _as_object(json.loads(line), name)
    except json.JSONDecodeError as error:
        return DataError(f"{name}: not JSON ({error})")


def _as_object(record: Any, name: str) -> dict[str, Any] | DataError:
    return record if isinstance(record, dict) else DataError(f"{name}: a row is an object, not {record!r}")


def _list_items(text: TextIO, file: Path, chunk: int = 1 << 20) -> Iterator[Any]:
    """Items of a JSON list, without holding the list: LLaVA's 665K rows are a gigabyte of JSON."""
    decoder = json.JSONDecoder()
    buffer, at, ended, opened = text.read(chunk), 0, False, False
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n," and (opened or buffer[at] != ","):
            at += 1
        if at < len(buffer) and not opened:
            if buffer[at] != "[":
                raise DataError(f"{file}: a list of rows is expected; give a .json list or a .jsonl file.")
            opened, at = True, at + 1
            continue
        if at < len(buffer) and buffer[at] == "]":
            if (buffer[at + 1 :] + text.read()).strip():
                raise DataError(f"{file}: not JSON (something follows the list); give a .json list or a .jsonl file.")
            return
        try:
            item, end = decoder.raw_decode(buffer, at)
            if end == len(buffer) and not ended:  # a number may go on in the next chunk
                raise json.JSONDecodeError("cut", buffer, at)
        except json.JSONDecodeError as error:
            if ended:
                raise DataError(f"{file}: not JSON ({error}); give a .json list or a .jsonl file.") from error
            more = text.read(max(chunk, len(buffer) - at))
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        yield item
        at = end


def _parquet_records(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: not a Parquet file ({error}); download it again.") from error
    with table:
        images = image_columns(table.schema_arrow)
        # Of an image its path alone is read: that tells whether there is one, and costs no pixels.
        leaves = [p for c in images for p in _leaves(table, c) if p.endswith(".path")]
        columns = [f.name for f in table.schema_arrow if f.name not in images] + leaves
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                for column in images:
                    record[column] = _reference(record[column], f"{name}#{row}")
                row += 1
                yield f"{name}:{row}", record


def _leaves(table: pq.ParquetFile, column: str) -> list[str]:
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    return [p for p in paths if p.split(".")[0] == column]


def _reference(value: Any, reference: str) -> str | list[str] | None:
    if isinstance(value, list):
        return [f"{reference}/{i}" for i in range(len(value))] if len(value) != 1 else reference
    return None if value is None else reference
