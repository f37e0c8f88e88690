"""What a source of images is made of: images that are not read yet, and the blocks that processes divide.

A block is a shard file, some row groups of a Parquet file, or about a thousand images of a listing. Blocks follow from
the source alone, so that any number of processes divide the same ones.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pivot_hub.data.image import MOST_BYTES, ImageError, decode_image, require_size
from pivot_hub.data.image_store import read_span
from pivot_hub.data.row import Span
from pivot_hub.data.stored_file import StoredFile
from pivot_hub.errors import DataError, shown_text

BLOCK = 1024  # images of a listing in a block, on average


@dataclass(frozen=True)
class SourceImage:
    """An image that is not read yet, which is sent to the process that decodes it.

    Args:
        id: Name of the image in its source.
        file: Path or URL of the image's file, or of the archive that holds it.
        span: Position of the image in the archive.
        content: Bytes of the image's file, if they were read with their neighbours.
        problem: Error message of an image that the source names but does not have.
    """

    id: str
    file: str = ""
    span: Span | None = None
    content: bytes | None = None
    problem: str | None = None

    def read(self) -> bytes:
        """Read the image's file.

        Raises:
            DataError: The file is missing, cannot be read, or is larger than an image may be.
        """
        if self.problem is not None:
            raise DataError(self.problem)
        if self.content is not None:
            return self.content
        subject = f"{self.id}: image {shown_text(self.file)}"
        stored = StoredFile(self.file, self.id)
        try:
            if stored.local and self.span is None:
                require_size(stored.local, subject)
            with stored.open() as file:
                data = read_span(file, self.file, self.span) if self.span else file.read(MOST_BYTES + 1)
                require_size(io.BytesIO(data), subject)
                return data
        except ImageError:
            raise
        except FileNotFoundError:
            raise DataError(f"{subject} does not exist; restore it, or run the command again without it.") from None
        except DataError as error:
            raise DataError(f"{self.id}: {error}") from error

    def load(self, known: str | None) -> tuple[str, Image.Image | DataError | None]:
        """Decode the image as RGB.

        Args:
            known: SHA-256 of the image's file whose features are there already.

        Returns:
            The SHA-256 of the file, empty if it cannot be read; with the image, None if its hash is the known one, or
            the error that names it if it cannot be decoded.
        """
        try:
            data = self.read()
        except DataError as error:
            return "", error
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 == known:
            return sha256, None
        place = self.file if self.span is None else f"{self.id} of {self.file}"
        try:
            return sha256, decode_image(io.BytesIO(data), self.id, place or self.id)
        except DataError as error:
            return sha256, error


@dataclass(frozen=True)
class Block:
    """A unit of work.

    Args:
        name: Name of the block in its source, which stays the same when the source grows.
        images: Function that lists the images, as a SourceImage each unless their loader reads others. It raises a
            DataError at the place from which on they cannot be read.
        stamp: Function that returns a key of the contents; None where every image must be looked at.
    """

    name: str
    images: Callable[[], Iterator[Any]]
    stamp: Callable[[], str] | None = None


@dataclass(frozen=True)
class ImageSource:
    """Images in blocks.

    Args:
        name: Name of the source without the path of this machine; it stays the same when the source grows.
        blocks: Function that lists the blocks.
        count: Number of images, if it is known before they are read.
        is_listing: Whether the blocks are cut from one listing, so that a block that is gone has no images of its own.
        not_read: What lies beside the images and is not read, see `FolderListing.not_read`.
        once: Whether the blocks can be listed only once.
    """

    name: str
    blocks: Callable[[], Iterator[Block]]
    count: int | None = None
    is_listing: bool = False
    not_read: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class SourceOptions:
    """How tables are read.

    Args:
        image_column: Column of the images: their bytes, or paths of files.
        id_column: Column of the ids; one of ID_COLUMNS by default, else images are named by file and row.
        split: Split of a data set; all of them by default.
        revision: Revision of a Hub data set.
    """

    image_column: str | None = None
    id_column: str | None = None
    split: str | None = None
    revision: str | None = None


def cut(images: Iterable[SourceImage]) -> Iterator[Block]:
    """Cut a listing into blocks of about BLOCK images, each named by its first.

    A block begins at a name whose hash is divisible by BLOCK, so that a name that is added or removed changes the one
    block that it lies in.
    """
    block: list[SourceImage] = []
    name, names = "", {""}
    for image in images:
        first_bytes = hashlib.sha256(image.id.encode("utf-8", "surrogateescape")).digest()[:4]
        if block and (int.from_bytes(first_bytes) % BLOCK == 0 or len(block) == 8 * BLOCK):
            yield _block_of(name, block)
            name, block = image.id, []
            while name in names:  # of an image that is listed twice
                name += " again"
            names.add(name)
        block.append(image)
    if block:
        yield _block_of(name, block)


def _block_of(name: str, images: list[SourceImage]) -> Block:
    return Block(name, lambda: iter(images))
