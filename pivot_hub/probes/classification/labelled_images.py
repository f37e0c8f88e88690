"""Labelled images from class folders, an archive of them or a Hub data set, in a train part and a reported part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import datasets
import numpy as np
from PIL import Image

from pivot_hub.data.image import decode_image
from pivot_hub.data.image_store import ARCHIVES, FileStore, open_cell
from pivot_hub.data.row import Row
from pivot_hub.data.tables import image_columns, is_table, load_tables
from pivot_hub.encoder.encode import Images
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.probes.parts import find_parts, is_hidden, part_of

Part = Literal["train", "test"]
PARTS: tuple[Part, ...] = ("train", "test")
REPORTED: Sequence[Literal["val", "test"]] = ("val", "test")  # the first of these parts that has labels is reported
FORMS = (
    "a folder, .zip or .tar with a folder of images for each class (train/CLASS and val/CLASS, or CLASS), or Parquet "
    "files, a folder of save_to_disk or a Hub data set with an image and a label column"
)
LABELS = ("label", "labels", "class", "category")  # columns of labels that are no ClassLabel
TEST_SHARE = 5  # one image in five is reported if the data have no part for it


class ProbeImages(Images, Protocol):
    """Named images of one part."""

    def stamp(self) -> str:
        """Return a key that changes when a name or a file changes, without reading images; the cache is keyed by it."""

    def digest(self, index: int) -> bytes:
        """Return the SHA-256 of an image's file, or of nothing where it cannot be read."""


@dataclass(frozen=True)
class Labelled:
    """Images of one part and their class numbers (N,) int64."""

    images: ProbeImages
    labels: np.ndarray


class ClassData(Protocol):
    """Data of a classification probe. The probe reads the reported part last.

    Attributes:
        name: Name of the data.
        drawn: Whether the reported part is drawn from the train part, because the data have none.
    """

    name: str
    drawn: bool

    @property
    def classes(self) -> Sequence[str]: ...

    def part(self, part: Part) -> Labelled: ...


def open_classes(data: str, revision: str | None = None, seed: int = 0) -> ClassData:
    """Find labelled images.

    Args:
        data: A folder, .zip or .tar with `train/CLASS/*` and `val/CLASS/*` (or a `val_annotations.txt` as in
            Tiny-ImageNet), or with `CLASS/*`, of which one image in five is reported, drawn by the seed. Otherwise
            Parquet files, a folder that `save_to_disk` wrote or the Hub name of a data set, with an image and a label
            column. Parts may have any name that `part_of` knows.
        revision: Revision of a Hub data set.
        seed: Seed of the split, if the data are not split.

    Raises:
        ProbeError: There is no such data, its parts are ambiguous, a class is in one part only, there is only one
            class, or a class has too few images. The message names the folder or the class, and the remedy.
        DataError: An archive is incomplete.
    """
    path = Path(data)
    if path.is_file() and path.suffix in ARCHIVES:
        return ClassFolders(path, seed)
    if is_table(path):
        return LabelledColumns(path.name, load_tables(data), seed, path if path.is_dir() else path.parent)
    if path.is_dir():
        return ClassFolders(path, seed)
    if path.exists() or data.count("/") != 1 or data.startswith((".", "/")):
        raise ProbeError(f"data {data!r} is no folder, .zip, .tar or Hub data set; give {FORMS}.")
    return LabelledColumns(data, load_tables(data, revision), seed)


@dataclass(frozen=True)
class StoredImages:
    """Image files of a folder or an archive."""

    store: FileStore
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        return self.store.open(self.store.locate(Row(name, name, "", "")))

    def digest(self, index: int) -> bytes:
        name = self.names[index]
        try:
            content = self.store.read(name)
        except (DataError, OSError):
            content = None
        return hashlib.sha256(content or b"").digest()

    def stamp(self) -> str:
        root = self.store.root
        files = [root] if root.is_file() else [root / name for name in self.names]
        metadata = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return hashlib.sha256(repr([list(self.names), metadata]).encode("utf-8", "surrogateescape")).hexdigest()


class ClassFolders:
    """Images in a folder or an archive that has one folder per class."""

    def __init__(self, root: Path, seed: int) -> None:
        self.name = root.name.removesuffix(root.suffix) if root.is_file() else root.resolve().name
        self._store = FileStore(root)
        names = [name for name in self._store.names() if not is_hidden(name)]
        if not names:
            raise ProbeError(f"{root} holds no image; give {FORMS}.")
        wrap = _wrapper(names)  # the folder that the archive was packed from
        paths = {name: PurePosixPath(name.removeprefix(wrap)).parts for name in names}
        folders = [parts[0] for parts in paths.values() if len(parts) > 1]
        if not folders:
            raise ProbeError(f"{root}: no image is in a folder, so none has a class; give {FORMS}.")
        parts = find_parts(str(root), folders)
        fitted = _first_folders(paths, parts.get("train"))
        reported = next((parts[part] for part in REPORTED if part in parts), None)
        tested = self._annotated(paths, wrap, reported) or _first_folders(paths, reported) if reported else {}
        if reported and not tested:
            raise ProbeError(
                f"{root}: no image of {reported!r} is in a folder, so none has a class; give folders of classes, or "
                "move it away, so that one image in five of train is reported."
            )
        self.drawn = not tested
        if self.drawn:
            held = _one_in(TEST_SHARE, np.array(list(fitted.values())), seed)
            tested = {n: c for (n, c), h in zip(fitted.items(), held, strict=True) if h}
            fitted = {n: c for n, c in fitted.items() if n not in tested}
        _check(str(root), fitted.values(), tested.values())
        self.classes = sorted(set(fitted.values()))
        self._labels: dict[Part, dict[str, str]] = {"train": fitted, "test": tested}

    def part(self, part: Part) -> Labelled:
        number = {label: i for i, label in enumerate(self.classes)}
        labels = self._labels[part]
        return Labelled(StoredImages(self._store, list(labels)), np.array([number[c] for c in labels.values()]))

    def _annotated(self, paths: dict[str, tuple[str, ...]], wrap: str, top: str) -> dict[str, str]:
        """Read classes from Tiny-ImageNet's `val_annotations.txt`: one tab-separated line per file, name and class."""
        file = f"{wrap}{top}/val_annotations.txt"
        text = self._store.read(file)
        if text is None:
            return {}
        rows = [line.split("\t") for line in text.decode().splitlines()]
        named = {row[0]: row[1] for row in rows if len(row) > 1}
        files = {name: parts[-1] for name, parts in paths.items() if parts[0] == top}
        if missing := [f for f in files.values() if f not in named]:
            raise ProbeError(f"{file} names no class of {missing[0]}; add a line for it or remove the image.")
        return {name: named[f] for name, f in files.items()}


class LabelledColumns:
    """Images in a data set of the datasets library that has an image and a label column."""

    def __init__(
        self, name: str, splits: Mapping[str, datasets.Dataset], seed: int, folder: Path | None = None
    ) -> None:
        self.name, self._folder = name.rsplit("/", 1)[-1], folder
        parts = find_parts(name, splits)
        if not parts:
            raise ProbeError(f"{name}: there is no train part, only {', '.join(splits)}; give data with one.")
        train = splits[parts["train"]]
        image = next(iter(image_columns(train)), None)
        classes = [c for c, f in train.features.items() if isinstance(f, datasets.ClassLabel)]
        label = classes[0] if classes else next((c for c in LABELS if c in train.features), None)
        if image is None or label is None:
            raise ProbeError(
                f"{name}: no image and label column among {', '.join(train.features)}; cast them to datasets' Image "
                "and ClassLabel."
            )
        labelled = (splits[parts[part]] for part in REPORTED if part in parts)
        test = next((table for table in labelled if label in table.features and min(table[label]) != -1), None)
        self.drawn = test is None
        if test is None:
            held = _one_in(TEST_SHARE, np.array(train[label]), seed)
            train, test = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))
        if None in train[label] or None in test[label]:
            raise ProbeError(f"{name}: a row has no {label}; remove the row.")
        feature = train.features[label]
        values: list[Any] = sorted(set(train[label]))
        self.classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(v) for v in values]
        named = isinstance(feature, datasets.ClassLabel)
        self._numbers = {i: i for i in range(len(self.classes))} if named else {v: i for i, v in enumerate(values)}
        _check(name, train[label], test[label])
        self._parts = {"train": train, "test": test}
        self._columns = (image, label)

    def part(self, part: Part) -> Labelled:
        image, label = self._columns
        table = self._parts[part]
        labels = np.array([self._numbers[v] for v in table[label]])
        return Labelled(ColumnImages(table, image, part, self._folder), labels)


@dataclass(frozen=True)
class ColumnImages:
    """Images in a column of a data set."""

    table: datasets.Dataset
    column: str
    part: str
    folder: Path | None = None  # of a local data set

    @cached_property
    def names(self) -> Sequence[str]:  # cached, because it is read for every image
        return [f"{self.part}[{i}]" for i in range(len(self.table))]

    def open(self, index: int) -> Image.Image:
        stored = self.table[index][self.column]
        file = open_cell(stored, self.folder, f"{self.names[index]}: its image")
        return decode_image(file, self.names[index], stored["path"] or self.column)

    def digest(self, index: int) -> bytes:
        try:
            file = open_cell(self.table[index][self.column], self.folder, self.names[index])
            content = file.read_bytes() if isinstance(file, Path) else file.read()
        except (DataError, OSError):
            content = b""
        return hashlib.sha256(content).digest()

    def stamp(self) -> str:
        return str(self.table._fingerprint)


def data_sha256(data: ClassData, digests: Mapping[Part, np.ndarray]) -> str:
    """Hash the names, labels and files of both parts; results with the same hash can be compared item by item.

    Args:
        data: The labelled images.
        digests: (N, 32) hash of each image's file, for each part.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        labelled = data.part(part)
        digest.update(repr([list(data.classes), list(labelled.images.names), labelled.labels.tolist()]).encode())
        digest.update(digests[part].tobytes())
    return digest.hexdigest()


def count_copies(digests: Mapping[Part, np.ndarray]) -> int:
    """Count the images of the reported part whose file is also in train, see `data_sha256`."""
    known = {row.tobytes() for row in digests["train"]} - {hashlib.sha256(b"").digest()}
    return sum(row.tobytes() in known for row in digests["test"])


def _wrapper(names: Sequence[str]) -> str:
    """Return the path of the folders that wrap all images and are neither a part nor a class, or an empty string."""
    wrap = ""
    while True:
        first = names[0].removeprefix(wrap).split("/")[0]
        wrapped = all(n.startswith(f"{wrap}{first}/") and n.removeprefix(wrap).count("/") > 1 for n in names)
        if not wrapped or part_of(first):
            return wrap
        wrap += f"{first}/"


def _first_folders(paths: dict[str, tuple[str, ...]], top: str | None) -> dict[str, str]:
    """Map each image below `top` to its first folder there; images that are in no folder have no class."""
    below = {n: p if top is None else p[1:] for n, p in paths.items() if top is None or p[0] == top}
    return {n: p[0] for n, p in below.items() if len(p) > 1}


def _one_in(share: int, labels: np.ndarray, seed: int) -> np.ndarray:
    """Mark one in `share` items of each class, at least one, drawn by the seed: (N,) bool."""
    rng, marked = np.random.default_rng(seed), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        items = rng.permutation(np.flatnonzero(labels == label))
        marked[items[: max(1, len(items) // share)]] = True
    return marked


def _check(owner: str, train: Any, test: Any) -> None:
    """Raise a ProbeError if a class is in one part only or has too few images."""
    counts = Counter(train)
    if len(counts) < 2:
        raise ProbeError(f"{owner}: {len(counts)} class folders with images; a probe needs at least two.")
    unshared = set(test) ^ set(counts)
    if unshared:
        label = sorted(unshared, key=str)[0]
        raise ProbeError(f"{owner}: class {label!r} is not in both train and val; remove or add it.")
    small = [label for label, count in counts.items() if count < 2]
    if small:
        raise ProbeError(f"{owner}: class {small[0]!r} has fewer than 3 images; add images or remove the class.")
