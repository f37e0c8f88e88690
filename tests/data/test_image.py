"""Decoding of images: one list of formats, one upright RGB, and no damaged file that ends more than its own row."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from pivot_hub.data.image import (
    MOST_BYTES,
    ImageError,
    decode_image,
    image_files,
    list_folder,
    open_image,
    read_upload,
)
from pivot_hub.data.image_store import FileStore, open_cell
from pivot_hub.data.row import Row
from pivot_hub.errors import DataError

RED, BLUE = (200, 30, 30), (30, 30, 200)
EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"


def entry_points(file: Path) -> list[Image.Image]:
    """Decode a file as every entry point does: a path, an upload, a folder's store, an archive's, and bytes."""
    with zipfile.ZipFile(file.with_name("images.zip"), "w") as archive:
        archive.write(file, file.name)
    images = [open_image(file, "row"), read_upload(file), decode_image(io.BytesIO(file.read_bytes()), "row", "x")]
    for root in (file.parent, file.with_name("images.zip")):
        store = FileStore(root)
        images.append(store.open(store.locate(Row("row", file.name, "", ""))))
    return images


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_entry_point_turns_an_image_upright(tmp_path: Path, name: str, orientation: int) -> None:
    """N5: the answer is that of Pillow's own `exif_transpose`, once."""
    from PIL import ImageOps

    image = Image.new("RGB", (24, 16), RED)
    image.paste(BLUE, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as stored:
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert upright.size == ((24, 16) if orientation < 5 else (16, 24))
    for decoded in entry_points(tmp_path / name):
        assert decoded.tobytes() == upright.tobytes()
        assert dict(decoded.getexif()) == {}  # nobody turns it again


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    """N4: 32768 of 65535 is 128, in every format that holds 16 bits."""
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        Image.fromarray(values).save(tmp_path / name)
        for decoded in entry_points(tmp_path / name):
            assert np.asarray(decoded)[0, :, 0].tolist() == [0, 0, 1, 128, 255], name
    Image.fromarray(values).save(tmp_path / "clear.png", transparency=32768)
    assert np.asarray(open_image(tmp_path / "clear.png", "row"))[0, :, 0].tolist() == [0, 0, 1, 255, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_floats_and_32_bit_integers_are_refused_by_name(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.full((4, 4), 7, dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"row: image .*deep.tif has pixels of .*; save it with 8 or 16 bits"):
        open_image(tmp_path / "deep.tif", "row")
    with pytest.raises(DataError, match="32-bit pixels"):
        read_upload(tmp_path / "deep.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_white_at_every_entry_point(tmp_path: Path, mode: str) -> None:
    """N16: half-transparent red is pink, whatever form the transparency has."""
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    file = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        image.save(file)
    else:
        image.convert(mode).save(file)
    for decoded in entry_points(file):
        assert min(decoded.getpixel((0, 0))) > 120  # type: ignore[arg-type]


def wrong_tag_type(folder: Path) -> bytes:
    """L12: an 8 x 8 TIFF one of whose tags has another type, so that the decoder raises a TypeError."""
    Image.new("RGB", (8, 8), RED).save(folder / "whole.tif")
    content = bytearray((folder / "whole.tif").read_bytes())
    content[72] = 2
    return bytes(content)


def cut(folder: Path) -> bytes:
    Image.effect_noise((60, 60), 60).save(folder / "whole.jpg")
    return (folder / "whole.jpg").read_bytes()[:700]


@pytest.mark.parametrize("damage", [wrong_tag_type, cut, lambda folder: b"", lambda folder: EPS.encode()])
def test_whatever_a_decoder_raises_is_a_corrupt_image(tmp_path: Path, damage: Callable[[Path], bytes]) -> None:
    """L12, S3: PostScript under another name is no image, and starts no program."""
    file = tmp_path / "photo.jpg"
    file.write_bytes(damage(tmp_path))
    with pytest.raises(ImageError, match=r"^row: image .*photo.jpg cannot be decoded \(.+\); replace the file"):
        open_image(file, "row")
    with pytest.raises(DataError, match=r"is not an image|is damaged"):
        read_upload(file)


def test_any_exception_of_a_decoder_but_the_machines_is_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    errors: list[Exception] = [TypeError("x"), KeyError(3), ZeroDivisionError(), RuntimeError("y" * 9999)]
    for error in errors:
        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", Mock(side_effect=error))
        with pytest.raises(ImageError, match="row: image") as caught:
            open_image(tmp_path / "a.png", "row")
        assert len(str(caught.value)) < 700
    full = OSError(24, "Too many open files")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", Mock(side_effect=full))
    with pytest.raises(OSError, match="Too many open files"):
        open_image(tmp_path / "a.png", "row")


def test_images_beyond_the_limits_are_refused_by_their_header(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge.png has more than 178 million pixels"):
        open_image(tmp_path / "huge.png", "row")
    with (tmp_path / "large.bmp").open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # a hole, which takes no space
    with pytest.raises(DataError, match=r"large.bmp is larger than 512 MiB"):
        open_image(tmp_path / "large.bmp", "row")


def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    """S5: reading it would block."""
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png is not a regular file"):
        open_image(tmp_path / "pipe.png", "row")
    assert image_files(tmp_path) == []


def test_a_zip_member_larger_than_an_image_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """S4: by what the archive says, and by what is inside where the archive says less."""
    file = tmp_path / "images.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.bmp", bytes(20_000_000))
    store = FileStore(file)
    located = store.locate(Row("row", "bomb.bmp", "", ""))
    assert located.span is not None
    for size, message in ((8 << 30, "larger than 512 MiB"), (1000, "1001 bytes where the archive says 1000")):
        with pytest.raises(DataError, match=rf"row: image bomb.bmp: .*{message}"):
            store.open(Row("row", "bomb.bmp", "", "", archive=".", span=(*located.span[:3], size)))


def test_a_table_names_files_of_its_own_data_set_only(tmp_path: Path) -> None:
    """S5: a path from a stranger's Parquet file is read below the data set's folder, and nowhere else."""
    (tmp_path / "data").mkdir()
    assert open_cell({"bytes": None, "path": "a.png"}, tmp_path / "data", "row 1") == tmp_path / "data" / "a.png"
    for path in ("/etc/passwd", "../a.png", str(tmp_path / "a.png")):
        with pytest.raises(DataError, match="row 1 is a file outside the data set"):
            open_cell({"bytes": None, "path": path}, tmp_path / "data", "row 1")
    for cell in (None, {"bytes": None, "path": None}):
        with pytest.raises(DataError, match="row 1 is missing"):
            open_cell(cell, None, "row 1")


def test_a_folder_is_listed_by_what_its_files_are(tmp_path: Path) -> None:
    """W7: images of any name are found; the rest, links to folders among it, is listed and counted."""
    image = Image.new("RGB", (8, 8), RED)
    (tmp_path / "sub").mkdir()
    for name, kind in (("a.JPG", "JPEG"), ("b.jfif", "JPEG"), ("sub/none", "PNG"), ("odd.data", "WEBP")):
        image.save(tmp_path / name, kind)
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "notes.txt").write_text("P6 is a format")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    (tmp_path / "linked").symlink_to(tmp_path / "sub")
    listing = list_folder(tmp_path)
    names = [f.relative_to(tmp_path).as_posix() for f in listing.images]
    assert names == ["a.JPG", "b.jfif", "odd.data", "sub/none"]
    assert listing.not_read() == {
        "files": {"count": 3, "first": ["c.heic", "gone.png", "notes.txt"]},
        "linked_folders": {"count": 1, "first": ["linked"]},
    }


def test_a_name_that_is_not_utf8_is_refused_before_any_work(tmp_path: Path) -> None:
    """W8: features and rows are stored by name, so it would fail at the end."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png"))
    with pytest.raises(DataError, match=r"the file name caf\\udce9.png is not UTF-8; rename") as caught:
        image_files(tmp_path)
    str(caught.value).encode()
