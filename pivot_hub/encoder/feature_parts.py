"""Features on disk: the file of a finished run, and the shards of one that was stopped, each with its checksum.

Every image that was encoded is known by its name and its stamp, the hash of its file. A later run of the same job takes
the features of each image whose stamp is the same, from the finished file or from a shard, and encodes the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pivot_hub.errors import DataError, OutputError
from pivot_hub.files import write_json
from pivot_hub.provenance import file_sha256

JOB_FILE, FINISHED, MERGED = "job.json", "finished", "merged"


@dataclass
class EncodedImages:
    """Images of a job whose features are on disk.

    Args:
        rows: Features of each image by its name: an .npy file and the row in it.
        corrupt: Reason why an image cannot be decoded, by its name.
    """

    rows: dict[str, tuple[Path, int]] = field(default_factory=dict)
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
        shape: Shape of an image's features.
        dtype: Type of the stored features.
    """

    def __init__(self, target: Path, job: Mapping[str, Any], shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.target, self.job, self.shape, self.dtype = target, job, tuple(shape), dtype
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
        if self.target.suffix == ".parquet" and any(source == self.target for source, _ in encoded.rows.values()):
            copy = self._copy_parquet()
            encoded.rows = {n: (copy if s == self.target else s, row) for n, (s, row) in encoded.rows.items()}
        return encoded

    def _add(self, encoded: EncodedImages, source: Path, listing: Mapping[str, Any], stamps: Mapping[str, str]) -> None:
        listed = zip(listing["files"], listing["images_sha256"], strict=True)
        encoded.rows |= {n: (source, row) for row, (n, stamp) in enumerate(listed) if stamps.get(n) == stamp}
        encoded.corrupt |= {
            entry["file"]: entry["reason"]
            for entry in listing["corrupt"]
            if stamps.get(entry["file"]) == entry["sha256"]
        }

    def write_shard(
        self, encoded: EncodedImages, features: np.ndarray, names: list[str], corrupt: dict[str, str], stamps: Any
    ) -> None:
        """Write the features of images to a new shard and add them to `encoded`."""
        features_file = self.folder / f"{self._shards:06}.npy"
        self._shards += 1
        np.save(features_file, features)
        listing = {
            "job_sha256": self.job_sha256,
            "features_sha256": file_sha256(features_file),
            "files": names,
            "images_sha256": [stamps[name] for name in names],
            "corrupt": [{"file": n, "reason": reason, "sha256": stamps[n]} for n, reason in corrupt.items()],
        }
        write_json(features_file.with_suffix(".json"), listing)  # last, since it marks the shard complete
        self._add(encoded, features_file, listing, stamps)

    def merge(self, encoded: EncodedImages, names: Sequence[str], block: int) -> None:
        """Join the features of all images, in order, into one file, and rename it to its name when it is complete.

        Args:
            encoded: Features of the images.
            names: Names of the images, without the corrupt ones.
            block: Number of images whose features are in memory at once.
        """
        temporary = self.folder / f"{MERGED}{self.target.suffix}"
        source = lru_cache(maxsize=8)(lambda path: np.load(path, mmap_mode="r"))
        blocks = (names[start : start + block] for start in range(0, len(names), block))
        features = ((some, np.stack([source(encoded.rows[n][0])[encoded.rows[n][1]] for n in some])) for some in blocks)
        if self.target.suffix == ".npy":
            self._merge_npy(temporary, features, len(names))
        else:
            self._merge_parquet(temporary, features)
        temporary.replace(self.target)

    def _merge_npy(self, path: Path, blocks: Iterator[tuple[Sequence[str], np.ndarray]], rows: int) -> None:
        merged = np.lib.format.open_memmap(path, mode="w+", dtype=self.dtype, shape=(rows, *self.shape))
        start = 0
        for names, features in blocks:
            merged[start : start + len(names)] = features
            start += len(names)
        merged.flush()

    def _merge_parquet(self, path: Path, blocks: Iterator[tuple[Sequence[str], np.ndarray]]) -> None:
        width = int(np.prod(self.shape))
        features_type = pa.list_(pa.from_numpy_dtype(self.dtype), width)
        metadata = {"shape": json.dumps(list(self.shape))}
        schema = pa.schema([("file", pa.string()), ("features", features_type)], metadata)
        with pq.ParquetWriter(path, schema) as writer:
            for names, features in blocks:
                values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), width)
                writer.write_table(pa.table([pa.array(names, pa.string()), values], schema=schema))

    def _copy_parquet(self) -> Path:
        """Copy the features of the finished file to an .npy file, whose rows can be read in any order."""
        copy = self.folder / f"{FINISHED}.npy"
        with pq.ParquetFile(self.target) as file:
            rows = np.lib.format.open_memmap(
                copy, mode="w+", dtype=self.dtype, shape=(file.metadata.num_rows, *self.shape)
            )
            start = 0
            for batch in file.iter_batches(columns=["features"]):
                values = batch.column(0).flatten().to_numpy(zero_copy_only=False)
                rows[start : start + batch.num_rows] = values.reshape(batch.num_rows, *self.shape)
                start += batch.num_rows
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
