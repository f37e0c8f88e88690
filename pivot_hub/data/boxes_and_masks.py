"""Annotated images: where each class lies in the images of a folder, from YOLO, COCO or VOC labels, or id masks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.config.yaml_loader import parse_yaml
from pivot_hub.data.image import image_files, open_image, open_stored
from pivot_hub.data.row import Box, open_text
from pivot_hub.errors import DataError, shown_text

NAME_FILES = ("config.yaml", "data.yaml", "classes.txt")  # of lightly-train, of ultralytics, and of label editors
FORMATS = "YOLO's label files, COCO's JSON of instances (boxes, polygons, RLE), VOC's XML files, or --masks of ids"
VOC_CORNERS, SIDES = ("xmin", "ymin", "xmax", "ymax"), ("width", "height")
ID_MODES = {"1", "L", "P", "I", "I;16"}  # Pillow's modes of one channel, whose values are ids
Size = tuple[int, int]  # width, height in px
Regions = Mapping[str, Callable[[], np.ndarray]]  # class name to a function that draws its mask: (H, W) bool


@dataclass(frozen=True)
class Rle:
    """COCO's run-length encoding of a mask: counts of runs along columns, as numbers or compressed to text."""

    counts: list[int] | str
    size: Size

    def draw(self) -> np.ndarray:
        """Decode the mask: (H, W) bool."""
        width, height = self.size
        if isinstance(self.counts, str):
            counts: Any = {"size": [height, width], "counts": self.counts.encode()}
        else:
            counts = coco_mask.frPyObjects({"size": [height, width], "counts": self.counts}, height, width)
        return coco_mask.decode(counts).astype(bool)


Outline = np.ndarray | Rle  # corners in px: (2, 2) of a box, (k, 2) of a polygon; or a mask


@dataclass(frozen=True)
class Instance:
    """One labelled object.

    Args:
        outlines: Its outlines; none of a crowd, which is a region of many objects.
        size: Size of the image.
    """

    outlines: Sequence[Outline]
    size: Size

    @property
    def is_crowd(self) -> bool:
        return not self.outlines

    def box(self) -> Box | None:
        """Return the box around the object; None of a crowd, and of masks without a pixel."""
        return _box_of(self.outlines) if self.outlines else None

    def draw(self) -> np.ndarray:
        """Draw the object: (H, W) bool."""
        return _draw_union(self.outlines, self.size)


Instances = dict[str, list[Instance]]  # by class name


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its regions.

    Args:
        file: Image file.
        name: Path of the image below the folder.
        regions: For each class name, a function that draws the union of its instances: (H, W) bool, in the image's
            size.
        boxes: Box of each class that has one instance; none where the labels are masks of ids.
        instances: All instances of each class, crowds too; none where the labels are masks of ids.
        size: Size of the image.
    """

    file: Path
    name: str
    regions: Regions
    boxes: Mapping[str, Box]
    instances: Mapping[str, Sequence[Instance]]
    size: Size


@dataclass(frozen=True)
class Labels:
    """The labels of one image; see `AnnotatedImage`."""

    regions: Regions = field(default_factory=dict)
    boxes: Mapping[str, Box] = field(default_factory=dict)
    instances: Mapping[str, Sequence[Instance]] = field(default_factory=dict)


LabelReader = Callable[[Path, Size], Labels]  # takes an image's path below the folder, and its size


@dataclass(frozen=True)
class ClassNames:
    """Class names by id, and the file that they were read from."""

    file: Path
    by_id: Mapping[int, str]


def read_annotated_images(
    folder: Path,
    boxes: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    ignore: Sequence[int] = (255,),
    on_bad_row: OnBadRow | str = OnBadRow.STOP,
) -> tuple[list[AnnotatedImage], list[str]]:
    """Read a folder of images with their regions; every image is decoded, so that no bad one is met later.

    Args:
        folder: Folder of images at any depth. Where it has a folder `images`, only images below that are read. With
            neither boxes nor masks, its folder `labels` holds the boxes, as in YOLO's layout.
        boxes: Folder of YOLO label files or VOC XML files at the images' relative paths, or a COCO JSON file.
        masks: Folder of id masks at the images' relative paths.
        names: YAML file with `names` (or `classes`) by id; by default it is searched beside the labels, then above.
        ignore: Ids in masks that are no class.
        on_bad_row: Whether a bad image or label raises an error, or its image is skipped.

    Returns:
        The images that have a region, and the reason for each image that was skipped.

    Raises:
        DataError: An input is missing or bad; the message names file and line.
    """
    policy = OnBadRow.parse(on_bad_row)
    images: list[AnnotatedImage] = []
    skipped: list[str] = []
    for image in scan_annotated_images(folder, boxes, masks, names, ignore):
        if isinstance(image, DataError):
            if policy is OnBadRow.STOP:
                raise image
            skipped.append(str(image))
        elif image.regions:
            images.append(image)
        else:
            skipped.append(f"{image.name}: has no labels.")
    if not images:
        labels = masks or boxes or folder / "labels"
        raise DataError(f"no image of {image_folder(folder)} has labels in {labels}, the first: {skipped[0]}")
    return images, skipped


def image_folder(folder: Path) -> Path:
    """Return the folder that images are read from: a folder `images` below the given one, or else that one."""
    return folder / "images" if (folder / "images").is_dir() else folder


def scan_annotated_images(
    folder: Path,
    boxes: Path | None = None,
    masks: Path | None = None,
    names: Path | None = None,
    ignore: Sequence[int] = (255,),
) -> Iterator[AnnotatedImage | DataError]:
    """Yield every image of a folder with its regions, which may be none, or the error of a bad image or label.

    Args:
        folder: Folder of images, see `read_annotated_images`; the further arguments are described there too.
        boxes: Labels with outlines.
        masks: Folder of id masks.
        names: File of class names.
        ignore: Ids in masks that are no class.

    Raises:
        DataError: A file or folder is missing, or cannot be read as a whole.
    """
    if boxes is not None and masks is not None:
        raise DataError("Regions come from boxes or from masks, not from both: give one of them.")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder of images.")
    if boxes is None and masks is None:
        boxes = folder / "labels"
        if not boxes.is_dir():
            raise DataError(f"{folder} has no labels folder: give --boxes or --masks.")
    folder = image_folder(folder)
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder} holds no image; give a folder of images.")
    read_labels = _label_reader(folder, boxes, masks, names, ignore)
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            size = open_image(file, name).size
            labels = read_labels(Path(name), size)
        except DataError as error:
            yield error
        else:
            yield AnnotatedImage(file, name, labels.regions, labels.boxes, labels.instances, size)


def _label_reader(
    folder: Path, boxes: Path | None, masks: Path | None, names: Path | None, ignore: Sequence[int]
) -> LabelReader:
    """Open the labels, and return the function that reads those of one image."""
    if boxes is not None and boxes.is_file() and boxes.suffix.lower() != ".json":
        raise DataError(f"{boxes} is none of the formats that are read: give {FORMATS}.")
    if boxes is not None and boxes.is_file():
        return _coco_reader(boxes, folder)
    if boxes is not None:
        suffixes = {f.suffix.lower() for f in boxes.rglob("*") if f.name not in NAME_FILES}
        if ".xml" in suffixes and ".txt" not in suffixes:
            return partial(_voc_labels, boxes)
        if suffixes - {""} and ".txt" not in suffixes:
            raise DataError(f"{boxes} holds no label file of a format that is read: give {FORMATS}.")
        return partial(_yolo_labels, boxes, _read_names(names, boxes, folder))
    assert masks is not None
    return partial(_mask_labels, masks, _read_names(names, masks, folder), frozenset(ignore))


def _read_names(file: Path | None, labels: Path, folder: Path) -> ClassNames:
    """Read the class names of the labels; the nearest file counts, because ids have other meanings in other folders."""
    if file is None:
        folders = [labels, *labels.absolute().parents[:2], folder]
        file = next((f / name for f in folders for name in NAME_FILES if (f / name).is_file()), None)
    if file is None:
        raise DataError(f"{labels}: no {' or '.join(NAME_FILES)} beside it says what its ids mean; give --names.")
    try:
        if file.suffix == ".txt":
            return ClassNames(file, dict(enumerate(file.read_text(encoding="utf-8-sig").split("\n"))))
        stored, _ = parse_yaml(file.read_bytes(), str(file), DataError)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give a YAML file with names.") from None
    names = stored.get("names", stored.get("classes")) if isinstance(stored, dict) else None
    by_id = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(by_id, dict) or not all(isinstance(i, int) and isinstance(n, str) for i, n in by_id.items()):
        raise DataError(f"{file}: has no names; give `names`, a list or a mapping of ids to names.")
    return ClassNames(file, by_id)


def _name_of(names: ClassNames, class_id: float, where: str) -> str:
    if class_id not in names.by_id or not names.by_id[int(class_id)].strip():
        raise DataError(
            f"{where}: class id {class_id:g} has no name in {names.file}; give the file that belongs to these labels "
            "by --names."
        )
    return names.by_id[int(class_id)]


def _yolo_labels(labels: Path, names: ClassNames, name: Path, size: Size) -> Labels:
    """Read one label file: a line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, in shares of the sides."""
    file = labels / name.with_suffix(".txt")
    if not file.is_file():
        return Labels()
    instances: Instances = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            class_id, *shares = (float(field) for field in line.split())
        except ValueError:
            raise DataError(f"{where}: {line.strip()[:40]!r} is not all numbers; fix or remove the line.") from None
        if len(shares) == 4:
            x, y, w, h = shares
            corners = np.array([[x - w / 2, y - h / 2], [x + w / 2, y + h / 2]])
        elif len(shares) >= 6 and len(shares) % 2 == 0:
            corners = np.array(shares).reshape(-1, 2)
        else:
            raise DataError(
                f"{where}: has {1 + len(shares)} numbers; a box is `class cx cy w h`, a polygon "
                "`class x1 y1 x2 y2 x3 y3 ...`."
            )
        clipped = _clip(corners * size, size, where)
        instances.setdefault(_name_of(names, class_id, where), []).append(Instance([clipped], size))
    if not instances:
        raise DataError(f"{file} is empty: remove it with its image, or skip bad rows.")
    return _labels_of(instances, size)


def _coco_reader(file: Path, folder: Path) -> LabelReader:
    """Read a COCO file of instances, and return the function that gives the labels of one image."""
    try:
        with open_text(file) as text:
            stored = json.load(text)
        names = {c["id"]: str(c["name"]) for c in stored["categories"]}
        images = {i["id"]: i for i in stored["images"]}
        boxes: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in images}
        for annotation in stored["annotations"]:
            boxes[annotation["image_id"]].append(annotation)
        by_file = {str(image["file_name"]): image_id for image_id, image in images.items()}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"{file}: is not COCO's JSON ({shown_text(str(error))}); give a file with images, annotations, categories."
        ) from None
    except KeyError as error:
        raise DataError(f"{file}: is not COCO's JSON: there is no {error}; give its file of instances.") from None

    def read_labels(name: Path, size: Size) -> Labels:
        image_id = by_file.get(name.as_posix(), by_file.get(name.name))
        if image_id is None:
            return Labels()
        stored_size = (images[image_id].get("width", size[0]), images[image_id].get("height", size[1]))
        if stored_size != size:
            raise DataError(
                f"{folder / name} is {_format_size(size)} and {_format_size(stored_size)} in {file}; give the images "
                "of this file."
            )
        instances: Instances = {}
        for annotation in boxes[image_id]:
            where = f"{file}, annotation {annotation.get('id')}"
            class_id = annotation.get("category_id")
            if class_id not in names:
                raise DataError(f"{where}: class id {class_id} has no name in its categories.")
            # A crowd is a region of many objects, not the outline of one.
            outlines = [] if annotation.get("iscrowd") else _coco_outlines(annotation, size, where)
            instances.setdefault(names[class_id], []).append(Instance(outlines, size))
        return _labels_of(instances, size)

    return read_labels


def _coco_outlines(annotation: Mapping[str, Any], size: Size, where: str) -> list[Outline]:
    """Read the polygons, the run-length encoding (RLE) or else the box of one annotation."""
    segmentation = annotation.get("segmentation")
    try:
        if isinstance(segmentation, dict):
            height, width = (int(v) for v in segmentation["size"])
            counts = segmentation["counts"]
            if (width, height) != size:
                raise DataError(f"{where}: its RLE is {_format_size((width, height))}, its image {_format_size(size)}.")
            if not isinstance(counts, str):
                runs = [int(v) for v in counts]
                if min(runs, default=0) < 0 or sum(runs) != width * height:
                    raise ValueError
                counts = runs
            elif not counts.isascii() or not re.fullmatch("[0-o]*[0-O]", counts):  # the last number is whole
                raise ValueError
            encoded = Rle(counts, size)
            encoded.draw()  # raises a ValueError for runs that do not fit the size
            return [encoded]
        if segmentation:
            polygons = [np.array(flat, float).reshape(-1, 2) for flat in segmentation]
            if min(map(len, polygons)) < 3:
                raise ValueError
            return [_clip(corners, size, where) for corners in polygons]
        x, y, w, h = (float(v) for v in annotation["bbox"])
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: has no polygons, RLE or bbox of four numbers; give COCO's file of instances."
        ) from None
    return [_clip(np.array([[x, y], [x + w, y + h]]), size, where)]


def _voc_labels(labels: Path, name: Path, size: Size) -> Labels:
    """Read one XML file of Pascal VOC, whose corners are numbers of pixels from 1, both inside the box."""
    file = labels / name.with_suffix(".xml")
    if not file.is_file():
        return Labels()
    instances: Instances = {}
    try:
        root = ElementTree.parse(file).getroot()
        stored_size = tuple(
            int(root.findtext(f"size/{side}") or length) for side, length in zip(SIDES, size, strict=True)
        )
        boxes = [
            (found.findtext("name", "").strip(), [float(found.findtext(f"bndbox/{k}", "")) for k in VOC_CORNERS])
            for found in root.iter("object")
        ]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{file}: is not VOC's XML ({shown_text(str(error))}); fix or remove it.") from None
    if stored_size not in (size, (0, 0)):
        raise DataError(f"{file} is for {stored_size[0]} x {stored_size[1]} px, its image is {_format_size(size)}.")
    for number, (class_name, (x0, y0, x1, y1)) in enumerate(boxes, start=1):
        where = f"{file}, object {number}"
        if not class_name:
            raise DataError(f"{where}: has no name; fix or remove it.")
        corners = np.array([[x0 - 1, y0 - 1], [x1, y1]])
        instances.setdefault(class_name, []).append(Instance([_clip(corners, size, where)], size))
    return _labels_of(instances, size)


def _mask_labels(masks: Path, names: ClassNames, ignore: frozenset[int], name: Path, size: Size) -> Labels:
    """Read one id mask, a PNG at the image's path."""
    file = masks / name.with_suffix(".png")
    if not file.is_file():
        return Labels()
    ids = _read_ids(file)
    mask_size = (ids.shape[1], ids.shape[0])
    if mask_size != size:
        raise DataError(
            f"{file} is {_format_size(mask_size)} and its image {_format_size(size)}; give masks in the images' sizes."
        )
    class_ids = [int(i) for i in np.unique(ids) if int(i) not in ignore]
    return Labels({_name_of(names, i, str(file)): partial(_class_mask, file, i) for i in class_ids})


def _read_ids(file: Path) -> np.ndarray:
    """Read an id mask: (H, W) int64."""
    with open_stored(file, str(file)) as stored:
        if stored.mode not in ID_MODES:
            raise DataError(f"{file} is a {stored.mode} image, not ids; give masks of one channel.")
        return np.asarray(stored).astype(np.int64)


def _class_mask(file: Path, class_id: int) -> np.ndarray:
    return _read_ids(file) == class_id


def _clip(corners: np.ndarray, size: Size, where: str) -> np.ndarray:
    """Clip corners in px to the image; more than a pixel outside it is an error, less is rounding."""
    low, high = corners.min(0), corners.max(0)
    if not np.isfinite(corners).all() or (low < -1).any() or (high > np.array(size) + 1).any():
        raise DataError(
            f"{where}: reaches from ({low[0]:.0f}, {low[1]:.0f}) to ({high[0]:.0f}, {high[1]:.0f}), outside of the "
            f"image's {_format_size(size)} pixels; fix the line, or give the labels of these images."
        )
    if (high <= low).any():
        raise DataError(f"{where}: has no width or no height; fix or remove the line.")
    return corners.clip(0, size)


def _labels_of(instances: Instances, size: Size) -> Labels:
    outlines = {name: [one for each in of_class for one in each.outlines] for name, of_class in instances.items()}
    regions = {name: partial(_draw_union, of_class, size) for name, of_class in outlines.items() if of_class}
    boxes = {name: box for name in regions if len(instances[name]) == 1 and (box := instances[name][0].box())}
    return Labels(regions, boxes, instances)


def _box_of(outlines: Sequence[Outline]) -> Box | None:
    """Return the smallest box around all corners and all pixels of masks; None around masks without a pixel."""
    points = []
    for outline in outlines:
        if isinstance(outline, Rle):
            ys, xs = np.nonzero(outline.draw())
            points += [np.stack([xs, ys], axis=1), np.stack([xs + 1, ys + 1], axis=1)]
        else:
            points.append(outline)
    corners = np.concatenate(points)  # (k, 2)
    if not len(corners):
        return None
    (x1, y1), (x2, y2) = corners.min(0).tolist(), corners.max(0).tolist()
    return float(x1), float(y1), float(x2), float(y2)


def _draw_union(outlines: Sequence[Outline], size: Size) -> np.ndarray:
    """Draw every pixel that a box touches or a polygon or mask covers: (H, W) bool."""
    arrays = [outline for outline in outlines if not isinstance(outline, Rle)]
    sheet = Image.new("1", size)
    draw = ImageDraw.Draw(sheet)
    for corners in arrays:
        if len(corners) > 2:
            draw.polygon([(float(x), float(y)) for x, y in corners], fill=1)
    mask = np.array(sheet, bool)
    for corners in arrays:
        if len(corners) == 2:
            (x0, y0), (x1, y1) = np.stack([np.floor(corners[0]), np.ceil(corners[1])]).astype(int)
            mask[y0:y1, x0:x1] = True
    for outline in outlines:
        if isinstance(outline, Rle):
            mask |= outline.draw()
    return mask


def _format_size(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
