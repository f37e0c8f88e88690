"""The row that every annotation format is parsed to, and the reading of annotation files one record at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.errors import DataError, shown, shown_text

IMAGE_TAG = "<image>"
SUFFIXES = (".json", ".jsonl", ".parquet")  # of annotation files
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the upright image
Span = tuple[
    int, int, int, int
]  # a file in an archive: offset, stored bytes, compression method of zip, bytes unpacked
LONGEST_NAME, LONGEST_PATH = 255, 4096  # bytes of a file name and of a path; what is longer names no file


class ImageSize(NamedTuple):
    """Size of an upright image, in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Row:
    """One training row.

    Args:
        id: Name of the row: its file and number, for example `train.jsonl:12`.
        image: Name of the image in its store, `split/index` of a scene, or None for text alone.
        prompt: Last turn of the user; the image replaces IMAGE_TAG, or comes first where there is no tag.
        chosen: Answer; of a row for rewards, the solution that they compare answers with.
        rejected: Worse answer of a preference pair.
        earlier: Turns before the prompt, as (role, text).
        boxes: Boxes that the answer gives.
        kind: Kind of the question, where it is known: a `QuestionKind`.
        group: Subset or meta-file source of the row; a sample keeps the shares of the groups.
        archive: Archive that holds the image, from the folder of the images; `.` where the store is one archive.
        span: Position of the image in the archive.
        block: Name of the unit on disk that the row is read with; None for a row that is cheap to read alone.
        rejected_image: Name of an image that the chosen answer does not describe, for losses that compare two images.
        rejected_archive: Archive that holds the rejected image.
        rejected_span: Position of the rejected image in its archive.
    """

    id: str
    image: str | None
    prompt: str
    chosen: str
    rejected: str | None = None
    earlier: tuple[tuple[str, str], ...] = ()
    boxes: tuple[Box, ...] = ()
    kind: str | None = None
    group: str | None = None
    archive: str | None = None
    span: Span | None = None
    block: str | None = None
    rejected_image: str | None = None
    rejected_archive: str | None = None
    rejected_span: Span | None = None

    def with_rejected_image(self) -> Row:
        """Return the row with its rejected image in the place of its image."""
        return replace(self, image=self.rejected_image, archive=self.rejected_archive, span=self.rejected_span)


def read_records(file: Path, name: str | None = None) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Yield the objects of a JSON list, a JSONL or a Parquet file, each named `file:row`, rows counted from 1.

    Memory does not grow with the file. Images inside a Parquet file are not read: the record has a reference
    `file#row` in their place, for `image_store.ParquetStore`. Bytes of a JSON file that are not UTF-8 become lone
    surrogates, which `bad_character` finds.

    Args:
        file: Annotation file: .json, .jsonl or .parquet.
        name: Name of the file in row names and references; its own name by default.

    Raises:
        DataError: The file as a whole does not have the format that its suffix says.
    """
    name = name or file.name
    if file.suffix == ".parquet":
        yield from _parquet_records(file, name)
        return
    with open_text(file) as text:
        if file.suffix == ".jsonl":
            for i, line in enumerate(text, 1):
                if line.strip():
                    yield f"{name}:{i}", _parse_line(line, f"{name}:{i}")
            return
        for i, record in enumerate(_list_items(text, file), 1):
            yield f"{name}:{i}", _require_object(record, f"{name}:{i}")


def open_text(file: Path) -> TextIO:
    """Open a text file of UTF-8, with or without a byte order mark; other bytes become lone surrogates.

    Raises:
        DataError: The file is UTF-16 or UTF-32.
    """
    with file.open("rb") as start:
        encoding = json.detect_encoding(start.read(4))
    if not encoding.startswith("utf-8"):
        name = encoding.upper()
        raise DataError(f"{file}: is {name}, not UTF-8; convert it, for example by `iconv -f {name} -t UTF-8`.")
    return file.open(encoding="utf-8-sig", errors="surrogateescape")


def bad_character(*texts: str) -> str | None:
    """Return the first character that no text may hold, a lone surrogate, or None where there is none."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        return str(error.object[error.start])
    return None


def image_columns(schema: pa.Schema) -> list[str]:
    """List the columns that hold images as the datasets library writes them: `bytes` and `path`, or lists of these."""
    columns = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes", "path"}:
            columns.append(field.name)
    return columns


def image_name(record: dict[str, Any], name: str, *keys: str) -> str | DataError | None:
    """Return the image that a record names, or None for text alone.

    Args:
        record: Record of an annotation file.
        name: Name of the row, for the error message.
        keys: Keys that may hold the image; the first that the record has counts.

    Returns:
        The name of the image in its store; None for text alone; an error where it is not one image.
    """
    key = next((k for k in keys or ("image",) if record.get(k) not in (None, [])), None)
    if key is None:
        return None
    image = record[key]
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image is None:
        return None
    if not isinstance(image, str):
        return DataError(f"{name}: `{key}` names one image file, not {shown(image)}")
    if _is_content(image):
        return DataError(
            f"{name}: `{key}` holds an image ({len(image)} characters, {shown(image)}), not the name of a file; write "
            "the image to a file, or put it into a Parquet column of `bytes` and `path`"
        )
    path, drive = Path(image), PureWindowsPath(image).drive
    if path.is_absolute() or ".." in path.parts or drive or "\0" in image:
        return DataError(f"{name}: image {shown(image)} leaves the images folder")
    return image


def _is_content(image: str) -> bool:
    """Return whether a text is an image itself, as a `data:` URL or in base64, and too long for a file's name."""
    longest = max((len(part.encode("utf-8", "surrogatepass")) for part in image.split("/")), default=0)
    return image.startswith("data:") or len(image) > LONGEST_PATH or longest > LONGEST_NAME


def _parse_line(line: str, name: str) -> dict[str, Any] | DataError:
    try:
        return _require_object(json.loads(line), name)
    except (ValueError, RecursionError) as error:  # a ValueError also of a number of 5,000 digits
        return DataError(f"{name}: not JSON ({shown_text(str(error))})")


def _require_object(record: Any, name: str) -> dict[str, Any] | DataError:
    return record if isinstance(record, dict) else DataError(f"{name}: a row is an object, not {shown(record)}")


def _list_items(text: TextIO, file: Path, chunk: int = 1 << 20) -> Iterator[Any]:
    """Yield the items of a JSON list without holding the list: LLaVA's 665K rows are a gigabyte of JSON."""
    decoder = json.JSONDecoder()
    buffer, at, ended, opened, row = text.read(chunk), 0, False, False, 1
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
            if end == len(buffer) and not ended:  # a number may continue in the next chunk
                raise json.JSONDecodeError("cut", buffer, at)
        except json.JSONDecodeError as error:
            if ended:
                raise DataError(f"{file}: not JSON ({error}); give a .json list or a .jsonl file.") from error
            more = text.read(max(chunk, len(buffer) - at))
            buffer, at, ended = buffer[at:] + more, 0, not more
            continue
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: row {row} is not JSON that can be read ({error}); remove the row.") from error
        yield item
        at, row = end, row + 1


def _parquet_records(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    try:
        with pq.ParquetFile(file) as table:
            images = image_columns(table.schema_arrow)
            # Only the path of an image is read: it shows whether there is an image, and no pixels are loaded.
            leaves = [path for column in images for path in _leaves(table, column) if path.endswith(".path")]
            columns = [f.name for f in table.schema_arrow if f.name not in images] + leaves
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in _to_records(batch):
                    if isinstance(record, dict):
                        for column in images:
                            record[column] = _reference(record[column], image_reference(name, row, column, images))
                    row += 1
                    yield f"{name}:{row}", DataError(f"{name}:{row}: {record}") if isinstance(record, str) else record
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole Parquet file ({shown_text(str(error))}); download it again.") from error


def image_reference(name: str, row: int, column: str, columns: list[str]) -> str:
    """Return the reference of an image in a Parquet file; `split_reference` reads it.

    Args:
        name: Name of the file.
        row: Number of the row, counted from 0.
        column: Column of the image.
        columns: All columns of images; the first needs no name.
    """
    return f"{name}#{row}" if column == columns[0] else f"{name}#{row}@{column}"


def split_reference(reference: str) -> tuple[str, int, str | None]:
    """Split the reference of an image in a Parquet file into file, row, and column, which is None for the first."""
    file, _, place = reference.rpartition("#")
    row, _, column = place.partition("@")
    return file, int(row), column or None


def _to_records(batch: pa.RecordBatch) -> list[dict[str, Any] | str]:
    """Convert a batch to one dictionary a row, or to the reason where a row has text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"not UTF-8 ({error.reason}, byte {error.object[error.start]:#x})"]
        return [record for i in range(batch.num_rows) for record in _to_records(batch.slice(i, 1))]


def _leaves(table: pq.ParquetFile, column: str) -> list[str]:
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    return [p for p in paths if p.split(".")[0] == column]


def _reference(value: Any, reference: str) -> str | list[str] | None:
    if isinstance(value, list):
        return [f"{reference}/{i}" for i in range(len(value))] if len(value) != 1 else reference
    return None if value is None else reference
