"""Labelled images from class folders, an archive of them or a Hub data set, in a train part and a reported part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
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
from pivot_hub.encoder.encode import Images
from pivot_hub.errors import ProbeError

Part = Literal["train", "test"]
TRAIN, REPORTED = ("train", "training"), ("val", "validation", "valid", "test")
TEST_SHARE = 5  # one image in five is reported if the data have no part for it


class ProbeImages(Images, Protocol):
    """Named images of one part."""

    def stamp(self) -> str:
        """Return a key that changes when a name or a file changes, without reading images; the cache is keyed by it."""


@dataclass(frozen=True)
class Labelled:
    """Images of one part and their class numbers (N,) int64."""

    images: ProbeImages
    labels: np.ndarray


class ClassData(Protocol):
    """Data of a classification probe. The probe reads the reported part last."""

    name: str

    @property
    def classes(self) -> Sequence[str]: ...

    def part(self, part: Part) -> Labelled: ...


def open_classes(data: str, revision: str | None = None, seed: int = 0) -> ClassData:
    """Find labelled images.

    Args:
        data: A folder, .zip or .tar with `train/CLASS/*` and `val/CLASS/*` (or a `val_annotations.txt` as in
            Tiny-ImageNet), or with `CLASS/*`, of which one image in five is reported, drawn by the seed. Otherwise a
            folder of Parquet files or the Hub name of a data set, with an image and a label column.
        revision: Revision of a Hub data set.
        seed: Seed of the split, if the data are not split.

    Raises:
        ProbeError: There is no such data, a class is in one part only, there is only one class, or a class has too few
            images. The message names the class and the remedy.
        DataError: An archive is incomplete.
    """
    path = Path(data)
    if path.is_file() and path.suffix in ARCHIVES:
        return ClassFolders(path, seed)
    if path.is_dir():
        if next(path.rglob("*.parquet"), None) is None:
            return ClassFolders(path, seed)
        return LabelledColumns(path.name, _load(str(path), None), seed, path)
    if path.exists() or data.count("/") != 1 or data.startswith((".", "/")):
        raise ProbeError(f"data {data!r} is no folder, .zip, .tar or Hub data set; give one with a folder per class.")
    return LabelledColumns(data, _load(data, revision), seed)


@dataclass(frozen=True)
class StoredImages:
    """Image files of a folder or an archive."""

    store: FileStore
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        name = self.names[index]
        return self.store.open(self.store.locate(Row(name, name, "", "")))

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
        names = self._store.names()
        if not names:
            raise ProbeError(f"{root} holds no image; give a folder or an archive with a folder of images per class.")
        wrap = _wrapper(names)  # the folder that the archive was packed from
        paths = {name: PurePosixPath(name.removeprefix(wrap)).parts for name in names}
        tops = {parts[0] for parts in paths.values()}
        train = next((s for s in TRAIN if s in tops), None)
        reported = next((s for s in REPORTED if s in tops), None) if train else None
        fitted = _first_folders(paths, train)
        tested = self._annotated(paths, wrap, reported) or _first_folders(paths, reported) if reported else {}
        if not tested:
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

    def __init__(self, name: str, splits: datasets.DatasetDict, seed: int, folder: Path | None = None) -> None:
        self.name, self._folder = name.rsplit("/", 1)[-1], folder
        train = next((splits[s] for s in TRAIN if s in splits), None)
        if train is None:
            raise ProbeError(f"{name}: there is no train split, only {', '.join(splits)}; give data with one.")
        image = next((c for c, f in train.features.items() if isinstance(f, datasets.Image)), None)
        classes = [c for c, f in train.features.items() if isinstance(f, datasets.ClassLabel)]
        label = classes[0] if classes else next((c for c in ("label", "labels") if c in train.features), None)
        if image is None or label is None:
            raise ProbeError(
                f"{name}: no image and label column among {', '.join(train.features)}; cast them to datasets' Image "
                "and ClassLabel."
            )
        test = next((splits[s] for s in REPORTED if s in splits and min(splits[s][label]) != -1), None)
        if test is None:
            held = _one_in(TEST_SHARE, np.array(train[label]), seed)
            train, test = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))
        feature = train.features[label]
        values: list[Any] = sorted(set(train[label]))
        self.classes = list(feature.names) if isinstance(feature, datasets.ClassLabel) else [str(v) for v in values]
        named = isinstance(feature, datasets.ClassLabel)
        self._numbers = {i: i for i in range(len(self.classes))} if named else {v: i for i, v in enumerate(values)}
        _check(name, train[label], test[label])
        self._parts = {
            part: table.cast_column(image, datasets.Image(decode=False))
            for part, table in (("train", train), ("test", test))
        }
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

    def stamp(self) -> str:
        return str(self.table._fingerprint)


def data_sha256(data: ClassData) -> str:
    """Hash the names and labels of both parts; results with the same hash can be compared item by item."""
    digest = hashlib.sha256()
    parts: tuple[Part, ...] = ("train", "test")
    for part in parts:
        labelled = data.part(part)
        digest.update(repr([list(data.classes), list(labelled.images.names), labelled.labels.tolist()]).encode())
    return digest.hexdigest()


def _load(name: str, revision: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ProbeError(
            f"data {name!r} cannot be loaded ({reason}); give a folder, or a data set that can be reached."
        ) from error


def _wrapper(names: Sequence[str]) -> str:
    """Return `folder/` if all images lie below one folder that is neither a part nor a class, else an empty string."""
    first = names[0].split("/")[0]
    wrapped = all(n.startswith(f"{first}/") and n.count("/") > 1 for n in names)
    return f"{first}/" if wrapped and first not in TRAIN + REPORTED else ""


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
