"""Image files: found in a folder, decoded to plain colour."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from pivot_hub.errors import DataError

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
