"""Images with id masks, which hold the class id of each pixel, from folders, archives and Hub data sets."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from datasets import Dataset
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.config.yaml_loader import parse_yaml
from pivot_hub.data.image import IMAGE_SUFFIXES, decode_image, open_stored
from pivot_hub.data.image_store import ARCHIVES, archive_members, open_cell, read_member
from pivot_hub.data.row import Span
from pivot_hub.data.synthetic import Split
from pivot_hub.data.tables import image_columns, is_table, load_tables
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.probes.parts import Part, find_parts, is_hidden, part_of

MASKS = ("masks", "annotations", "labels")
COLUMNS = ("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "semantic_segmentation")
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # PIL modes with one whole number per pixel
VOID = 255  # id that most data sets use for pixels without a class


class Stored(Protocol):
    """Location of an image's bytes; its string names it in messages."""

    def open(self) -> Path | io.BytesIO: ...

    def stamp(self) -> tuple[Any, ...]:
        """Return a key that changes when the image changes, without reading the image."""


@dataclass(frozen=True)
class File:
    """A file, or a member of an archive that stays packed.

    Args:
        name: Path below the data set's folder, so that no message or record contains the path of that folder.
        path: Path of the file or of the archive.
        span: Position in the archive, None for a file.
    """

    name: str
    path: Path
    span: Span | None = None

    def open(self) -> Path | io.BytesIO:
        if self.span is None:
            return self.path
        try:
            return io.BytesIO(read_member(self.path, self.span))
        except DataError as error:
            raise DataError(f"{self}: {error}") from error

    def stamp(self) -> tuple[Any, ...]:
        return self.name, self.span, self.path.stat().st_size, self.path.stat().st_mtime_ns

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cell:
    """One image in a table of a data set."""

    table: Dataset = field(repr=False)
    row: int
    column: str
    place: str
    folder: Path | None = None  # of a local data set

    def open(self) -> Path | io.BytesIO:
        return open_cell(self.table[self.row][self.column], self.folder, str(self))

    def stamp(self) -> tuple[Any, ...]:
        return self.table._fingerprint, self.row, self.column

    def __str__(self) -> str:
        return f"{self.column} of row {self.row} of {self.place}"


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask; each is read only when it is opened.

    Args:
        name: Name of the image in its data set, which does not depend on where the data set is stored.
        image: Location of the image.
        mask: Location of the mask.
    """

    name: str
    image: Stored
    mask: Stored

    def open_image(self) -> Image.Image:
        """Read the image as RGB, see `decode_image_of`."""
        return decode_image_of(self.image)

    def image_digest(self) -> bytes:
        """Return the SHA-256 of the image's file."""
        opened = self.image.open()
        return hashlib.sha256(opened.read_bytes() if isinstance(opened, Path) else opened.read()).digest()

    def open_ids(self) -> np.ndarray:
        """Read the class ids (height, width) int32, see `decode_ids`."""
        return decode_ids(self.mask)


@dataclass(frozen=True)
class MaskData:
    """Masked images of a data set in the parts that a probe uses.

    Args:
        name: Name of the data set.
        parts: Masked images by split. Settings are chosen on validation; test is reported.
        reported: The data set's own name of the test part.
        ignored: Ids that are never counted, by the convention of the layout.
        classes: Number of ids, if the layout fixes it.
        names: Names of ids, if the data set has them.
        unpaired: One message for each file that was left out because its image or mask is missing.
    """

    name: str
    parts: Mapping[Split, Sequence[MaskedImage]]
    reported: str
    ignored: frozenset[int] = frozenset({VOID})
    classes: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    unpaired: Sequence[str] = ()


def open_masks(
    data: str | Path, masks: str | Path | None = None, seed: int = 0, on_bad_row: OnBadRow | str = OnBadRow.STOP
) -> MaskData:
    """Find the images and masks of a data set, without opening an image.

    The data are a folder, a .zip or a .tar in one of these layouts:

    - `images/` and `masks/` (or `annotations/`, `labels/`), each with `train/` and `val/` (or `training/`,
      `validation/`) or without parts;
    - `train/`, `trainannot/`, `val/`, `valannot/`, as in CamVid;
    - Parquet files, or a folder that `save_to_disk` wrote, with an image and a mask column.

    An image and its mask have the same name except for the suffix. If there is a val part, it is reported, and a fifth
    of train becomes the validation split. Without a val part, a test part is used in its place. Without any parts, the
    images are split 3/1/1 by the seed.

    SceneParse (ADEChallengeData2016) is recognised by `images/training` and `annotations/training`. It has 151 ids, of
    which 0 is "other" and ignored.

    Args:
        data: Folder, archive, or Hub name.
        masks: Folder or archive of the masks, if `data` contains only the images.
        seed: Seed of the split.
        on_bad_row: Whether an image without mask or a mask without image raises an error, or is skipped and reported.

    Raises:
        ProbeError: There is no such data, or its layout is unknown.
        DataError: A mask or an image is missing and `on_bad_row` is STOP, or two files have the same name.
    """
    on_bad_row = OnBadRow.parse(on_bad_row)
    place = Path(data)
    if masks is not None:
        return _paired(place, _files(place), _files(Path(masks)), seed, on_bad_row)
    if not place.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)):
        return _tables(str(data), seed)
    if is_table(place):
        return _tables(str(data), seed)
    files = _files(place)
    paired = _paired(place, *_roots(place, files), seed, on_bad_row)
    if any(name.startswith("annotations/training/") for name in files):
        names = _scene_parse_names(files.get("objectInfo150.txt"))
        return replace(paired, ignored=frozenset({0, VOID}), classes=151, names=names)
    return paired


def read_names(file: str | Path) -> dict[int, str]:
    """Read the names of class ids from a file.

    Args:
        file: A .txt file with one name per line, the first for id 0. Or a .json or .yaml file with a list or with names
            by id, either at the top level or under `classes`, `names` or `id2label`.

    Raises:
        ProbeError: The file has none of these forms.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        names = text.splitlines() if path.suffix == ".txt" else parse_yaml(text, path.name, DataError)[0]
        if isinstance(names, dict):
            names = next((names[k] for k in ("classes", "names", "id2label") if k in names), names)
        items = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(i): str(name).strip() for i, name in items}
    except (OSError, ValueError, TypeError, DataError) as error:
        reason = str(error).splitlines()[0]
        raise ProbeError(
            f"{path}: no names of classes can be read ({reason}); give one name per line, or a list or a mapping by id."
        ) from error


def decode_image_of(stored: Stored) -> Image.Image:
    """Read a stored image as RGB.

    Raises:
        DataError: The image is missing or incomplete.
    """
    try:
        return decode_image(stored.open(), "image", str(stored))
    except FileNotFoundError:
        raise DataError(f"image {stored} does not exist; fetch it again.") from None


def decode_ids(stored: Stored) -> np.ndarray:
    """Read the class ids of a stored mask: (height, width) int32. In a palette image the palette indices are the ids.

    Raises:
        DataError: The mask is missing, incomplete, in colour, or a JPEG.
    """
    try:
        with open_stored(stored.open(), f"mask {stored}") as mask:
            if mask.mode not in ID_MODES:
                raise DataError(
                    f"mask {stored} is an image in colour ({mask.mode}), not class ids; write the id of each "
                    "pixel's colour as a grey or palette PNG."
                )
            if mask.format == "JPEG":
                raise DataError(f"mask {stored} is a JPEG, which blurs ids; write masks as PNG.")
            ids = np.asarray(mask).astype(np.int32)
            if ids.min() < 0:
                raise DataError(f"mask {stored} holds the negative id {ids.min()}; write ids as whole numbers from 0.")
            return ids
    except FileNotFoundError:
        raise DataError(f"mask {stored} does not exist; fetch it again.") from None


def _files(place: Path) -> dict[str, File]:
    """List the files below a folder or in an archive by relative name, sorted.

    A single folder that wraps all images of an archive is removed from the names.
    """
    if place.is_dir():
        paths = {f.relative_to(place).as_posix(): f for f in place.rglob("*") if f.is_file()}
        names = {name: f for name, f in paths.items() if not is_hidden(name)}
        files = {name: File(name, f) for name, f in names.items()}
    elif place.is_file() and place.suffix in ARCHIVES:
        members = {name: span for name, span in archive_members(place).items() if not is_hidden(name)}
        tops = {name.split("/")[0] for name in members if _is_image(name)}
        top = f"{tops.pop()}/" if len(tops) == 1 and not any(map(part_of, tops)) else ""
        files = {n.removeprefix(top): File(n, place, span) for n, span in members.items() if n.startswith(top)}
    else:
        raise ProbeError(
            f"{place} is no folder, .zip or .tar, and no name of a Hub data set; give one that holds images and masks."
        )
    if not files:
        raise ProbeError(f"{place} is empty; give a folder with images and masks.")
    return dict(sorted(files.items()))


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith(".")


def _roots(place: Path, files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, File]]:
    """Find the images and the masks of a layout, each by the name below its own root."""
    tops = {n.split("/")[0] for n in files if "/" in n and _is_image(n)}
    for name in MASKS:
        if {"images", name} <= tops:
            return _below("images/", files), _below(f"{name}/", files)
    images = {n: f for n, f in files.items() if f"{n.split('/')[0]}annot" in tops}
    if images:
        masks = {n.replace("annot/", "/", 1): f for n, f in files.items() if n.split("/")[0].endswith("annot")}
        return images, masks
    raise ProbeError(
        f"{place}: its layout of images and masks is unknown; name its folders images and masks (or annotations), "
        "or train, trainannot, val and valannot, or give the masks with --masks. Masks are PNG files of class ids; "
        "polygons and boxes (COCO, VOC XML, LabelMe) have to be drawn as such."
    )


def _below(root: str, files: Mapping[str, File]) -> dict[str, File]:
    return {n.removeprefix(root): f for n, f in files.items() if n.startswith(root)}


def _paired(
    place: Path, images: Mapping[str, File], masks: Mapping[str, File], seed: int, on_bad_row: OnBadRow
) -> MaskData:
    """Pair images and masks of the same name, in the parts that the first folders of the names stand for."""
    image_files, mask_files = _by_stem(images), _by_stem(masks)
    # A test part is often published without its masks.
    if "test" in {_part(n) for n in image_files} - {_part(n) for n in mask_files}:
        image_files = {n: f for n, f in image_files.items() if _part(n) != "test"}
    common = image_files.keys() & mask_files.keys()
    if not common:
        raise ProbeError(
            f"{place}: no image and mask have the same name; give each mask the name of its image, except for the "
            "suffix."
        )
    unpaired = [f"image {f} has no mask" for n, f in image_files.items() if n not in common]
    unpaired += [f"mask {f} has no image" for n, f in mask_files.items() if n not in common]
    if unpaired and on_bad_row == OnBadRow.STOP:
        more = f" (and {len(unpaired) - 1} files like it)" if len(unpaired) > 1 else ""
        raise DataError(f"{unpaired[0]}{more}; add what is missing, or leave such files out with --on-bad-row skip.")
    masked = {n: MaskedImage(n, image_files[n], mask_files[n]) for n in sorted(common)}
    tops = {name.split("/")[0] if "/" in name else "." for name in masked}
    names_of_parts = find_parts(str(place), tops) if len(tops) > 1 else {}  # one part alone is split as none
    parts: dict[str, list[MaskedImage]] = {}
    for name, item in masked.items():
        parts.setdefault(_part(name) or "", []).append(item)
    if not names_of_parts:  # no folder is a part
        parts = {"": list(masked.values())}
    return MaskData(_set_name(place), *_split(place.name, parts, seed), unpaired=unpaired)


def _by_stem(files: Mapping[str, File]) -> dict[str, File]:
    """Key image files by their name without the suffix."""
    by_stem: dict[str, File] = {}
    for name, file in files.items():
        if not _is_image(name):
            continue
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in by_stem:
            raise DataError(f"{by_stem[stem]} and {file} have the same name; remove or rename one.")
        by_stem[stem] = file
    return by_stem


def _part(name: str) -> Part | None:
    """Return the part that the first folder of a name stands for, or None."""
    return part_of(name.split("/")[0]) if "/" in name else None


def _split(
    place: str, own_parts: Mapping[str, Sequence[MaskedImage]], seed: int
) -> tuple[dict[Split, Sequence[MaskedImage]], str]:
    """Split masked images into train, validation and test; also return the data set's own name of the test part."""
    reported = next((p for p in ("val", "test") if p in own_parts and "train" in own_parts), None)
    rng = np.random.default_rng(seed)
    masked = list(own_parts["train"]) if reported else [item for part in own_parts.values() for item in part]
    least = 2 if reported else 5
    if len(masked) < least:
        raise ProbeError(f"{place}: {len(masked)} images with masks to fit on; a probe needs at least {least}.")
    order = [int(i) for i in rng.permutation(len(masked))]
    fifth = max(1, len(order) // 5)
    cuts: dict[Split, list[int]] = {"validation": order[:fifth], "train": order[fifth:]}
    if reported is None:
        cuts = {"test": order[:fifth], "validation": order[fifth : 2 * fifth], "train": order[2 * fifth :]}
    parts: dict[Split, Sequence[MaskedImage]] = {
        split: [masked[i] for i in sorted(rows)] for split, rows in cuts.items()
    }
    return ({**parts, "test": own_parts[reported]}, reported) if reported else (parts, "test")


def _set_name(place: Path) -> str:
    """Return the folder name that identifies a data set, without the path to it."""
    full = place.resolve()
    names = [full.stem if full.is_file() else full.name, *(p.name for p in full.parents)]
    return next(n for n in names if n != "images" and part_of(n) is None)


def _scene_parse_names(file: File | None) -> dict[int, str]:
    """Read the names of the 150 classes from the release's tab-separated list: `Idx Ratio Train Val Stuff Name`."""
    if file is None:
        return {}
    opened = file.open()
    text = opened.read_text() if isinstance(opened, Path) else opened.read().decode()
    rows = [line.split("\t") for line in text.splitlines()]
    return {int(r[0]): r[-1].split(",")[0].strip() for r in rows if len(r) > 1 and r[0].strip().isdigit()}


def _tables(data: str, seed: int) -> MaskData:
    """Load a data set that has an image and a mask column, from the Hub or from a folder, see `load_tables`."""
    loaded = load_tables(data)
    parts = {_part(f"{name}/") or str(name): _table_rows(str(name), table, data) for name, table in loaded.items()}
    find_parts(data, map(str, loaded))
    return MaskData(data.rstrip("/").split("/")[-1], *_split(data, parts, seed))


def _table_rows(split: str, table: Dataset, data: str) -> list[MaskedImage]:
    """List the rows of one split as masked images."""
    columns = image_columns(table)
    masks = [n for n in columns if n in COLUMNS]
    images = [n for n in columns if n not in masks]
    if len(masks) != 1 or not images:
        raise ProbeError(
            f"{data}: its image columns are {', '.join(columns) or 'none'}; a probe needs an image and one mask, "
            f"named one of {', '.join(COLUMNS)}."
        )
    column = "image" if "image" in images else images[0]
    image_table, mask_table = table.select_columns([column]), table.select_columns([masks[0]])
    place, folder = f"{Path(data).name} ({split})", Path(data) if Path(data).is_dir() else None
    return [
        MaskedImage(
            f"{split}/{i}",
            Cell(image_table, i, column, place, folder),
            Cell(mask_table, i, masks[0], place, folder),
        )
        for i in range(len(table))
    ]


def ids_within(ids: np.ndarray, classes: int, ignored: Iterable[int], name: str) -> np.ndarray:
    """Replace ignored ids by -1.

    Raises:
        ProbeError: An id is not below the number of classes; the message names the mask.
    """
    kept = np.where(np.isin(ids, list(ignored)), np.int32(-1), ids)
    highest = int(kept.max(initial=-1))
    if highest >= classes:
        raise ProbeError(
            f"mask of {name} holds id {highest}, but {classes} classes have ids 0 to {classes - 1}; give their number "
            "with --classes, or leave the id out with --ignore."
        )
    return kept
