"""Image files: found in a folder, decoded to plain colour."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pivot_hub.errors import DataError

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no format that runs other programs
MOST_PIXELS = 64_000_000  # of a picture a visitor gives: 192 MB once it is decoded
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and those below it, by suffix, in order of their names."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def open_image(path: Path, owner: str) -> Image.Image:
    """Decode an image file as RGB, as `decode_image` does.

    Raises:
        DataError: the file is missing or not a whole image.
    """
    try:
        return decode_image(path, owner, str(path))
    except FileNotFoundError:
        raise DataError(f"{owner}: image {path} does not exist; check `images` in the recipe.") from None


def decode_image(file: Path | IO[bytes], owner: str, name: str) -> Image.Image:
    """Decode an image as RGB; greyscale, palette and transparency (on white) become plain colour.

    Args:
        file: a path or an open file.
        owner: the row it belongs to, and name: of the image, for the message.

    Returns:
        The image; `info["mode"]` is the mode it was stored in.

    Raises:
        DataError: it is not a whole image.
        FileNotFoundError: there is no such file.
    """
    try:
        with Image.open(file) as stored:
            stored.load()
            image: Image.Image = stored
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            plain = image.convert("RGB")
            plain.info["mode"] = stored.mode
            return plain
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "no image format is known to begin so" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{owner}: image {name} cannot be decoded ({reason}); replace the file.") from None


def read_upload(file: Path | IO[bytes], most: int = MOST_PIXELS) -> Image.Image:
    """Decode a picture that a stranger gave: upright, RGB, of an animation the first frame.

    Args:
        file: the picture; its name is told to nobody.
        most: pixels; a larger picture is refused by its header, before it is decoded.

    Raises:
        DataError: it is no picture, not whole, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the lower one
            Image.init()
            with Image.open(file, formats=[f for f in UPLOAD_FORMATS if f in Image.OPEN]) as stored:
                width, height = stored.size
                turned = stored.getexif().get(ExifTags.Base.Orientation, 1)
    except Image.DecompressionBombError:
        width = height = most
    except (OSError, SyntaxError, ValueError, TypeError):
        raise DataError("This file is no picture that can be read here; give a PNG, JPEG, WebP or GIF.") from None
    if width * height > most:
        raise DataError(f"This picture has more than {most // 1_000_000} million pixels; give a smaller one.")
    try:
        image = decode_image(file, "upload", "given")
    except DataError:
        raise DataError("This picture is damaged or cut short; save it again and give the new file.") from None
    if turned != 1:
        image.getexif()[ExifTags.Base.Orientation] = turned
        image = ImageOps.exif_transpose(image)
    return image
