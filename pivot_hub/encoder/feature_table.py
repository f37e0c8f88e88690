"""Tables of features: their columns, the types that they are stored in, and the error of storing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pivot_hub.encoder.image_shapes import OWN_GRID
from pivot_hub.errors import DataError

# Type of a number in a Parquet file. bfloat16 is stored as its bits, since Arrow has no such type.
STORES = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}
EXACT = {"float32": ("float32",), "float16": ("float32", "float16"), "bfloat16": ("float32", "bfloat16")}


class NotFiniteError(DataError):
    """Features of an image are NaN or infinite."""


@dataclass(frozen=True)
class StoredRow:
    """Features of an image as they are stored.

    Args:
        values: Values of each layer (D), (H*W, D) or (H, W, D), in the stored type.
        scales: For int8, the number that the values of each layer are multiplied by.
        errors: Relative L2 error of each layer, if storing is not exact.
    """

    values: Sequence[np.ndarray]
    scales: Sequence[float] = ()
    errors: Sequence[float] = ()

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in self.values)


@dataclass(frozen=True)
class FeatureTable:
    """Columns of features.

    Args:
        shapes: Shape of an image's features in each layer, by the ending of its columns' names: empty for a single
            layer. (*OWN_GRID, D) if each image has a grid of its own.
        store: Type that the features are stored in, one of STORES.
        dtype: Type that they were computed in.
    """

    shapes: dict[str, Sequence[int | str]]
    store: str
    dtype: str

    @property
    def exact(self) -> bool:
        """Whether the stored features are those that were computed."""
        return self.store in EXACT[self.dtype]

    @cached_property
    def has_grids(self) -> bool:
        return any(tuple(shape[:2]) == OWN_GRID for shape in self.shapes.values())

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns `id` and `sha256` of the image's file, `features`, and what is needed to read them."""
        fields = [("id", pa.string()), ("sha256", pa.string())]
        for ending, shape in self.shapes.items():
            value_type = STORES[self.store]
            width = -1 if self.has_grids else _size(shape)
            fields.append((f"features{ending}", pa.list_(value_type, width)))
            if self.store == "int8":
                fields.append((f"scale{ending}", pa.float32()))
            if not self.exact:
                fields.append((f"error{ending}", pa.float32()))
        if self.has_grids:
            fields += [(side, pa.int32()) for side in OWN_GRID]
        shapes = {f"features{ending}": list(shape) for ending, shape in self.shapes.items()}
        return pa.schema(fields, {"shapes": json.dumps(shapes), "store": self.store})

    def row(self, name: str, features: Sequence[np.ndarray]) -> StoredRow:
        """Convert the float32 features of an image in each layer.

        Raises:
            NotFiniteError: They are not finite, or not in the stored type.
        """
        stored = [_convert(values, self.store) for values in features]
        errors = []
        for values, (kept, scale) in zip(features, stored, strict=True):
            read = decode(kept, self.store, scale)
            if not np.isfinite(read).all():
                raise NotFiniteError(
                    f"the features of {name} are not finite (NaN or infinite); check the encoder with `pivot verify`, "
                    "or compute in float32 or bfloat16, and store them so."
                )
            if not self.exact:
                length = float(np.linalg.norm(values.astype(np.float64)))
                errors.append(float(np.linalg.norm(values.astype(np.float64) - read)) / length if length else 0.0)
        scales = [scale for _, scale in stored] if self.store == "int8" else []
        return StoredRow([kept for kept, _ in stored], scales, errors)

    def stored_row(self, values: np.ndarray) -> StoredRow:
        """Return features of one layer that are stored already, and whose error is not known any more."""
        return StoredRow([values], errors=[] if self.exact else [float("nan")])

    def table(self, names: Sequence[str], hashes: Sequence[str], rows: Sequence[StoredRow]) -> pa.Table:
        """Join images to a table."""
        columns: list[Any] = [pa.array(names, pa.string()), pa.array(hashes, pa.string())]
        for layer, shape in enumerate(self.shapes.values()):
            values = [row.values[layer] for row in rows]
            flat = np.concatenate([v.reshape(-1) for v in values]) if values else np.empty(0, numpy_type(self.store))
            numbers = pa.array(flat, STORES[self.store])
            if self.has_grids:
                offsets = np.cumsum([0, *(v.size for v in values)]).astype(np.int32)
                columns.append(pa.ListArray.from_arrays(pa.array(offsets), numbers))
            else:
                columns.append(pa.FixedSizeListArray.from_arrays(numbers, _size(shape)))
            if self.store == "int8":
                columns.append(pa.array([row.scales[layer] for row in rows], pa.float32()))
            if not self.exact:
                columns.append(pa.array([row.errors[layer] for row in rows], pa.float32()))
        if self.has_grids:
            grids = np.array([row.values[0].shape[:2] for row in rows], np.int32).reshape(-1, 2)
            columns += map(pa.array, grids.T)
        return pa.table(columns, schema=self.schema)


@dataclass
class StorageError:
    """Relative L2 error of stored features, added up over images.

    Args:
        images: Number of images and layers.
        total: Sum of their errors.
        largest: Largest error.
    """

    images: int = 0
    total: float = 0.0
    largest: float = 0.0

    def add(self, table: pa.Table) -> None:
        """Add the images of a table, or of some of its columns."""
        for name in table.column_names:
            if name.startswith("error"):
                errors = table[name].to_numpy().astype(np.float64)
                errors = errors[np.isfinite(errors)]  # without rows of an .npy file, which does not hold them
                self.images += len(errors)
                self.total += float(errors.sum())
                self.largest = max(self.largest, float(errors.max(initial=0.0)))

    def to_dict(self) -> dict[str, float]:
        """Return the mean and the largest relative L2 error; zero where storing is exact."""
        return {"mean": self.total / max(self.images, 1), "largest": self.largest}


def numpy_type(store: str) -> np.dtype[Any]:
    """Return the NumPy type of the stored numbers."""
    return np.dtype("uint16" if store == "bfloat16" else store)


def decode(values: np.ndarray, store: str, scale: float | np.ndarray = 1.0) -> np.ndarray:
    """Return stored features as float32.

    Args:
        values: Stored numbers of any shape.
        store: Type that they are stored in, one of STORES.
        scale: For int8, the image's `scale`; for several images, in a shape that fits theirs.
    """
    if store == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32) * (np.float32(scale) if store == "int8" else np.float32(1))


def _size(shape: Sequence[int | str]) -> int:
    return int(np.prod([int(side) for side in shape]))


def _convert(values: np.ndarray, store: str) -> tuple[np.ndarray, float]:
    """Convert float32 features to the stored type; for int8, with the number that they are multiplied by."""
    if store == "int8":
        largest = float(np.abs(values).max(initial=0.0))
        scale = float(np.float32(largest / 127))
        if not np.isfinite(scale):
            return np.full(values.shape, 127, np.int8), scale
        return np.rint(values / (scale or 1.0)).clip(-127, 127).astype(np.int8), scale
    if store == "bfloat16":
        bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16).numpy()
        return bits.view(np.uint16), 1.0
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused
        return values.astype(store), 1.0
