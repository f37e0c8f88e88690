"""Masks: images with the class id of each pixel, found in folders, archives and data sets of the Hub."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from PIL import Image

from pivot_hub.config.yaml_loader import parse_yaml
from pivot_hub.data.image import IMAGE_SUFFIXES, decode_image, open_stored
from pivot_hub.data.image_store import ARCHIVES, archive_members, open_cell, read_member
from pivot_hub.data.row import Span
from pivot_hub.data.synthetic import Split
from pivot_hub.errors import DataError, ProbeError

# Names of a data set's own parts, and of the folder or the column of its masks.
PARTS = {
    "train": ("train", "training", "train2017"),
    "val": ("val", "valid", "validation", "val2017"),
    "test": ("test", "testing"),
}
_PART_NAMES = {name for names in PARTS.values() for name in names}
MASKS = ("masks", "annotations", "labels")
COLUMNS = ("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "semantic_segmentation")
ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # of PIL: one whole number a pixel
VOID = 255  # what most data sets write where no class is known


class Stored(Protocol):
    """Where a picture's bytes are; its text names it in messages."""

    def open(self) -> Path | io.BytesIO: ...

    def stamp(self) -> tuple[Any, ...]:
        """What changes when the picture does, found without reading it."""


@dataclass(frozen=True)
class File:
    """A file, or the member of an archive that stays packed.

    Args:
        name: from the data set's folder, so that no message or record holds the path to it.
        path: of the file or the archive.
        span: where it lies in the archive.
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
    """One picture of a data set's table."""

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
class Pair:
    """An image and its mask, neither read before it is asked for.

    Args:
        name: of the image in its data set, the same wherever that lies.
    """

    name: str
    image: Stored
    mask: Stored

    def open_image(self) -> Image.Image:
        """The image as RGB; DataError where it is not whole."""
        return decode_image_of(self.image)

    def open_ids(self) -> np.ndarray:
        """Class ids (height, width) int32; DataError where they are none."""
        return decode_ids(self.mask)


@dataclass(frozen=True)
class MaskData:
    """Pairs in the parts a probe takes them in.

    Args:
        name: of the data set.
        parts: settings are chosen on validation; test is what is reported.
        reported: the data set's own name of the test part.
        ignored: ids that count nowhere, by the layout's convention.
        classes: how many ids there are, where the layout fixes it.
        names: of ids, where the data set holds them.
        unpaired: a sentence for each file that was left out for want of a partner.
    """

    name: str
    parts: Mapping[Split, Sequence[Pair]]
    reported: str
    ignored: frozenset[int] = frozenset({VOID})
    classes: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    unpaired: Sequence[str] = ()


def open_masks(data: str | Path, masks: str | Path | None = None, seed: int = 0, on_bad_row: str = "stop") -> MaskData:
    """Find the images and masks of a data set; no picture is opened.

    Layouts: `images/` and `masks/` (or `annotations/`, `labels/`), in each of them `train/` and `val/` (or `training/`,
    `validation/`) or no parts; CamVid's `train/`, `trainannot/`, `val/`, `valannot/`; Parquet as the datasets library
    writes it. A folder, a .zip or a .tar of it. Image and mask have one name, but for its suffix. Where there is a val
    part it is reported, and train is cut into 4/5 and 1/5 for validation; a test part stands in where there is no val.
    Where there are no parts, images are dealt 3/1/1 by the seed.

    SceneParse (ADEChallengeData2016) is `images/training` and `annotations/training`: 151 ids, of which 0 is "other"
    and ignored.

    Args:
        data: folder, archive, or Hub name.
        masks: folder or archive of the masks, where `data` holds the images alone.
        seed: of the split.
        on_bad_row: stop at a file without its partner, or skip it.

    Raises:
        ProbeError: there is no such data, or no layout that is known.
        DataError: a file has no partner, or two have one name, and `on_bad_row` says stop.
    """
    place = Path(data)
    if masks is not None:
        return _paired(place, _files(place), _files(Path(masks)), seed, on_bad_row)
    if not place.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)):
        return _tables(str(data), seed)
    files = _files(place)
    if not any(_is_picture(name) for name in files) and any(name.endswith(".parquet") for name in files):
        return _tables(str(data), seed)
    found = _paired(place, *_roots(place, files), seed, on_bad_row)
    if any(name.startswith("annotations/training/") for name in files):
        names = _scene_parse_names(files.get("objectInfo150.txt"))
        return MaskData(found.name, found.parts, found.reported, frozenset({0, VOID}), 151, names, found.unpaired)
    return found


def read_names(file: str | Path) -> dict[int, str]:
    """Names of class ids from a file.

    Args:
        file: .txt with a name a line, the first of id 0; .json or .yaml with a list, or with names by id, by itself or
            under `classes`, `names` or `id2label`.

    Raises:
        ProbeError: it is none of these.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        found = text.splitlines() if path.suffix == ".txt" else parse_yaml(text, path.name, DataError)[0]
        if isinstance(found, dict):
            found = next((found[k] for k in ("classes", "names", "id2label") if k in found), found)
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        return {int(i): str(name).strip() for i, name in pairs}
    except (OSError, ValueError, TypeError, DataError) as error:
        reason = str(error).splitlines()[0]
        raise ProbeError(
            f"{path}: no names of classes can be read ({reason}); give a name a line, or a list or mapping by id."
        ) from error


def decode_image_of(stored: Stored) -> Image.Image:
    """A stored picture as RGB.

    Raises:
        DataError: it is missing or not a whole image.
    """
    try:
        return decode_image(stored.open(), "image", str(stored))
    except FileNotFoundError:
        raise DataError(f"image {stored} does not exist; fetch it again.") from None


def decode_ids(stored: Stored) -> np.ndarray:
    """Class ids of a stored mask: (height, width) int32. Of a palette picture the indices are the ids, not the colours.

    Raises:
        DataError: it is missing, not a whole picture, in colour, or a JPEG.
    """
    try:
        with open_stored(stored.open(), f"mask {stored}") as picture:
            if picture.mode not in ID_MODES:
                raise DataError(
                    f"mask {stored} is a picture in colour ({picture.mode}), not class ids; write the id of each "
                    "pixel's colour as a grey or palette PNG."
                )
            if picture.format == "JPEG":
                raise DataError(f"mask {stored} is a JPEG, which blurs ids; write masks as PNG.")
            ids = np.asarray(picture).astype(np.int32)
            if ids.min() < 0:
                raise DataError(f"mask {stored} holds the negative id {ids.min()}; write ids as whole numbers from 0.")
            return ids
    except FileNotFoundError:
        raise DataError(f"mask {stored} does not exist; fetch it again.") from None


def _files(place: Path) -> dict[str, File]:
    """Files below a folder or in an archive, by their names from there, sorted; one folder around all is left out."""
    if place.is_dir():
        names = {f.relative_to(place).as_posix(): f for f in place.rglob("*") if f.is_file()}
        found = {name: File(name, f) for name, f in names.items()}
    elif place.is_file() and place.suffix in ARCHIVES:
        members = archive_members(place)
        tops = {name.split("/")[0] for name in members if _is_picture(name)}
        top = f"{tops.pop()}/" if len(tops) == 1 and not tops & _PART_NAMES else ""
        found = {n.removeprefix(top): File(n, place, span) for n, span in members.items() if n.startswith(top)}
    else:
        raise ProbeError(
            f"{place} is no folder, .zip or .tar, and no name of a Hub data set; give one that holds images and masks."
        )
    if not found:
        raise ProbeError(f"{place} is empty; give a folder with images and masks.")
    return dict(sorted(found.items()))


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not PurePosixPath(name).name.startswith(".")


def _roots(place: Path, files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, File]]:
    """Images and masks of a layout, each by name from its own root."""
    tops = {n.split("/")[0] for n in files if "/" in n and _is_picture(n)}
    for name in MASKS:
        if {"images", name} <= tops:
            return _below("images/", files), _below(f"{name}/", files)
    images = {n: f for n, f in files.items() if f"{n.split('/')[0]}annot" in tops}
    if images:
        masks = {n.replace("annot/", "/", 1): f for n, f in files.items() if n.split("/")[0].endswith("annot")}
        return images, masks
    raise ProbeError(
        f"{place}: no layout of images and masks is known in it; name its folders images and masks (or annotations), "
        "or train, trainannot, val and valannot, or give the masks apart with --masks."
    )


def _below(root: str, files: Mapping[str, File]) -> dict[str, File]:
    return {n.removeprefix(root): f for n, f in files.items() if n.startswith(root)}


def _paired(place: Path, images: Mapping[str, File], masks: Mapping[str, File], seed: int, on_bad_row: str) -> MaskData:
    """Images and masks of one name, in parts where the first folder of the names says so."""
    shown, labels = _by_stem(images), _by_stem(masks)
    if "test" in {_part(n) for n in shown} - {_part(n) for n in labels}:  # as published: images without answers
        shown = {n: f for n, f in shown.items() if _part(n) != "test"}
    common = shown.keys() & labels.keys()
    if not common:
        raise ProbeError(f"{place}: no image and no mask have one name; name each mask as its image, the suffix apart.")
    unpaired = [f"image {f} has no mask" for n, f in shown.items() if n not in common]
    unpaired += [f"mask {f} has no image" for n, f in labels.items() if n not in common]
    if unpaired and on_bad_row == "stop":
        more = f" (and {len(unpaired) - 1} files like it)" if len(unpaired) > 1 else ""
        raise DataError(f"{unpaired[0]}{more}; add what is missing, or leave such files out with --on-bad-row skip.")
    pairs = {n: Pair(n, shown[n], labels[n]) for n in sorted(common)}
    parts: dict[str, list[Pair]] = {}
    for name, pair in pairs.items():
        parts.setdefault(_part(name) or "", []).append(pair)
    if "" in parts:  # folders that are no parts
        parts = {"": list(pairs.values())}
    return MaskData(_set_name(place), *_dealt(place.name, parts, seed), unpaired=unpaired)


def _by_stem(files: Mapping[str, File]) -> dict[str, File]:
    made: dict[str, File] = {}
    for name, file in files.items():
        if not _is_picture(name):
            continue
        stem = str(PurePosixPath(name).with_suffix(""))
        if stem in made:
            raise DataError(f"{made[stem]} and {file} have one name; remove or rename one.")
        made[stem] = file
    return made


def _part(name: str) -> str | None:
    """Which part a name's first folder says; None where it says none."""
    top = name.split("/")[0] if "/" in name else ""
    return next((part for part, names in PARTS.items() if top in names), None)


def _dealt(place: str, found: Mapping[str, Sequence[Pair]], seed: int) -> tuple[dict[Split, Sequence[Pair]], str]:
    """Train, validation and test, and what the data set calls the latter."""
    reported = next((p for p in ("val", "test") if p in found and "train" in found), None)
    rng = np.random.default_rng(seed)
    pairs = list(found["train"]) if reported else [p for some in found.values() for p in some]
    least = 2 if reported else 5
    if len(pairs) < least:
        raise ProbeError(f"{place}: {len(pairs)} images with masks to fit on; a probe needs at least {least}.")
    order = [int(i) for i in rng.permutation(len(pairs))]
    fifth = max(1, len(order) // 5)
    cuts: dict[Split, list[int]] = {"validation": order[:fifth], "train": order[fifth:]}
    if reported is None:
        cuts = {"test": order[:fifth], "validation": order[fifth : 2 * fifth], "train": order[2 * fifth :]}
    parts: dict[Split, Sequence[Pair]] = {split: [pairs[i] for i in sorted(rows)] for split, rows in cuts.items()}
    return ({**parts, "test": found[reported]}, reported) if reported else (parts, "test")


def _set_name(place: Path) -> str:
    """A folder's name that tells its data set, without the path to it."""
    full = place.resolve()
    names = [full.stem if full.is_file() else full.name, *(p.name for p in full.parents)]
    return next(n for n in names if n not in {"images", *_PART_NAMES})


def _scene_parse_names(file: File | None) -> dict[int, str]:
    """Names of the 150 classes from the list that comes with the release: `Idx Ratio Train Val Stuff Name`, by tabs."""
    if file is None:
        return {}
    opened = file.open()
    text = opened.read_text() if isinstance(opened, Path) else opened.read().decode()
    rows = [line.split("\t") for line in text.splitlines()]
    return {int(r[0]): r[-1].split(",")[0].strip() for r in rows if len(r) > 1 and r[0].strip().isdigit()}


def _tables(data: str, seed: int) -> MaskData:
    """Pairs of a data set with an image column and a mask column: of the Hub, or a folder of its Parquet files."""
    try:
        loaded = load_dataset(data)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ProbeError(
            f"{data}: no data set can be loaded ({reason}); give a folder, or a Hub name in reach."
        ) from error
    assert isinstance(loaded, DatasetDict)
    found = {_part(f"{name}/") or str(name): _table_pairs(str(name), table, data) for name, table in loaded.items()}
    return MaskData(data.rstrip("/").split("/")[-1], *_dealt(data, found, seed))


def _table_pairs(split: str, table: Dataset, data: str) -> list[Pair]:
    pictures = [n for n, kind in table.features.items() if isinstance(kind, ImageFeature)]
    masks = [n for n in pictures if n in COLUMNS]
    images = [n for n in pictures if n not in masks]
    if len(masks) != 1 or not images:
        raise ProbeError(
            f"{data}: its picture columns are {', '.join(pictures) or 'none'}; a probe needs an image and one mask, "
            f"named one of {', '.join(COLUMNS)}."
        )
    column = "image" if "image" in images else images[0]
    for name in (column, masks[0]):
        table = table.cast_column(name, ImageFeature(decode=False))
    image_table, mask_table = table.select_columns([column]), table.select_columns([masks[0]])
    place, folder = f"{Path(data).name} ({split})", Path(data) if Path(data).is_dir() else None
    return [
        Pair(f"{split}/{i}", Cell(image_table, i, column, place, folder), Cell(mask_table, i, masks[0], place, folder))
        for i in range(len(table))
    ]


def ids_within(ids: np.ndarray, classes: int, ignored: Iterable[int], name: str) -> np.ndarray:
    """Ids with -1 in place of those that are ignored.

    Raises:
        ProbeError: an id is beyond the class count; it names the mask.
    """
    made = np.where(np.isin(ids, list(ignored)), np.int32(-1), ids)
    if (highest := int(made.max(initial=-1))) >= classes:
        raise ProbeError(
            f"mask of {name} holds id {highest}, but {classes} classes have ids 0 to {classes - 1}; give their number "
            "with --classes, or leave the id out with --ignore."
        )
    return made
