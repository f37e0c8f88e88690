"""Decode what a file holds in a form that a plain search does not see: compressed, packed or encoded text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

# A file of an encoder repository unpacks to far less. A larger one is reported, because it was not scanned.
UNPACKED_BYTES = 2 << 30
DEPTH = 4  # archives within archives
# Printable characters, each followed or preceded by the zero bytes of UTF-16 or UTF-32.
WIDE_TEXT = {
    "UTF-16 text": re.compile(rb"(?:[\t\n\r\x20-\x7e]\0){6,}|(?:\0[\t\n\r\x20-\x7e]){6,}"),
    "UTF-32 text": re.compile(rb"(?:[\t\n\r\x20-\x7e]\0\0\0){6,}|(?:\0\0\0[\t\n\r\x20-\x7e]){6,}"),
}
ESCAPE = re.compile(rb"\\u00([0-7][0-9A-Fa-f])|\\(/)")
Part = tuple[str, bytes]  # the part's name in messages, and its content


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes: ...


class NotScannable(Exception):
    """A part of a file cannot be decoded, so that it cannot be scanned; the message says why."""


class Budget:
    """Bytes that the parts of one file may unpack to, all together."""

    def __init__(self, size: int = UNPACKED_BYTES) -> None:
        self.size = self.left = size

    def read(self, file: Readable) -> bytes:
        """Read a decompressed stream to its end.

        Raises:
            NotScannable: The file unpacks to more than the budget.
        """
        content: bytes = file.read(self.left + 1)
        if len(content) > self.left:
            raise NotScannable(f"unpacks to more than {self.size >> 20} MB")
        self.left -= len(content)
        return content


def decoded_parts(content: Any, budget: Budget, depth: int = 0) -> Iterator[Part]:
    """Decode the parts of a file, and the parts of these.

    The kind of a file is told by its first bytes, as by the programs that open it, and not by its name.

    Args:
        content: Content of the file, as bytes or as a memory map.
        budget: Bytes that may still be unpacked.
        depth: Number of archives around the content.

    Raises:
        NotScannable: A part is corrupt, encrypted, or unpacks to more than the budget.
    """
    yield from _wide_text(content)
    yield from _unescaped_text(content)
    for magic, decode in DECODERS:
        if content[: len(magic)] != magic:
            continue
        if depth == DEPTH:
            raise NotScannable(f"holds archives {DEPTH} deep")
        try:
            for name, part in decode(content, budget):
                yield name, part
                for inner, inner_part in decoded_parts(part, budget, depth + 1):
                    yield f"{name}, {inner}", inner_part
        except NotScannable:
            raise
        except Exception as error:  # any of six decoders, on content that may be damaged in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise NotScannable(f"cannot be decoded ({reason})") from error


def _wide_text(content: Any) -> Iterator[Part]:
    for name, pattern in WIDE_TEXT.items():
        if text := b"\n".join(run.group().replace(b"\0", b"") for run in pattern.finditer(content)):
            yield name, text


def _unescaped_text(content: Any) -> Iterator[Part]:
    r"""Text whose characters are written as in JSON: `\/`, or `\u0068`."""
    if b"\0" in content[:8192] or ESCAPE.search(content) is None:
        return
    yield "escaped text", ESCAPE.sub(lambda m: m.group(2) or bytes([int(m.group(1), 16)]), content[:])


def _compressed(open_stream: Callable[[Any], Any]) -> Callable[[Any, Budget], Iterator[Part]]:
    def decode(content: Any, budget: Budget) -> Iterator[Part]:
        yield "unpacked", budget.read(open_stream(io.BytesIO(content)))

    return decode


def _arrow_stream(codec: str) -> Callable[[Any], Any]:
    def open_stream(file: Any) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, "r"), codec)

    return open_stream


def _zip_members(content: Any, budget: Budget) -> Iterator[Part]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        yield "comment", archive.comment
        for member in archive.infolist():
            with archive.open(member) as file:
                yield f"member {member.filename}", member.filename.encode() + b"\n" + budget.read(file)


def _png_texts(content: Any, budget: Budget) -> Iterator[Part]:
    """The compressed texts and profiles of a PNG; its other texts are plain."""
    at = 8
    while at + 8 <= len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), bytes(content[at + 4 : at + 8])
        chunk = content[at + 8 : at + 8 + length]
        if kind in (b"zTXt", b"iCCP"):  # keyword, 0, method, deflated text
            yield "compressed text", budget.read(_Inflated(chunk.partition(b"\0")[2][1:]))
        elif kind == b"iTXt":  # keyword, 0, compressed or not, method, language, 0, translated keyword, 0, text
            rest = chunk.partition(b"\0")[2]
            if rest[:1] == b"\1":
                yield "compressed text", budget.read(_Inflated(rest[2:].split(b"\0", 2)[2]))
        at += 12 + length


class _Inflated:
    """A deflated text that is inflated no further than it is read."""

    def __init__(self, deflated: bytes) -> None:
        self.deflated = deflated

    def read(self, size: int) -> bytes:
        return zlib.decompressobj().decompress(self.deflated, size)


def _parquet_values(content: Any, budget: Budget) -> Iterator[Part]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(content[:])))
    yield from _table_values(file.schema_arrow, file.iter_batches(batch_size=256), budget)


def _arrow_values(content: Any, budget: Budget) -> Iterator[Part]:
    import pyarrow as pa

    file = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content[:])))
    batches = (file.get_batch(number) for number in range(file.num_record_batches))
    yield from _table_values(file.schema, batches, budget)


def _table_values(schema: Any, batches: Iterable[Any], budget: Budget) -> Iterator[Part]:
    """The texts of a table, joined, and each value of bytes for itself."""
    metadata = [*(schema.metadata or {}).items(), *((f.name.encode(), b"") for f in schema)]
    yield "metadata", b"\n".join(b"\n".join(pair) for pair in metadata)
    for batch in batches:
        texts: list[bytes] = []
        for value in _leaves(batch.to_pylist()):
            part = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
            if len(part) > budget.left:
                raise NotScannable(f"unpacks to more than {budget.size >> 20} MB")
            budget.left -= len(part)
            if isinstance(value, bytes):
                yield "a value", part
            else:
                texts.append(part)
        yield "values", b"\n".join(texts)


def _leaves(value: Any) -> Iterator[str | bytes]:
    """Find every text and every value of bytes in nested lists and mappings."""
    if isinstance(value, str | bytes):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)


DECODERS: list[tuple[bytes, Callable[[Any, Budget], Iterator[Part]]]] = [
    (b"PK\x03\x04", _zip_members),  # .npz and torch's checkpoints too
    (b"\x89PNG\r\n\x1a\n", _png_texts),
    (b"PAR1", _parquet_values),
    (b"ARROW1", _arrow_values),
    (b"\x1f\x8b", _compressed(gzip.open)),
    (b"BZh", _compressed(bz2.open)),
    (b"\xfd7zXZ\0", _compressed(lzma.open)),
    (b"\x28\xb5\x2f\xfd", _compressed(_arrow_stream("zstd"))),
    (b"\x04\x22\x4d\x18", _compressed(_arrow_stream("lz4"))),
]
