"""Image files: search of a folder, and decoding to RGB."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import IO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pivot_hub.errors import DataError

UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no format that runs other programs
MOST_PIXELS = 64_000_000  # of an uploaded image: 192 MB once it is decoded
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def image_files(folder: Path) -> list[Path]:
    """List the image files of a folder and of those below it, recognised by suffix, in order of their names."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


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
        raise DataError(f"{owner}: image {path} does not exist; check `images` in the recipe.") from None


def decode_image(file: Path | IO[bytes], owner: str, name: str) -> Image.Image:
    """Decode an image as RGB; greyscale and palettes become RGB, and transparency is shown on white.

    Args:
        file: Path or open file.
        owner: Row that the image belongs to, for the error message.
        name: Name of the image, for the error message.

    Returns:
        The image; `info["mode"]` is the mode that it was stored in.

    Raises:
        DataError: The file is not a whole image.
        FileNotFoundError: The file does not exist.
    """
    try:
        with Image.open(file) as stored:
            stored.load()
            image: Image.Image = stored
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            rgb = image.convert("RGB")
            rgb.info["mode"] = stored.mode
            return rgb
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{owner}: image {name} cannot be decoded ({reason}); replace the file.") from None


def read_upload(file: Path | IO[bytes], most: int = MOST_PIXELS) -> Image.Image:
    """Decode an image that an untrusted visitor uploaded: upright, RGB, the first frame of an animation.

    Args:
        file: Uploaded file; error messages do not contain its name.
        most: Largest number of pixels; a larger image is refused by its header, before it is decoded.

    Raises:
        DataError: The file is not an image, not whole, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is the lower one
            Image.init()
            with Image.open(file, formats=[f for f in UPLOAD_FORMATS if f in Image.OPEN]) as stored:
                width, height = stored.size
                orientation = stored.getexif().get(ExifTags.Base.Orientation, 1)
    except Image.DecompressionBombError:
        width = height = most
    except (OSError, SyntaxError, ValueError, TypeError):
        raise DataError("This file is not an image that can be read here; give a PNG, JPEG, WebP or GIF.") from None
    if width * height > most:
        raise DataError(f"This image has more than {most // 1_000_000} million pixels; give a smaller one.")
    try:
        image = decode_image(file, "upload", "given")
    except DataError:
        raise DataError("This image is damaged or cut short; save it again and give the new file.") from None
    if orientation != 1:
        image.getexif()[ExifTags.Base.Orientation] = orientation
        image = ImageOps.exif_transpose(image)
    return image
