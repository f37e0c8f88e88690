"""Image stores: a folder, an archive that stays packed, or the Parquet file of the rows."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from PIL import Image

from pivot_hub.data.image import IMAGE_SUFFIXES, MOST_BYTES, decode_image, image_files, open_image, require_utf8
from pivot_hub.data.row import Row, Span, image_columns, split_reference
from pivot_hub.data.sampler import WINDOW
from pivot_hub.errors import DataError, shown_text

ARCHIVES = (".zip", ".tar")


class FileStore:
    """Images that are files below a folder, or members of archives there, read in place.

    `coco/train2017/1.jpg` is looked up as that file, then in `coco/train2017.zip` and `coco.zip` (or .tar). The members
    of an archive are listed once, to give each row its span. Opening an image then takes one seek and no list, so
    loader processes need little memory.

    Args:
        root: Folder, or one .zip or uncompressed .tar file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._members: dict[str, dict[str, Span]] = {}

    def names(self) -> list[str]:
        """List the image files of the folder, or of the archive that is the root, as sorted paths from the root."""
        if not self.root.is_file():
            return [f.relative_to(self.root).as_posix() for f in image_files(self.root)]
        members = self._list_members(".")
        names = sorted(n for n in members if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES)
        for name in names:
            require_utf8(name, self.root)
        return names

    def locate(self, row: Row) -> Row:
        """Return the row with the location of its image.

        Args:
            row: Row that names an image.

        Raises:
            DataError: The image does not exist, or its archive is not whole.
        """
        assert row.image is not None
        try:
            if self.root.is_file():
                archives = ["."]
            elif (self.root / row.image).is_file():
                return row
            else:
                folders = [p for p in PurePosixPath(row.image).parents if p.name]
                archives = [f"{f}{s}" for f in folders for s in ARCHIVES if (self.root / f"{f}{s}").is_file()]
        except OSError as error:  # no permission, a path too long, a loop of links
            name = shown_text(row.image)
            raise DataError(f"{row.id}: image {name} cannot be read ({error.strerror}); fix or remove it.") from None
        for archive in archives:
            span = self._find(archive, row.image)
            if span is not None:
                return replace(row, archive=archive, span=span)
        place = self.root if self.root.is_file() else self.root / shown_text(row.image)
        name = shown_text(row.image)
        raise DataError(f"{row.id}: image {name} does not exist ({place}); check `images` in the recipe.")

    def open(self, row: Row) -> Image.Image:
        """Decode the image of a row as RGB.

        Args:
            row: Row as `locate` returned it.

        Raises:
            DataError: The image is not whole; the message names the row.
        """
        assert row.image is not None
        if row.archive is None or row.span is None:
            return open_image(self.root / row.image, row.id)
        file = self.root / row.archive
        try:
            data = read_member(file, row.span)
        except DataError as error:
            raise DataError(f"{row.id}: image {row.image}: {error}") from error
        return decode_image(io.BytesIO(data), row.id, f"{row.image} of {file}")

    def read(self, name: str) -> bytes | None:
        """Read a file other than an image from the folder, or from the archive that is the root.

        Args:
            name: Path of the file from the root.

        Returns:
            The content, or None where the file does not exist.
        """
        if self.root.is_file():
            span = self._list_members(".").get(name)
            return None if span is None else read_member(self.root, span)
        file = self.root / name
        return file.read_bytes() if file.is_file() else None

    def _find(self, archive: str, image: str) -> Span | None:
        members, parts = self._list_members(archive), PurePosixPath(image).parts
        # Rows name images from the folder that archives are unpacked in: `coco/a.jpg` may be `a.jpg` inside.
        for i in range(len(parts)):
            name = "/".join(parts[i:])
            if name in members:
                return members[name]
        return None

    def _list_members(self, archive: str) -> dict[str, Span]:
        if archive not in self._members:
            self._members[archive] = archive_members(self.root / archive)
        return self._members[archive]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "_members": {}}  # member lists are not sent to other processes


class ParquetStore:
    """Images that are stored in the Parquet files of their rows, as the datasets library writes them.

    A row group is the smallest unit that can be read. A group stays in memory until as many of its images were opened
    as it has, or until it is the oldest of too many: `sampler.BlockSampler` orders the rows so that a group is read
    about once an epoch.

    Args:
        folder: Folder that the references `file#row` start from.
        kept: Number of rows whose groups stay in memory; a window of the sampler by default.
    """

    def __init__(self, folder: Path, kept: int = WINDOW) -> None:
        self.folder, self.kept = folder, kept
        self._starts: dict[str, list[int]] = {}
        self._kept: OrderedDict[tuple[str, int, str | None], list[bytes | None]] = OrderedDict()
        self._opened: Counter[tuple[str, int, str | None]] = Counter()  # images opened of each group that is kept

    def block(self, reference: str) -> str:
        """Return the name of the row group that holds an image.

        Args:
            reference: Reference `file#row` of the image.
        """
        file, row, _ = split_reference(reference)
        return f"{file}#{self._group(file, row)[0]}"

    def open(self, row: Row) -> Image.Image:
        """Decode the image of a row as RGB.

        Args:
            row: Row whose image is a reference `file#row`.

        Raises:
            DataError: The image is missing or not whole; the message names the row.
        """
        assert row.image is not None
        file, number, column = split_reference(row.image)
        group, start = self._group(file, number)
        key = (file, group, column)
        images = self._images(*key)
        data = images[number - start]
        self._opened[key] += 1
        if self._opened[key] == len(images):
            del self._kept[key], self._opened[key]
        if data is None:
            raise DataError(f"{row.id}: the image has no bytes in {file}; download the file again.")
        return decode_image(io.BytesIO(data), row.id, f"of {row.id}")

    def _group(self, file: str, row: int) -> tuple[int, int]:
        """Return the index of the row group that holds a row, and the group's first row."""
        if file not in self._starts:
            metadata = pq.read_metadata(self.folder / file)
            starts = [0]
            for i in range(metadata.num_row_groups):
                starts.append(starts[-1] + metadata.row_group(i).num_rows)
            self._starts[file] = starts
        starts = self._starts[file]
        group = bisect_right(starts, row) - 1
        return group, starts[group]

    def _images(self, file: str, group: int, column: str | None) -> list[bytes | None]:
        key = (file, group, column)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            with pq.ParquetFile(self.folder / file) as table:
                name = column or image_columns(table.schema_arrow)[0]
                values = table.read_row_group(group, columns=[name])[name].to_pylist()
        except (pa.ArrowException, OSError, KeyError, IndexError) as error:
            reason = shown_text(str(error))
            raise DataError(f"{self.folder / file}: images cannot be read ({reason}); download it again.") from error
        firsts = [v[0] if isinstance(v, list) and v else v for v in values]
        images = self._kept[key] = [v["bytes"] if v else None for v in firsts]
        oldest = next(iter(self._kept.values()))
        while sum(map(len, self._kept.values())) - len(oldest) >= self.kept:
            key, _ = self._kept.popitem(last=False)
            del self._opened[key]
            oldest = next(iter(self._kept.values()))
        return images

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "kept": self.kept, "_starts": {}, "_kept": OrderedDict(), "_opened": Counter()}


def open_cell(cell: Mapping[str, Any] | None, folder: Path | None, subject: str) -> Path | io.BytesIO:
    """Return the image of a row as the datasets library gives it undecoded: bytes, or the path of a file.

    A path comes from the data set, which may be anybody's: it names a file below the data set's own folder or below the
    caches that the library downloads to.

    Args:
        cell: Values `bytes` and `path` of the row, or None.
        folder: Folder of a local data set; None for one of the Hub.
        subject: The image as the error message names it.

    Raises:
        DataError: The row has no image, or names a file elsewhere.
    """
    if cell is not None and cell["bytes"] is not None:
        return io.BytesIO(cell["bytes"])
    if cell is None or cell["path"] is None:
        raise DataError(f"{subject} is missing; remove the row.")
    roots = [Path(HF_HOME), Path(HF_HUB_CACHE), Path(HF_DATASETS_CACHE), *([folder] if folder else [])]
    path = Path(os.path.abspath((folder or Path()) / cell["path"]))  # noqa: PTH100  (`..` is removed, links stay)
    if not any(path.is_relative_to(os.path.abspath(root)) for root in roots):  # noqa: PTH100
        raise DataError(
            f"{subject} is a file outside the data set ({shown_text(cell['path'])}); put the images into the Parquet "
            "file, or below its folder."
        )
    return path


def archive_members(file: Path) -> dict[str, Span]:
    """List the files in a .zip or uncompressed .tar, by name, each with its span; see `iter_members`."""
    with file.open("rb") as archive:
        return dict(iter_members(archive, str(file)))


def iter_members(archive: IO[bytes], name: str) -> Iterator[tuple[str, Span]]:
    """Yield the files in a .zip or uncompressed .tar, in their order, each with its span.

    Args:
        archive: The open file, in which a caller may read between two members.
        name: Path or URL of the archive, whose suffix tells its kind.

    Raises:
        DataError: The archive is not whole, is encrypted, or is packed so that a file cannot be read alone. Those files
            of a .tar that lie before its damage were yielded.
    """
    try:
        yield from _zip_members(archive, name) if PurePosixPath(name).suffix == ".zip" else _tar_members(archive)
    except (zipfile.BadZipFile, tarfile.TarError, struct.error, OSError) as error:
        raise DataError(f"{name}: not a whole archive ({error}); download it again.") from error


def read_member(file: Path, span: Span) -> bytes:
    """Read one file of an archive, see `read_span`."""
    with file.open("rb") as archive:
        return read_span(archive, str(file), span)


def read_span(archive: IO[bytes], name: str, span: Span) -> bytes:
    """Read one file of an open archive.

    Args:
        archive: The open file.
        name: Path or URL of the archive, for the error message.
        span: Span of the member, as `iter_members` yields it.

    Raises:
        DataError: The member is damaged, or larger than an image may be; nothing of its size has been allocated.
    """
    offset, stored, method, size = span
    if max(stored, size) > MOST_BYTES:
        raise DataError(f"a file of {name} is larger than {MOST_BYTES >> 20} MiB; unpack the archive and replace it.")
    archive.seek(offset)
    data = archive.read(stored)
    reason = f"{len(data)} of {stored} bytes"
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-15).decompress(data, size + 1)
            reason = f"{len(data)} bytes where the archive says {size}"
        except zlib.error as error:
            data, reason = b"", str(error)
    if len(data) != size:
        raise DataError(f"a file is damaged in {name} ({reason}); fetch it again.")
    return data


def _zip_members(file: IO[bytes], name: str) -> Iterator[tuple[str, Span]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise DataError(f"{name}: {info.filename} is encrypted or packed unusually; unpack the archive.")
            # The lengths in the local header give the start of the data; the directory's lengths may differ.
            file.seek(info.header_offset + 26)
            name_size, extra = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + name_size + extra
            yield info.filename, (start, info.compress_size, info.compress_type, info.file_size)


def _tar_members(file: IO[bytes]) -> Iterator[tuple[str, Span]]:
    # "r:" refuses compression: reading one image of a compressed archive would decompress all that precedes it.
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            if info.isfile():
                span = (info.offset_data, info.size, zipfile.ZIP_STORED, info.size)
                yield PurePosixPath(info.name).as_posix(), span
            archive.members = []  # type: ignore[attr-defined]  # which would grow with the archive
