"""Regions: where each class lies in the photos of a folder, from YOLO labels, COCO boxes or id masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from pivot_hub.data.image import image_files, open_image
from pivot_hub.errors import DataError

NAME_FILES = ("config.yaml", "data.yaml")  # of lightly-train and of ultralytics
ID_MODES = {"1", "L", "P", "I", "I;16"}  # an image of one channel, whose values are ids
Size = tuple[int, int]  # width, height in px
Shapes = dict[str, list[np.ndarray]]  # class name to corners in px: (2, 2) of a box, (k, 2) of a polygon


@dataclass(frozen=True)
class Photo:
    """A photo and its regions.

    Args:
        file: of the photo.
        name: its path below the folder.
        regions: for each class name, what draws the union of its instances: (H, W) bool, of the photo's size.
    """

    file: Path
    name: str
    regions: Mapping[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Names:
    """Class names by id, and the file they are from."""

    file: Path
    by_id: Mapping[int, str]


def read_photos(
    folder: Path,
    boxes: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    ignore: Sequence[int] = (255,),
    on_bad_row: str = "stop",
) -> tuple[list[Photo], list[str]]:
    """Read a folder of photos with their regions; every photo is decoded, so that training or probing meets no bad one.

    Args:
        folder: photos, in it and below it; where it has a folder `images`, in and below that. With neither boxes nor
            masks its folder `labels` has the boxes, as YOLO lays it out.
        boxes: a folder of YOLO label files at the photos' relative paths, or a COCO JSON file.
        masks: a folder of id masks at the photos' relative paths.
        names: YAML file with `names` (or `classes`) by id; otherwise looked for beside the labels, then above them.
        ignore: ids of masks that are no class.
        on_bad_row: stop at a bad photo or label, or skip the photo.

    Returns:
        The photos that have a region, and a sentence for each that was left out.

    Raises:
        DataError: an input is missing or bad; the sentence names file and line.
    """
    if on_bad_row not in ("stop", "skip"):
        raise DataError(f"on_bad_row is {on_bad_row!r}: it is stop or skip.")
    if boxes is not None and masks is not None:
        raise DataError("boxes and masks are two answers to one question: give one of them.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder of photos.")
    if boxes is None and masks is None:
        boxes = folder / "labels"
        if not boxes.is_dir():
            raise DataError(f"{folder} has no labels folder: give --boxes or --masks.")
    folder = folder / "images" if (folder / "images").is_dir() else folder
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder} holds no image; give a folder of photos.")
    if boxes is not None and boxes.is_file():
        regions_of = _coco(boxes, folder)
    elif boxes is not None:
        regions_of = partial(_yolo, boxes, _names(names, boxes, folder))
    else:
        assert masks is not None
        regions_of = partial(_ids, masks, _names(names, masks, folder), frozenset(ignore))
    photos, left_out = [], []
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            regions = regions_of(Path(name), open_image(file, name).size)
        except DataError as error:
            if on_bad_row == "stop":
                raise
            left_out.append(str(error))
            continue
        if regions:
            photos.append(Photo(file, name, regions))
        else:
            left_out.append(f"{name}: has no labels.")
    if not photos:
        raise DataError(f"no photo of {folder} has labels in {boxes or masks}, the first: {left_out[0]}")
    return photos, left_out


def _names(file: Path | None, labels: Path, folder: Path) -> Names:
    """Read the class names of the labels; ids mean other things in other folders, so the nearest file counts."""
    if file is None:
        near = [labels, *labels.absolute().parents[:2], folder]
        file = next((d / n for d in near for n in NAME_FILES if (d / n).is_file()), None)
    if file is None:
        raise DataError(f"{labels}: no {' or '.join(NAME_FILES)} beside it says what its ids mean; give --names.")
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(
            f"{file}: cannot be read ({str(error).splitlines()[0]}); give a YAML file with names."
        ) from None
    said = stored.get("names", stored.get("classes")) if isinstance(stored, dict) else None
    by_id = dict(enumerate(said)) if isinstance(said, list) else said
    if not isinstance(by_id, dict) or not all(isinstance(i, int) and isinstance(n, str) for i, n in by_id.items()):
        raise DataError(f"{file}: has no names; give `names`, a list or a mapping of ids to names.")
    return Names(file, by_id)


def _name(names: Names, number: float, where: str) -> str:
    if number not in names.by_id:
        raise DataError(
            f"{where}: class id {number:g} has no name in {names.file}; give --names the file of these very labels."
        )
    return names.by_id[int(number)]


def _yolo(labels: Path, names: Names, name: Path, size: Size) -> dict[str, Callable[[], np.ndarray]]:
    """Regions of one label file: `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...` a line, in shares of the sides."""
    file = labels / name.with_suffix(".txt")
    if not file.is_file():
        return {}
    shapes: Shapes = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            label, *shares = (float(field) for field in line.split())
        except ValueError:
            raise DataError(f"{where}: {line.strip()[:40]!r} is not all numbers; mend or remove the line.") from None
        if len(shares) == 4:
            (x, y, w, h) = shares
            corners = np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]])
        elif len(shares) >= 6 and len(shares) % 2 == 0:
            corners = np.array(shares).reshape(-1, 2)
        else:
            raise DataError(
                f"{where}: has {1 + len(shares)} numbers; a box is `class cx cy w h`, a polygon "
                "`class x1 y1 x2 y2 x3 y3 ...`."
            )
        kept = _inside(corners * size, size, where)
        shapes.setdefault(_name(names, label, where), []).append(kept)
    if not shapes:
        raise DataError(f"{file} is empty: remove it with its photo, or skip bad rows.")
    return _drawn(shapes, size)


def _coco(file: Path, folder: Path) -> Callable[[Path, Size], dict[str, Callable[[], np.ndarray]]]:
    """Read a COCO file of boxes; what is returned gives the regions of one photo."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        names = {c["id"]: str(c["name"]) for c in stored["categories"]}
        images = {i["id"]: i for i in stored["images"]}
        boxes: dict[Any, list[dict[str, Any]]] = {number: [] for number in images}
        for annotation in stored["annotations"]:
            boxes[annotation["image_id"]].append(annotation)
        by_file = {str(i["file_name"]): number for number, i in images.items()}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file}: is not COCO's JSON ({error}); give a file with images, annotations, categories."
        ) from None
    except KeyError as error:
        raise DataError(f"{file}: is not COCO's JSON: there is no {error}; give its file of instances.") from None

    def regions(name: Path, size: Size) -> dict[str, Callable[[], np.ndarray]]:
        number = by_file.get(name.as_posix(), by_file.get(name.name))
        if number is None:
            return {}
        said = (images[number].get("width", size[0]), images[number].get("height", size[1]))
        if said != size:
            raise DataError(f"{folder / name} is {_by(size)} and {_by(said)} in {file}; give the photos of this file.")
        shapes: Shapes = {}
        for annotation in boxes[number]:
            where = f"{file}, annotation {annotation.get('id')}"
            if annotation.get("category_id") not in names:
                raise DataError(f"{where}: class id {annotation.get('category_id')} has no name in its categories.")
            try:
                x, y, w, h = (float(v) for v in annotation["bbox"])
            except (KeyError, TypeError, ValueError):
                raise DataError(f"{where}: has no bbox of four numbers; give COCO's file of instances.") from None
            kept = _inside(np.array([[x, y], [x + w, y + h]]), size, where)
            shapes.setdefault(names[annotation["category_id"]], []).append(kept)
        return _drawn(shapes, size)

    return regions


def _ids(
    masks: Path, names: Names, ignore: frozenset[int], name: Path, size: Size
) -> dict[str, Callable[[], np.ndarray]]:
    """Regions of one id mask, a PNG at the photo's path."""
    file = masks / name.with_suffix(".png")
    if not file.is_file():
        return {}
    ids = _read_ids(file)
    if ids.shape[::-1] != size:
        raise DataError(f"{file} is {_by(ids.shape[::-1])} and its photo {_by(size)}; give masks of the photos' sizes.")
    found = [int(i) for i in np.unique(ids) if int(i) not in ignore]
    return {_name(names, i, str(file)): partial(_where_id, file, i) for i in found}


def _read_ids(file: Path) -> np.ndarray:
    try:
        with Image.open(file) as stored:
            if stored.mode not in ID_MODES:
                raise DataError(f"{file} is a {stored.mode} picture, not ids; give masks of one channel.")
            return np.asarray(stored).astype(np.int64)
    except OSError as error:
        raise DataError(f"{file} cannot be decoded ({error}); replace the file.") from None


def _where_id(file: Path, number: int) -> np.ndarray:
    return _read_ids(file) == number


def _inside(corners: np.ndarray, size: Size, where: str) -> np.ndarray:
    """Corners in px, cut to the image; more than a pixel beyond it is an error, less is rounding."""
    low, high = corners.min(0), corners.max(0)
    if not np.isfinite(corners).all() or (low < -1).any() or (high > np.array(size) + 1).any():
        raise DataError(
            f"{where}: reaches from ({low[0]:.0f}, {low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}), outside of the "
            f"photo's {_by(size)} pixels; mend the line, or give the labels of these photos."
        )
    if (high <= low).any():
        raise DataError(f"{where}: has no width or no height; mend or remove the line.")
    return corners.clip(0, size)


def _drawn(shapes: Shapes, size: Size) -> dict[str, Callable[[], np.ndarray]]:
    return {name: partial(_union, some, size) for name, some in shapes.items()}


def _union(shapes: Sequence[np.ndarray], size: Size) -> np.ndarray:
    """Every pixel that a box touches or a polygon covers: (H, W) bool."""
    sheet = Image.new("1", size)
    draw = ImageDraw.Draw(sheet)
    for corners in shapes:
        if len(corners) > 2:
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=1)
    mask = np.array(sheet, bool)
    for (x0, y0), (x1, y1) in _boxes(shapes):
        mask[y0:y1, x0:x1] = True
    return mask


def _boxes(shapes: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for corners in shapes:
        if len(corners) == 2:
            yield np.stack([np.floor(corners[0]), np.ceil(corners[1])]).astype(int)


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"
