"""Photographs with their labels, each in one split, and what the labels say for certain."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from pivot_hub.data.boxes_and_masks import AnnotatedImage
from pivot_hub.data.image import open_image
from pivot_hub.data.row import Box

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class PhotoFolder:
    """Photographs of a folder, each in one split; those of equal pixels are in the same one.

    The split depends on pixels and seed alone, so it is the same whatever other photographs there are.

    Args:
        folder: The folder.
        validation: Share of the photographs that go to validation.
        seed: Seed of the split.
    """

    def __init__(self, folder: Path, validation: float, seed: int) -> None:
        self.folder, self.validation, self.seed = folder, validation, seed
        self._digests: dict[str, bytes] = {}

    def split_of(self, name: str) -> Split:
        """Return the split of a photograph.

        Args:
            name: Path of the photograph below the folder.

        Raises:
            DataError: The file is missing, or not a whole image.
        """
        digest = self.digest_of(name)
        drawn = hashlib.blake2b(digest, digest_size=8, key=str(self.seed).encode()).digest()
        return "validation" if int.from_bytes(drawn, "big") < self.validation * 2**64 else "train"

    def digest_of(self, name: str) -> bytes:
        """Return a hash of a photograph's size and pixels; it is decoded once."""
        if name not in self._digests:
            image = open_image(self.folder / name, name)
            self._digests[name] = hashlib.blake2b(
                image.tobytes(), digest_size=16, key=str(image.size).encode()
            ).digest()
        return self._digests[name]

    def duplicates(self, names: Iterable[str]) -> int:
        """Count the photographs whose pixels equal those of an earlier one."""
        digests = [self.digest_of(name) for name in set(names)]
        return len(digests) - len(set(digests))


@dataclass(frozen=True)
class LabelledPhoto:
    """A photograph, and what its labels say.

    A class that no label names counts as absent.

    Args:
        image: The photograph with its regions.
        name: Path of the photograph below its folder.
        split: Its split.
    """

    image: AnnotatedImage
    name: str
    split: Split

    @cached_property
    def labelled(self) -> frozenset[str]:
        """Classes that any label names, a crowd or an empty mask too."""
        return frozenset(self.image.regions) | frozenset(self.image.instances)

    @cached_property
    def present(self) -> frozenset[str]:
        """Classes of which an object is certain: one that has a pixel, or a crowd."""
        if not self.image.instances:
            return frozenset(self.image.regions)
        instances = self.image.instances.items()
        return frozenset(name for name, of_class in instances if any(i.is_crowd or i.box() for i in of_class))

    @cached_property
    def objects(self) -> Mapping[str, tuple[Box, ...]]:
        """Boxes of the objects of each class whose every object is told apart: no crowd, and no empty mask."""
        boxes = {name: [i.box() for i in of_class] for name, of_class in self.image.instances.items()}
        return {name: tuple(b for b in found if b) for name, found in boxes.items() if all(found)}

    @cached_property
    def single(self) -> Mapping[str, Box]:
        """Box of each class that has one object."""
        return {name: boxes[0] for name, boxes in self.objects.items() if len(boxes) == 1}

    @cached_property
    def single_pixels(self) -> Mapping[str, int]:
        """Pixels of each class that has one object: those of its outline, or of its box where that is all."""
        return {name: int(self.image.instances[name][0].draw().sum()) for name in self.single}

    @property
    def outlined(self) -> frozenset[str]:
        """Classes whose every pixel is known."""
        return frozenset(self.objects) if self.image.instances else self.present

    def boxes_of(self, name: str) -> tuple[Box, ...]:
        """Return the boxes of an outlined class: of its objects, or around its pixels in a mask of ids."""
        if self.image.instances:
            return self.objects[name]
        ys, xs = np.nonzero(self.image.regions[name]())
        return ((float(xs.min()), float(ys.min()), float(xs.max()) + 1, float(ys.max()) + 1),)


def intersect(a: Box, b: Box) -> bool:
    """Return whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def area(box: Box) -> float:
    """Return the area of a box, in px²."""
    return (box[2] - box[0]) * (box[3] - box[1])
