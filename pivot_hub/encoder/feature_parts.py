"""Features on disk: the file of a finished run, and the shards of one that was stopped, each with its checksum.

Every image that was encoded is known by its name and its stamp, the hash of its file. A later run of the same job takes
the features of each image whose stamp is the same, from the finished file or from a shard, and encodes the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.encoder.image_shapes import OWN_GRID
from pivot_hub.errors import DataError, OutputError
from pivot_hub.files import write_json
from pivot_hub.provenance import file_sha256

JOB_FILE, FINISHED, MERGED = "job.json", "finished", "merged"


@dataclass(frozen=True)
class StoredFeatures:
    """Place of an image's features on disk.

    Args:
        file: File whose array holds the features of many images.
        row: Row of the array, or the first of the image's rows if it has a grid.
        grid: Height and width of the image's own grid, if each patch is a row.
    """

    file: Path
    row: int
    grid: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        return 1 if self.grid is None else self.grid[0] * self.grid[1]

    def of(self, array: np.ndarray) -> np.ndarray:
        """Take the image's features (1, *shape) or (H*W, D) from the file's array."""
        return array[self.row : self.row + self.rows]


@dataclass
class EncodedImages:
    """Images of a job whose features are on disk.

    Args:
        rows: Features of each image by its name.
        corrupt: Reason why an image cannot be decoded, by its name.
    """

    rows: dict[str, StoredFeatures] = field(default_factory=dict)
    corrupt: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.rows or name in self.corrupt

    def __len__(self) -> int:
        return len(self.rows) + len(self.corrupt)


def report_file(target: Path) -> Path:
    """Return the file of the report beside a feature file."""
    return target.with_name(f"{target.name}.json")


def read_report(target: Path) -> dict[str, Any] | None:
    """Return the report beside a feature file, or None if there is none that `encode` wrote."""
    try:
        report = json.loads(report_file(target).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return report if isinstance(report, dict) and {"files", "corrupt", "shape", "dtype"} <= report.keys() else None


def finished_report(target: Path) -> dict[str, Any] | None:
    """Return the report of a finished feature file, or None if the file is missing, unfinished or damaged."""
    report = read_report(target)
    if report is None or "features_sha256" not in report or not target.is_file():
        return None
    return report if file_sha256(target) == report["features_sha256"] else None


class FeatureParts:
    """Features of one job that are on disk before its file is complete.

    Args:
        target: Feature file that the job writes, `.parquet` or `.npy`.
        job: Whatever the features depend on besides the images.
        shape: Shape of an image's features; (*OWN_GRID, D) if each image has a grid of its own. Then each patch is a
            row of the arrays on disk, and listings give the grid of each image.
        dtype: Type of the stored features.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], shape: Sequence[int | str], dtype: np.dtype[Any]) -> None:
        self.target, self.job, self.shape, self.dtype = target, job, tuple(shape), dtype
        self.has_grids = self.shape[:2] == OWN_GRID
        self.row_shape = tuple(int(n) for n in self.shape[2 if self.has_grids else 0 :])
        self.folder = partial_folder(target)
        self.job_sha256 = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
        self._shards = 0

    def open(self, stamps: Mapping[str, str]) -> EncodedImages:
        """Collect the features that need not be computed again, and create the folder of shards.

        Args:
            stamps: Stamps of the job's images by their names. Features of an image with another stamp are not used.

        Raises:
            DataError: The folder holds shards of another job.
        """
        own, foreign = [], False
        for file in sorted(self.folder.glob("*.json")):
            if file.name == JOB_FILE:
                continue
            listing = _read_listing(file)
            foreign |= listing is not None and listing.get("job_sha256") != self.job_sha256
            own.append((file, listing))
        if foreign:
            raise DataError(
                f"{self.folder} holds parts of another run (another encoder, other images or settings); delete it or "
                "choose another --out."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / JOB_FILE, self.job)
        encoded = EncodedImages()
        report = finished_report(self.target)
        if report is not None and report.get("job_sha256") == self.job_sha256:
            self._add(encoded, self.target, report, stamps)
        for file, listing in own:
            features = file.with_suffix(".npy")
            # A shard that is damaged is encoded again.
            if listing and features.is_file() and file_sha256(features) == listing["features_sha256"]:
                self._add(encoded, features, listing, stamps)
            self._shards = max(self._shards, int(file.stem) + 1 if file.stem.isdigit() else 0)
        if self.target.suffix == ".parquet" and any(stored.file == self.target for stored in encoded.rows.values()):
            copy = self._copy_parquet()
            encoded.rows = {n: replace(s, file=copy) if s.file == self.target else s for n, s in encoded.rows.items()}
        return encoded

    def _add(self, encoded: EncodedImages, source: Path, listing: Mapping[str, Any], stamps: Mapping[str, str]) -> None:
        grids = [tuple(grid) for grid in listing["grids"]] if self.has_grids else [None] * len(listing["files"])
        row = 0
        for name, stamp, grid in zip(listing["files"], listing["images_sha256"], grids, strict=True):
            stored = StoredFeatures(source, row, grid)
            row += stored.rows
            if stamps.get(name) == stamp:
                encoded.rows[name] = stored
        encoded.corrupt |= {
            entry["file"]: entry["reason"]
            for entry in listing["corrupt"]
            if stamps.get(entry["file"]) == entry["sha256"]
        }

    def write_shard(
        self,
        encoded: EncodedImages,
        features: Sequence[np.ndarray],
        names: list[str],
        corrupt: dict[str, str],
        stamps: Any,
    ) -> None:
        """Write the features of each image to a new shard and add them to `encoded`."""
        features_file = self.folder / f"{self._shards:06}.npy"
        self._shards += 1
        np.save(features_file, np.concatenate([np.empty((0, *self.row_shape), self.dtype), *map(self._rows, features)]))
        listing = {
            "job_sha256": self.job_sha256,
            "features_sha256": file_sha256(features_file),
            "files": names,
            **({"grids": [f.shape[:2] for f in features]} if self.has_grids else {}),
            "images_sha256": [stamps[name] for name in names],
            "corrupt": [{"file": n, "reason": reason, "sha256": stamps[n]} for n, reason in corrupt.items()],
        }
        write_json(features_file.with_suffix(".json"), listing)  # last, since it marks the shard complete
        self._add(encoded, features_file, listing, stamps)

    def _rows(self, features: np.ndarray) -> np.ndarray:
        """Reshape an image's features to the rows of an array on disk."""
        return features.reshape(-1, *self.row_shape)

    def image_bytes(self, encoded: EncodedImages) -> int:
        """Return the size of the largest image's features in bytes."""
        rows = max((stored.rows for stored in encoded.rows.values()), default=1)
        return rows * int(np.prod(self.row_shape)) * self.dtype.itemsize

    def grids(self, encoded: EncodedImages, names: Sequence[str]) -> dict[str, Any]:
        """Return an entry of the report with the grid of each image; none if all have the same shape."""
        return {"grids": [list(encoded.rows[name].grid or ()) for name in names]} if self.has_grids else {}

    def merge(self, encoded: EncodedImages, names: Sequence[str], block: int) -> None:
        """Join the features of all images, in order, into one file, and rename it to its name when it is complete.

        Args:
            encoded: Features of the images.
            names: Names of the images, without the corrupt ones.
            block: Number of images whose features are in memory at once.
        """
        temporary = self.folder / f"{MERGED}{self.target.suffix}"
        source = lru_cache(maxsize=8)(lambda path: np.load(path, mmap_mode="r"))

        def rows_of(names: Sequence[str]) -> np.ndarray:
            stored = [encoded.rows[name] for name in names]
            return np.concatenate([one.of(source(one.file)) for one in stored])

        blocks = (names[start : start + block] for start in range(0, len(names), block))
        features = ((some, rows_of(some)) for some in blocks)
        if self.target.suffix == ".npy":
            self._merge_npy(temporary, features, len(names))
        else:
            self._merge_parquet(temporary, features, encoded)
        temporary.replace(self.target)

    def _merge_npy(self, path: Path, blocks: Iterator[tuple[Sequence[str], np.ndarray]], rows: int) -> None:
        merged = np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=(rows, *self.row_shape))
        start = 0
        for names, features in blocks:
            merged[start : start + len(names)] = features
            start += len(names)
        merged.flush()

    def _merge_parquet(
        self, path: Path, blocks: Iterator[tuple[Sequence[str], np.ndarray]], encoded: EncodedImages
    ) -> None:
        width, value_type = int(np.prod(self.row_shape)), pa.from_numpy_dtype(self.dtype)
        features_type = pa.list_(value_type) if self.has_grids else pa.list_(value_type, width)
        sides = [(name, pa.int32()) for name in OWN_GRID] if self.has_grids else []
        metadata = {"shape": json.dumps(list(self.shape))}
        schema = pa.schema([("file", pa.string()), ("features", features_type), *sides], metadata)
        with pq.ParquetWriter(path, schema) as writer:
            for names, features in blocks:
                files, flat = pa.array(names, pa.string()), pa.array(features.reshape(-1))
                if not self.has_grids:
                    columns = [files, pa.FixedSizeListArray.from_arrays(flat, width)]
                else:
                    grids = np.array([encoded.rows[name].grid for name in names], np.int32)
                    ends = np.cumsum(grids.prod(1, dtype=np.int64) * width)
                    offsets = pa.array(np.concatenate([[0], ends]).astype(np.int32))
                    columns = [files, pa.ListArray.from_arrays(offsets, flat), *map(pa.array, grids.T)]
                writer.write_table(pa.table(columns, schema=schema))

    def _copy_parquet(self) -> Path:
        """Copy the features of the finished file to an .npy file, whose rows can be read in any order."""
        copy = self.folder / f"{FINISHED}.npy"
        with pq.ParquetFile(self.target) as file:
            count = file.metadata.num_rows
            if self.has_grids:
                sides = file.read(columns=list(OWN_GRID))
                count = sum(h * w for h, w in zip(*(side.to_pylist() for side in sides.columns), strict=True))
            rows = np.lib.format.open_memmap(copy, mode="w+", dtype=self.dtype, shape=(count, *self.row_shape))
            start = 0
            for group in range(file.num_row_groups):
                for chunk in file.read_row_group(group, columns=["features"]).column(0).chunks:
                    features = self._rows(chunk.flatten().to_numpy(zero_copy_only=False))
                    rows[start : start + len(features)] = features
                    start += len(features)
        rows.flush()
        return copy

    def delete(self) -> None:
        """Delete the folder of shards."""
        for file in sorted(self.folder.iterdir(), reverse=True):
            file.unlink()
        self.folder.rmdir()


def partial_folder(target: Path) -> Path:
    """Return the folder of shards beside a feature file."""
    return target.with_name(f"{target.name}.partial")


def check_target(target: Path) -> None:
    """Refuse to replace files that `encode` did not write.

    Raises:
        OutputError: The target, its report or its folder of shards is something else. Nothing was touched.
    """
    folder = partial_folder(target)
    parts = {f.name: f for f in folder.iterdir()} if folder.is_dir() else {}
    for name, file in parts.items():
        stem, _, suffix = name.partition(".")
        is_part = stem.isdigit() or stem in ("job", FINISHED, MERGED)
        if not is_part or suffix not in ("npy", "json", "parquet") or not file.is_file():
            if name.startswith(".") and name.rpartition(".")[2].isdigit():  # a listing whose writer was killed
                continue
            raise OutputError(f"{file} is not part of a stopped run, so {folder} is not used; choose another --out.")
    ours = read_report(target) is not None or bool(parts)
    for file in (target, report_file(target)):
        if file.is_dir() or (file.exists() and not ours):
            raise OutputError(f"{file} was not written by `pivot encode`, so it is not replaced; choose another --out.")


def _read_listing(file: Path) -> dict[str, Any] | None:
    """Read the listing of a shard; None if it is not whole, or was written by a version without checksums."""
    try:
        listing = json.loads(file.read_text())
        return listing if "features_sha256" in listing else None
    except (OSError, ValueError, TypeError):
        return None
