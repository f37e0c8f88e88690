"""Where images lie: a folder, an archive that stays packed, or the Parquet file of their rows."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq
from PIL import Image

from pivot_hub.data.image import IMAGE_SUFFIXES, decode_image, image_files, open_image
from pivot_hub.data.row import Row, Span, image_columns
from pivot_hub.data.sampler import WINDOW
from pivot_hub.errors import DataError

ARCHIVES = (".zip", ".tar")


class FileStore:
    """Images that are files below a folder, or members of archives there, read in place.

    `coco/train2017/1.jpg` is looked up as that file, then in `coco/train2017.zip` and `coco.zip` (or .tar). The members
    of an archive are listed once, to give each row its span; opening an image then takes one seek and no list, so
    loader processes stay small.

    Args:
        root: a folder, or one .zip or uncompressed .tar.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._members: dict[str, dict[str, Span]] = {}

    def names(self) -> list[str]:
        """Every image file of the folder, or of the archive that is the root, by its name from there, in order."""
        if not self.root.is_file():
            return [f.relative_to(self.root).as_posix() for f in image_files(self.root)]
        members = self._listed(".")
        return sorted(n for n in members if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES)

    def locate(self, row: Row) -> Row:
        """Give a row the place of its image.

        Raises:
            DataError: the image is not there, or its archive is not whole.
        """
        assert row.image is not None
        if self.root.is_file():
            archives = ["."]
        elif (self.root / row.image).is_file():
            return row
        else:
            folders = [p for p in PurePosixPath(row.image).parents if p.name]
            archives = [f"{f}{s}" for f in folders for s in ARCHIVES if (self.root / f"{f}{s}").is_file()]
        for archive in archives:
            if (span := self._find(archive, row.image)) is not None:
                return replace(row, archive=archive, span=span)
        place = self.root if self.root.is_file() else self.root / row.image
        raise DataError(f"{row.id}: image {row.image} does not exist ({place}); check `images` in the recipe.")

    def open(self, row: Row) -> Image.Image:
        """Decode a located row's image as RGB.

        Raises:
            DataError: naming the row, when the image is not whole.
        """
        assert row.image is not None
        if row.archive is None or row.span is None:
            return open_image(self.root / row.image, row.id)
        file = self.root / row.archive
        try:
            data = read_member(file, row.span)
        except zlib.error as error:
            raise DataError(f"{row.id}: image {row.image} is damaged in {file} ({error}); fetch it again.") from error
        return decode_image(io.BytesIO(data), row.id, f"{row.image} of {file}")

    def read(self, name: str) -> bytes | None:
        """A file that is no image, of the folder or of the archive that is the root; None where there is none."""
        if self.root.is_file():
            span = self._listed(".").get(name)
            return None if span is None else read_member(self.root, span)
        return (self.root / name).read_bytes() if (self.root / name).is_file() else None

    def _find(self, archive: str, image: str) -> Span | None:
        members, parts = self._listed(archive), PurePosixPath(image).parts
        # Rows name images from the folder that archives are unpacked in: `coco/a.jpg` may be `a.jpg` inside.
        return next((members[n] for i in range(len(parts)) if (n := "/".join(parts[i:])) in members), None)

    def _listed(self, archive: str) -> dict[str, Span]:
        if archive not in self._members:
            self._members[archive] = archive_members(self.root / archive)
        return self._members[archive]

    def __getstate__(self) -> dict[str, object]:
        return {"root": self.root, "_members": {}}  # the lists of members stay behind


class ParquetStore:
    """Images that lie in the Parquet files of their rows, as the datasets library writes them.

    A row group is the least that can be read. The last ones stay in memory: `sampler.BlockSampler` asks for rows so
    that each group is read about once an epoch, by each loader process.

    Args:
        folder: that the references `file#row` start from.
        kept: rows whose groups stay; two of the sampler's windows.
    """

    def __init__(self, folder: Path, kept: int = 2 * WINDOW) -> None:
        self.folder, self.kept = folder, kept
        self._starts: dict[str, list[int]] = {}
        self._kept: OrderedDict[tuple[str, int], list[bytes | None]] = OrderedDict()

    def block(self, reference: str) -> str:
        """Name of the row group that holds an image."""
        file, row = _split(reference)
        return f"{file}#{self._group(file, row)[0]}"

    def open(self, row: Row) -> Image.Image:
        assert row.image is not None
        file, number = _split(row.image)
        group, start = self._group(file, number)
        data = self._images(file, group)[number - start]
        if data is None:
            raise DataError(f"{row.id}: the image has no bytes in {file}; download the file again.")
        return decode_image(io.BytesIO(data), row.id, f"of {row.id}")

    def _group(self, file: str, row: int) -> tuple[int, int]:
        """The row group of a row, and the group's first row."""
        if file not in self._starts:
            metadata = pq.read_metadata(self.folder / file)
            starts = [0]
            for i in range(metadata.num_row_groups):
                starts.append(starts[-1] + metadata.row_group(i).num_rows)
            self._starts[file] = starts
        starts = self._starts[file]
        group = bisect_right(starts, row) - 1
        return group, starts[group]

    def _images(self, file: str, group: int) -> list[bytes | None]:
        if (file, group) in self._kept:
            self._kept.move_to_end((file, group))
            return self._kept[file, group]
        with pq.ParquetFile(self.folder / file) as table:
            column = image_columns(table.schema_arrow)[0]
            values = table.read_row_group(group, columns=[column])[column].to_pylist()
        firsts = [v[0] if isinstance(v, list) and v else v for v in values]
        self._kept[file, group] = [v["bytes"] if v else None for v in firsts]
        oldest = next(iter(self._kept.values()))
        while sum(map(len, self._kept.values())) - len(oldest) >= self.kept:
            self._kept.popitem(last=False)
            oldest = next(iter(self._kept.values()))
        return self._kept[file, group]

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "kept": self.kept, "_starts": {}, "_kept": OrderedDict()}


def archive_members(file: Path) -> dict[str, Span]:
    """Files in a .zip or uncompressed .tar, by name, each with where it lies.

    Raises:
        DataError: the archive is not whole, encrypted, or packed so that a file cannot be read alone.
    """
    try:
        return _zip_members(file) if file.suffix == ".zip" else _tar_members(file)
    except (zipfile.BadZipFile, tarfile.TarError, struct.error, OSError) as error:
        raise DataError(f"{file}: not a whole archive ({error}); download it again.") from error


def read_member(file: Path, span: Span) -> bytes:
    """Bytes of one file in an archive.

    Raises:
        zlib.error: they are damaged.
    """
    offset, length, method = span
    with file.open("rb") as archive:
        archive.seek(offset)
        data = archive.read(length)
    return zlib.decompress(data, -15) if method == zipfile.ZIP_DEFLATED else data


def _split(reference: str) -> tuple[str, int]:
    file, _, row = reference.rpartition("#")
    return file, int(row)


def _zip_members(file: Path) -> dict[str, Span]:
    members: dict[str, Span] = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as raw:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise DataError(f"{file}: {info.filename} is encrypted or packed unusually; unpack the archive.")
            # The local header's own lengths tell where the data begins: they may differ from the directory's.
            raw.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", raw.read(4))
            start = info.header_offset + 30 + name + extra
            members[info.filename] = (start, info.compress_size, info.compress_type)
    return members


def _tar_members(file: Path) -> dict[str, Span]:
    # "r:" takes no compression: one image of a compressed archive would take unpacking all before it.
    with tarfile.open(file, "r:") as archive:
        return {
            PurePosixPath(info.name).as_posix(): (info.offset_data, info.size, zipfile.ZIP_STORED)
            for info in archive
            if info.isfile()
        }
