"""Encode many images and write their features to one file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pivot_hub.data.image import DECODING, list_folder, open_image
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import DataError
from pivot_hub.files import write_json
from pivot_hub.provenance import machine, versions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Names and pixels (B, 3, image_px, image_px) of a batch's good images; names and reasons of its corrupt ones.
_Batch = tuple[list[str], torch.Tensor, list[dict[str, str]]]
# A stopped run resumes at the last complete shard, which holds at most so many batches and so many bytes of features.
SHARD_BATCHES, SHARD_BYTES = 32, 64_000_000
Progress = Callable[[int, int, float], None]  # takes the images done, the images in all, and images per second


def encode_folder(
    encoder: str | Path,
    folder: str | Path,
    output: str | Path,
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, Any]:
    """Encode every image of a folder; a stopped run resumes when it is called again.

    Args:
        encoder: Folder or Hub name of the encoder.
        folder: Folder that holds the images, also in its subfolders.
        output: File to write: `.parquet`, with columns `file` and `features`, or `.npy`, for which the report lists
            the file of each row.
        tokens: Whether to write all patch tokens (H*W, D) of an image instead of their mean (D).
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 (stored as it is) or bfloat16 (stored as
            float32).
        workers: Number of processes that decode images; by default one for each core, 0 for none.
        progress: Function that is called after every batch.

    Returns:
        The report, which is also written beside the output as `<output>.json`: encoder, shape of an image's features,
        files in order, corrupt images with their reason, files and linked folders that were not read, images per
        second.

    Raises:
        CheckpointError: The encoder cannot be loaded.
        DataError: There is no image, the output has an unknown suffix, or the parts of another run are in its place.
    """
    source, target = Path(folder), Path(output)
    if target.suffix not in (".parquet", ".npy"):
        raise DataError(f"{target}: features are written as .parquet or .npy; give --out such a name.")
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the folder that holds the images.")
    listing = list_folder(source)
    files = listing.images
    if not files:
        raise DataError(f"{source} holds no image file; give the folder that holds the images.")
    model, processor = read_encoder(encoder, dtype=DTYPES[dtype])
    cast(nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    names = [str(f.relative_to(source)) for f in files]
    images = FolderImages(source, names)
    metadata = {**encoder_metadata(encoder), "files_sha256": _listing_sha256(names, files)}
    report = encode_images(model, processor, images, target, metadata, tokens, batch, dtype, workers, progress)
    report |= {"not_read": listing.not_read()}
    write_json(target.with_name(f"{target.name}.json"), report)
    return report


class Images(Protocol):
    """Sequence of named images, which is copied to worker processes."""

    @property
    def names(self) -> Sequence[str]: ...

    def open(self, index: int) -> Image.Image:
        """Decode an image as RGB, or raise a DataError that names it if it cannot be decoded."""


@dataclass(frozen=True)
class FolderImages:
    """Image files by their paths relative to a folder."""

    folder: Path
    names: Sequence[str]

    def open(self, index: int) -> Image.Image:
        return open_image(self.folder / self.names[index], self.names[index])


def encode_images(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    tokens: bool = False,
    batch: int = 32,
    dtype: str = "float32",
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> dict[str, Any]:
    """Encode named images into one file; a stopped run resumes when it is called again with the same metadata.

    Args:
        model: The encoder, on its device in `dtype`.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File to write, `.parquet` or `.npy` as in `encode_folder`.
        metadata: Identity of the encoder and the images, which decides whether a stopped run can be resumed.
        tokens: Whether to write all patch tokens of an image instead of their mean.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in, as in `encode_folder`.
        workers: Number of processes that decode images, as in `encode_folder`.
        progress: Function that is called after every batch.

    Returns:
        The report that `encode_folder` describes.

    Raises:
        DataError: The parts of another run are in the output's place.
    """
    started = time.monotonic()
    count = len(images.names)
    grid = (model.config.image_size // model.config.patch_size) ** 2
    shape = [grid, model.config.hidden_size] if tokens else [model.config.hidden_size]
    stored = np.dtype("float16" if dtype == "float16" else "float32")
    per_shard = batch * _batches_per_shard(int(np.prod(shape)) * stored.itemsize * batch)
    job = {
        **metadata,
        "feature_layer": model.config.pivot["feature_layer"],
        "shape": shape,
        "dtype": dtype,
        "per_shard": per_shard,
    }
    parts = target.with_name(f"{target.name}.partial")
    _open_job(parts, job)
    shards = [_Shard(parts, range(start, min(start + per_shard, count))) for start in range(0, count, per_shard)]
    resumed = done = sum(len(shard.indices) for shard in shards if shard.is_complete())
    for shard in shards:
        if shard.is_complete():
            continue
        batches = _batches(processor, images, shard.indices, batch, workers)
        for encoded in _encode_shard(model, batches, shard, tokens, np.empty((0, *shape), stored)):
            done += encoded
            progress(done, count, (done - resumed) / (time.monotonic() - started))
    listings = [shard.listing() for shard in shards]
    files = [file for listing in listings for file in listing["files"]]
    _merge(target, shards, len(files), shape, stored)
    duration = time.monotonic() - started
    report = {
        **{k: v for k, v in job.items() if k not in ("per_shard", "files_sha256")},
        "images": len(files),
        "corrupt": [entry for listing in listings for entry in listing["corrupt"]],
        "resumed_images": resumed,
        "duration_s": round(duration, 2),
        "images_per_s": round((count - resumed) / duration, 2),
        "files": files,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(target.with_name(f"{target.name}.json"), report)
    shutil.rmtree(parts)
    return report


@dataclass(frozen=True)
class _Shard:
    """Features of consecutive images, kept in two files until all shards are complete.

    Args:
        folder: Folder of all shards.
        indices: Indices of the shard's images.
    """

    folder: Path
    indices: range

    @property
    def features_file(self) -> Path:
        return self.folder / f"{self.indices.start}.npy"

    @property
    def listing_file(self) -> Path:
        return self.folder / f"{self.indices.start}.json"

    def is_complete(self) -> bool:
        return self.listing_file.is_file()

    def write(self, features: np.ndarray, files: list[str], corrupt: list[dict[str, str]]) -> None:
        np.save(self.features_file, features)
        write_json(self.listing_file, {"files": files, "corrupt": corrupt})  # last, since it marks the shard complete

    def listing(self) -> dict[str, Any]:
        """Names of the encoded images (`files`), and names and reasons of those that are corrupt (`corrupt`)."""
        listing: dict[str, Any] = json.loads(self.listing_file.read_text())
        return listing


def _encode_shard(
    model: Any, batches: Iterator[_Batch], shard: _Shard, tokens: bool, empty: np.ndarray
) -> Iterator[int]:
    """Encode the batches of a shard and write it; yield the number of images after each batch.

    Args:
        model: The encoder.
        batches: Decoded images of the shard.
        shard: The shard to write.
        tokens: Whether to keep all patch tokens of an image instead of their mean.
        empty: Features of no image, in the shape and dtype that are written.
    """
    features = [empty]
    files: list[str] = []
    corrupt: list[dict[str, str]] = []
    for batch_files, pixels, batch_corrupt in batches:
        corrupt += batch_corrupt
        if batch_files:
            features.append(_features(model, pixels, tokens).astype(empty.dtype))
            files += batch_files
        yield len(batch_files) + len(batch_corrupt)
    shard.write(np.concatenate(features), files, corrupt)


def _batches_per_shard(batch_bytes: int) -> int:
    return max(1, min(SHARD_BATCHES, SHARD_BYTES // batch_bytes))


class _Decoded(Dataset[tuple[str, torch.Tensor | str]]):
    """Name of each image, with its pixels (3, image_px, image_px), or with the reason why it cannot be decoded."""

    def __init__(self, processor: Any, images: Images, indices: range) -> None:
        self.processor, self.images, self.indices = processor, images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | str]:
        name = self.images.names[self.indices[index]]
        try:
            image = self.images.open(self.indices[index])
        except DataError as error:
            return name, str(error)
        return name, self.processor(images=[image], return_tensors="pt")["pixel_values"][0]


def _batches(processor: Any, images: Images, indices: range, batch: int, workers: int | None) -> Iterator[_Batch]:
    """Decode images in batches."""
    count = min(os.cpu_count() or 1, 16) if workers is None else workers
    loader = DataLoader(
        _Decoded(processor, images, indices), batch, num_workers=min(count, len(indices) // batch), collate_fn=list
    )
    for rows in loader:
        good = {name: pixels for name, pixels in rows if isinstance(pixels, torch.Tensor)}
        corrupt = [{"file": name, "reason": reason} for name, reason in rows if isinstance(reason, str)]
        yield list(good), torch.stack(list(good.values())) if good else torch.empty(0), corrupt


@torch.inference_mode()
def _features(model: Any, pixels: torch.Tensor, tokens: bool) -> np.ndarray:
    outputs = model(pixels.to(model.device, model.dtype))
    chosen = outputs.last_hidden_state if tokens else outputs.pooler_output
    features: np.ndarray = chosen.float().cpu().numpy()
    return features


def _listing_sha256(names: list[str], files: Sequence[Path]) -> str:
    """Identify a folder's images by their names and sizes, without reading them, and how they are decoded."""
    listing = f"decoding {DECODING}\n" + "".join(
        f"{name}\0{file.stat().st_size}\n" for name, file in zip(names, files, strict=True)
    )
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _open_job(parts: Path, job: dict[str, Any]) -> None:
    """Create the folder of shards, or refuse one that belongs to another job."""
    file = parts / "job.json"
    if file.is_file() and json.loads(file.read_text()) != job:
        raise DataError(
            f"{parts} holds parts of another run (another encoder, other images or settings); delete it or choose "
            "another --out."
        )
    parts.mkdir(parents=True, exist_ok=True)
    write_json(file, job)


def _merge(target: Path, shards: Sequence[_Shard], rows: int, shape: list[int], dtype: np.dtype[Any]) -> None:
    """Join the shards into one file, with one shard at a time in memory, and rename it to its name when complete."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.suffix == ".npy":
            _merge_npy(temporary, shards, rows, shape, dtype)
        else:
            _merge_parquet(temporary, shards, shape, dtype)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _merge_npy(path: Path, shards: Sequence[_Shard], rows: int, shape: list[int], dtype: np.dtype[Any]) -> None:
    merged = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(rows, *shape))
    start = 0
    for shard in shards:
        features = np.load(shard.features_file)
        merged[start : start + len(features)] = features
        start += len(features)
    merged.flush()


def _merge_parquet(path: Path, shards: Sequence[_Shard], shape: list[int], dtype: np.dtype[Any]) -> None:
    width = int(np.prod(shape))
    features_type = pa.list_(pa.from_numpy_dtype(dtype), width)
    schema = pa.schema([("file", pa.string()), ("features", features_type)], {"shape": json.dumps(shape)})
    with pq.ParquetWriter(path, schema) as writer:
        for shard in shards:
            values = pa.array(np.load(shard.features_file).reshape(-1))
            features = pa.FixedSizeListArray.from_arrays(values, width)
            files = pa.array(shard.listing()["files"], pa.string())
            writer.write_table(pa.table([files, features], schema=schema))
