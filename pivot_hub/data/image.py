"""Image files: search of a folder, and decoding to RGB, which is the same at every entry point."""

from __future__ import annotations

import base64
import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from pivot_hub.errors import DataError, PivotError, shown_text

# The formats of every entry point, as Pillow names them. None of them starts another program, as EPS would.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
# A file of another suffix, or of none, is an image if it begins like one.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"}
)
DECODING = 2  # version of the conversion to RGB, which whatever is cached of images depends on
MOST_PIXELS = 178_956_970  # of an image: Pillow's own limit, 537 MB once it is decoded
MOST_UPLOADED_PIXELS = 64_000_000  # of an image from a visitor: 192 MB
MOST_BYTES = 1 << 29  # of an image file
# The machine's limits are no fault of the image: too many open files, no memory.
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(DataError):
    """An image cannot be used.

    Args:
        message: Error message, which names the image.
        reason: What is wrong: the format is not in FORMATS, the image is too large, its pixels have a depth whose black
            and white are not defined, or the file is damaged.
    """

    def __init__(self, message: str, reason: Literal["format", "size", "depth", "damage"]) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class FolderListing:
    """All that lies below a folder, sorted by name.

    Args:
        folder: The folder.
        images: Files that are images by their suffix, or by how they begin.
        others: Files that cannot be read as images, among them broken links.
        linked_folders: Links to folders, which are not followed.
    """

    folder: Path
    images: Sequence[Path]
    others: Sequence[Path]
    linked_folders: Sequence[Path]

    def not_read(self) -> dict[str, Any]:
        """Count what is left out, with the names of the first of each kind."""
        kinds = {"files": self.others, "linked_folders": self.linked_folders}
        return {kind: {"count": len(paths), "first": self._names(paths[:10])} for kind, paths in kinds.items()}

    def _names(self, paths: Sequence[Path]) -> list[str]:
        return [shown_text(p.relative_to(self.folder).as_posix(), 80) for p in paths]


@cache
def image_formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of Pillow reads, for `Image.open`."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def list_folder(folder: Path) -> FolderListing:
    """List the images of a folder and of those below it, and all that is not read.

    Raises:
        DataError: A folder cannot be read, or the name of an image is not UTF-8.
    """
    images: list[Path] = []
    others: list[Path] = []
    linked: list[Path] = []

    def stop(error: OSError) -> None:
        raise DataError(f"{shown_text(str(error.filename))} cannot be read ({error.strerror}); change its permissions.")

    for place, folders, names in os.walk(folder, onerror=stop):
        linked += [path for name in folders if (path := Path(place, name)).is_symlink()]
        for name in names:
            path = Path(place, name)
            (images if _is_image(path) else others).append(path)
    for path in images:
        require_utf8(path.relative_to(folder).as_posix(), folder)
    return FolderListing(folder, sorted(images), sorted(others), sorted(linked))


def image_files(folder: Path) -> list[Path]:
    """List the images of a folder and of those below it, sorted by name; see `list_folder`."""
    return list(list_folder(folder).images)


def require_utf8(name: str, place: Path) -> None:
    """Refuse a file name that is not UTF-8, because features and rows are stored by name.

    Args:
        name: Name of the file below its folder or archive.
        place: The folder or archive, for the error message.

    Raises:
        DataError: The name is not UTF-8.
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{shown_text(str(place))}: the file name {shown_text(name)} is not UTF-8; rename the file, for example "
            "by `convmv -f latin1 -t utf8 -r --notest`."
        ) from None


def open_image(path: Path, owner: str) -> Image.Image:
    """Decode an image file as RGB, as `decode_image` does.

    Args:
        path: Image file.
        owner: Row that the image belongs to, for the error message.

    Raises:
        DataError: The file is missing or not a whole image.
    """
    try:
        return decode_image(path, owner, str(path))
    except FileNotFoundError:
        raise DataError(
            f"{owner}: image {shown_text(str(path))} does not exist; check `images` in the recipe."
        ) from None


def decode_image(
    file: Path | IO[bytes], owner: str, name: str, most_pixels: int = MOST_PIXELS, side_px: int | None = None
) -> Image.Image:
    """Decode an image as upright RGB, as `to_rgb` converts it.

    Args:
        file: Path or open file.
        owner: Row that the image belongs to, for the error message.
        name: Name of the image, for the error message.
        most_pixels: Largest number of pixels; a larger image is refused by its header, before it is decoded.
        side_px: Side that is enough for a large JPEG; None to decode every pixel.

    Returns:
        The image; `info["mode"]` is the mode that it was stored in.

    Raises:
        ImageError: The file is not a whole image of FORMATS, or too large.
        FileNotFoundError: The file does not exist.
    """
    with open_stored(file, f"{owner}: image {shown_text(name)}", most_pixels, side_px) as stored:
        return to_rgb(stored, f"{owner}: image {shown_text(name)}")


@contextmanager
def open_stored(
    file: Path | IO[bytes], subject: str, most_pixels: int = MOST_PIXELS, side_px: int | None = None
) -> Iterator[Image.Image]:
    """Give an image as it is stored, whole; any exception of its decoder, or of the block, becomes an ImageError.

    Args:
        file: Path or open file.
        subject: The image as the error message names it.
        most_pixels: Largest number of pixels.
        side_px: Side that is enough for a large JPEG; None to decode every pixel.

    Raises:
        ImageError: The file is not a whole image of FORMATS, or too large.
        FileNotFoundError: The file does not exist.
    """
    try:
        require_size(file, subject)
        with Image.open(file, formats=image_formats()) as stored:
            if stored.width * stored.height > most_pixels:
                raise Image.DecompressionBombError
            if side_px is not None:
                stored.draft(stored.mode, (side_px, side_px))
            stored.load()
            yield stored
    except (PivotError, FileNotFoundError, MemoryError):
        raise
    except UnidentifiedImageError:
        formats = ", ".join(image_formats())
        raise ImageError(
            f"{subject} cannot be decoded (its format is none of {formats}); replace the file.", "format"
        ) from None
    except Image.DecompressionBombError:
        millions = most_pixels // 1_000_000
        raise ImageError(f"{subject} has more than {millions} million pixels; give a smaller one.", "size") from None
    except Exception as error:  # a damaged file raises whatever its decoder stumbles over
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            raise
        reason = shown_text(str(error) or type(error).__name__)
        raise ImageError(f"{subject} cannot be decoded ({reason}); replace the file.", "damage") from None


def require_size(file: Path | IO[bytes], subject: str) -> None:
    """Refuse a file that is too large, and a pipe or a device, which would block or never end.

    Args:
        file: Path or open file.
        subject: The image as the error message names it.

    Raises:
        ImageError: The file is larger than MOST_BYTES, or not a regular file.
        FileNotFoundError: The file does not exist.
    """
    if isinstance(file, Path):
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{subject} is not a regular file; give an image file.", "format")
        size = status.st_size
    else:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    if size > MOST_BYTES:
        raise ImageError(f"{subject} is larger than {MOST_BYTES >> 20} MiB; give a smaller file.", "size")


def to_rgb(image: Image.Image, subject: str = "this image") -> Image.Image:
    """Convert an image to RGB: turned upright as its EXIF says, transparency on white, 16-bit grey scaled to 8 bits.

    Args:
        image: Decoded image of any mode.
        subject: The image as the error message names it.

    Returns:
        The image without its metadata; `info["mode"]` is the mode that it was stored in.

    Raises:
        ImageError: The pixels are floats or 32-bit integers.
    """
    mode, turn = image.mode, TURNS.get(_orientation(image))
    if mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM")):  # which store 16 bits at most
        image = _to_8_bits(image)
    elif mode in ("I", "F"):
        kind = "floats" if mode == "F" else "32-bit integers"
        raise ImageError(
            f"{subject} has pixels of {kind}, whose black and white are not defined; save it with 8 or 16 bits.",
            "depth",
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    rgb = rgb if turn is None else rgb.transpose(turn)
    rgb.info = {"mode": mode}  # without EXIF, so that nobody turns it again
    return rgb


def read_upload(file: Path | IO[bytes], most: int = MOST_UPLOADED_PIXELS, side_px: int | None = None) -> Image.Image:
    """Decode an image that an untrusted visitor uploaded, as `decode_image` does: the first frame of an animation.

    Args:
        file: Uploaded file; error messages do not contain its name.
        most: Largest number of pixels.
        side_px: Side that is enough. A large JPEG is decoded at a half, a quarter or an eighth of its size as long as
            it has this many pixels a side, which takes a fraction of the time.

    Raises:
        DataError: The file is not an image, not whole, or too large.
    """
    messages = {
        "format": "This file is not an image that can be read here; give a PNG, JPEG, WebP or GIF.",
        "size": f"This image has more than {most // 1_000_000} million pixels; give a smaller one.",
        "depth": "This image has 32-bit pixels, whose black and white are not defined; save it with 8 or 16 bits.",
        "damage": "This image is damaged or cut short; save it again and give the new file.",
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the lower one
            return decode_image(file, "upload", "given", most, side_px)
    except ImageError as error:
        raise DataError(messages[error.reason]) from None
    except FileNotFoundError:
        raise DataError(messages["format"]) from None


def _is_image(path: Path) -> bool:
    """Return whether a path is a file that is an image by its suffix, or by how it begins."""
    if not path.is_file():
        return False
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=image_formats()):
                return True
    except Exception:  # a file that is no image raises whatever a decoder stumbles over
        return False


def _orientation(image: Image.Image) -> int:
    """Return the orientation in an image's EXIF; 1, which is upright, where there is none that can be read."""
    with suppress(Exception):  # broken EXIF leaves the pixels as they are
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey to 8 bits by its high byte, as Pillow converts 16-bit colours."""
    values = np.asarray(image)
    grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def data_uri(image: Image.Image, form: str = "PNG") -> str:
    """Encode an image as a data URI in PNG or WEBP, which a page displays without a request to a server."""
    file = io.BytesIO()
    image.save(file, form, **({"quality": 90} if form == "WEBP" else {}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
