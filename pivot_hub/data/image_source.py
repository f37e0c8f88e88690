"""Images of any source, one at a time: folders, archives and their shards, tables, lists of paths."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, TextIO

from pivot_hub.data.image import IMAGE_SUFFIXES, list_folder, require_utf8
from pivot_hub.data.image_blocks import Block, ImageSource, SourceImage, SourceOptions, cut
from pivot_hub.data.image_store import ARCHIVES, iter_members, read_span
from pivot_hub.data.row import Span, bad_character, open_text
from pivot_hub.data.stored_file import (
    StoredFile,
    exists,
    find_files,
    is_pattern,
    is_remote_folder,
    is_url,
    list_urls,
    without_braces,
)
from pivot_hub.data.table_images import parquet_images, row_groups, tables
from pivot_hub.data.tables import is_saved
from pivot_hub.errors import DataError, shown_text

LISTS = (".txt", ".lst")  # suffixes of files that hold a path in each line
FORMS = (
    "a folder of images, a .zip or .tar, a pattern of shards (shards-{000..099}.tar), Parquet files, the Hub name of a "
    "data set, a .txt of paths, or - for paths on stdin"
)


def open_source(source: str, options: SourceOptions = SourceOptions()) -> ImageSource:
    """Find images.

    Ids are the paths below a folder or inside an archive; in shards of a pattern, the keys of webdataset: names up to
    the first dot; in a table, a column of ids, or `file#row`; in a list, its lines.

    Args:
        source: Path, URL or pattern, see FORMS.
        options: How tables are read.

    Raises:
        DataError: There is no such source, or no image in it.
    """
    place = Path(source)
    if source == "-":
        return _paths(sys.stdin, "-", once=True)
    if is_pattern(source) and not exists(source):
        name = without_braces(source)
        return _files(name if is_url(source) else name.rpartition("/")[2], find_files(source), True, options)
    if is_url(source):
        return _remote(source, options)
    if place.is_dir():
        return _folder(place, options)
    if place.is_file():
        stored = StoredFile(source, place.name)
        if stored.suffix in LISTS:
            return _paths(open_text(place), place.name)
        if stored.suffix in (*ARCHIVES, ".parquet"):
            return _archive(place) if stored.suffix in ARCHIVES else row_groups(stored, options)
    if not place.exists() and source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return tables(source, source, options)
    raise DataError(f"{shown_text(source)} is not a folder or another source of images; give {FORMS}.")


def _folder(folder: Path, options: SourceOptions) -> ImageSource:
    if is_saved(folder):
        return tables(str(folder), folder.resolve().name, options)
    listing = list_folder(folder)
    if not listing.images:
        shards = [path for path in listing.others if path.suffix in (*ARCHIVES, ".parquet")]
        if not shards:
            raise DataError(f"{folder} holds no image file; give {FORMS}.")
        files = [StoredFile(str(path), path.relative_to(folder).as_posix()) for path in shards]
        return _files(folder.resolve().name, files, True, options)
    names = [path.relative_to(folder).as_posix() for path in listing.images]

    def blocks() -> Iterator[Block]:
        return cut(SourceImage(name, str(folder / name)) for name in names)

    return ImageSource(folder.resolve().name, blocks, len(names), True, listing.not_read())


def _remote(url: str, options: SourceOptions) -> ImageSource:
    stored = StoredFile(url, PurePosixPath(url).name)
    if stored.suffix in (*ARCHIVES, ".parquet"):
        return _files(url, [stored], False, options)
    if stored.suffix in LISTS:
        with stored.open() as file:
            return _paths(io.StringIO(file.read().decode()), url)
    if not is_remote_folder(url):
        raise DataError(f"{shown_text(url)} is not a folder or another source of images; give {FORMS}.")
    files = list_urls(url)
    images = [SourceImage(file.name, file.url) for file in files if file.suffix in IMAGE_SUFFIXES]
    if images:
        return ImageSource(url, lambda: cut(images), len(images), True)
    shards = [file for file in files if file.suffix in (*ARCHIVES, ".parquet")]
    if not shards:
        raise DataError(f"{url} holds no image file; give {FORMS}.")
    return _files(url, shards, True, options)


def _archive(file: Path) -> ImageSource:
    """Open an archive as the folder that it packs, which is cut into blocks."""
    images = []
    with file.open("rb") as archive:
        for name, span in iter_members(archive, str(file)):
            if _is_image(name):
                require_utf8(name, file)
                images.append(SourceImage(name, str(file), span))
    if not images:
        raise DataError(f"{file} holds no image; give {FORMS}.")
    images.sort(key=lambda image: image.id)
    return ImageSource(file.name, lambda: cut(images), len(images), True)


def _paths(lines: TextIO, name: str, once: bool = False) -> ImageSource:
    """Open a list of paths and URLs, relative to the current folder, which are the ids."""

    def images() -> Iterator[SourceImage]:
        if not once:
            lines.seek(0)
        for line in lines:
            path = line.rstrip("\r\n")
            if bad_character(path):
                raise DataError(f"{name}: the line {shown_text(path)} is not UTF-8; convert the list.")
            if path:
                yield SourceImage(path, path)

    return ImageSource(name, lambda: cut(images()), None, True, once=once)


def _files(name: str, files: Sequence[StoredFile], keys: bool, options: SourceOptions) -> ImageSource:
    """Open shards, each of which is a block.

    Args:
        name: Name of the source.
        files: Archives and Parquet files.
        keys: Whether the ids of images in archives are webdataset's keys, not whole names.
        options: How tables are read.

    Raises:
        DataError: A file is neither an archive nor Parquet.
    """
    for file in files:
        if file.suffix not in (*ARCHIVES, ".parquet"):
            raise DataError(f"{file.url} is no .tar, .zip or .parquet; give {FORMS}.")

    def block(file: StoredFile) -> Block:
        if file.suffix == ".parquet":
            return Block(file.name, lambda: parquet_images(file, None, options), file.stamp)
        return Block(file.name, lambda: _archive_images(file, keys), file.stamp)

    return ImageSource(name, lambda: map(block, files))


def _archive_images(file: StoredFile, keys: bool) -> Iterator[SourceImage]:
    """Yield the images of a shard in its order; what lies behind the URL is read once, from its start to its end."""
    last_key, end = "", 0
    with file.open() as archive:
        for name, span in iter_members(archive, file.url):
            end = span[0] + -(-span[1] // 512) * 512
            if not _is_image(name):
                continue
            require_utf8(name, Path(file.name))
            key = name[: -len("".join(PurePosixPath(name).suffixes))] if keys else name
            image_id, last_key = (name if keys and key == last_key else key), key
            if file.local:
                yield SourceImage(image_id, file.url, span)
            else:
                yield _read_member(image_id, archive, file, span)
        if file.suffix == ".tar":
            archive.seek(end)
            if end and not archive.read(1):
                raise DataError(f"{file.url}: ends without the end mark of a .tar, as if cut short; check its size.")


def _read_member(image_id: str, archive: IO[bytes], file: StoredFile, span: Span) -> SourceImage:
    try:
        return SourceImage(image_id, file.url, span, read_span(archive, file.url, span))
    except (DataError, OSError) as error:
        return SourceImage(image_id, problem=f"{image_id}: {error}")


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
