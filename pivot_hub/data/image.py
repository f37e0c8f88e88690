"""Image files: found in a folder, decoded to plain colour."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from pivot_hub.errors import DataError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and those below it, by suffix, in order of their names."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())


def open_image(path: Path, owner: str) -> Image.Image:
    """Decode an image as RGB; greyscale, palette and transparency (on white) become plain colour.

    Args:
        path: the file.
        owner: the row it belongs to, for the message.

    Raises:
        DataError: the file is missing or not a whole image.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image: Image.Image = file
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{owner}: image {path} does not exist; check `images` in the recipe.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{owner}: image {path} cannot be decoded ({error}); replace the file.") from None
