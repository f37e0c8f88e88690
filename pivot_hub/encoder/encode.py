"""Encode many images and write their features to one file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pivot_hub.data.image import DECODING, list_folder, open_image
from pivot_hub.encoder.feature_parts import (
    FeatureParts,
    check_target,
    finished_report,
    report_file,
)
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import DataError
from pivot_hub.files import write_json
from pivot_hub.outputs import lock_output
from pivot_hub.provenance import file_sha256, machine, versions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Names and pixels (B, 3, image_px, image_px) of a batch's good images; reasons of its corrupt ones by their names.
_Batch = tuple[list[str], np.ndarray, dict[str, str]]
# A stopped run resumes at the last complete shard, which holds at most so many batches and so many bytes of features.
SHARD_BATCHES, SHARD_BYTES = 32, 64_000_000
Progress = Callable[[int, int, float], None]  # takes the images done, the images in all, and images per second


class NotFiniteError(DataError):
    """Features of an image are NaN or infinite."""


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

    If images were added to a folder or replaced since a finished run, only those are encoded.

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
        CheckpointError: The encoder cannot be loaded, or gives other features than it was published with.
        DataError: There is no image, the output has an unknown suffix, the parts of another run are in its place, or
            features are not finite.
        OutputError: The output was not written by this function, or another process is writing it.
    """
    source, target = Path(folder), Path(output)
    if target.suffix not in (".parquet", ".npy"):
        raise DataError(f"{target}: features are written as .parquet or .npy; give --out such a name.")
    if dtype not in DTYPES:
        raise DataError(f"dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}.")
    if batch < 1:
        raise DataError(f"batch {batch}: give 1 image or more.")
    if workers is not None and workers < 0:
        raise DataError(f"workers {workers}: give 0 or more processes.")
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the folder that holds the images.")
    listing = list_folder(source)
    if not listing.images:
        raise DataError(f"{source} holds no image file; give the folder that holds the images.")
    check_target(target)
    model, processor = read_encoder(encoder, dtype=DTYPES[dtype])
    cast(nn.Module, model).to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    images = FolderImages(source, [f.relative_to(source).as_posix() for f in listing.images])
    return encode_images(
        model,
        processor,
        images,
        target,
        encoder_metadata(encoder),
        tokens,
        batch,
        dtype,
        workers,
        progress,
        stamps=_file_hashes(listing.images),
        notes={"not_read": listing.not_read()},
    )


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
    stamps: Sequence[str] | None = None,
    notes: Mapping[str, Any] | None = None,
    cache: bool = False,
) -> dict[str, Any]:
    """Encode named images into one file; a stopped run resumes when it is called again with the same metadata.

    Args:
        model: The encoder, on its device in `dtype`.
        processor: Image processor of the encoder.
        images: Images to encode, in order.
        target: File to write, `.parquet` or `.npy` as in `encode_folder`.
        metadata: Identity of the encoder, which decides whether a stopped run can be resumed; without stamps, that of
            the images too.
        tokens: Whether to write all patch tokens of an image instead of their mean.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in, as in `encode_folder`.
        workers: Number of processes that decode images, as in `encode_folder`.
        progress: Function that is called after every batch.
        stamps: Hash of each image, in order. Features of an image whose name and hash are known are not computed again.
        notes: Further entries of the report.
        cache: Whether the file is a cache: another process that writes it is waited for, and whatever is in its place
            is replaced.

    Returns:
        The report that `encode_folder` describes.

    Raises:
        DataError: The parts of another run are in the output's place, features are not finite, or the processes that
            decode images cannot run.
        OutputError: The output was not written by this function, or another process is writing it.
    """
    with lock_output(target, wait=cache):
        if not cache:
            check_target(target)
        return _encode_locked(
            model, processor, images, target, metadata, tokens, batch, dtype, workers, progress, stamps, notes or {}
        )


def _encode_locked(
    model: Any,
    processor: Any,
    images: Images,
    target: Path,
    metadata: dict[str, Any],
    tokens: bool,
    batch: int,
    dtype: str,
    workers: int | None,
    progress: Progress,
    stamps: Sequence[str] | None,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Encode named images as `encode_images` does, while the lock of the output is held."""
    started = time.monotonic()
    names, count = images.names, len(images.names)
    stamp_of = dict(zip(names, stamps or [""] * count, strict=True))
    grid = (model.config.image_size // model.config.patch_size) ** 2
    shape = [grid, model.config.hidden_size] if tokens else [model.config.hidden_size]
    stored = np.dtype("float16" if dtype == "float16" else "float32")
    per_shard = batch * _batches_per_shard(int(np.prod(shape)) * stored.itemsize * batch)
    identity = {**metadata, "feature_layer": model.config.pivot["feature_layer"], "shape": shape, "dtype": dtype}
    job = {**identity, "processor": processor.to_dict(), "decoding": DECODING}
    parts = FeatureParts(target, job, shape, stored)
    encoded = parts.open(stamp_of)
    resumed = len(encoded)
    remaining = [index for index, name in enumerate(names) if name not in encoded]
    for start in range(0, len(remaining), per_shard):
        indices = remaining[start : start + per_shard]
        features = [np.empty((0, *shape), stored)]
        shard_names: list[str] = []
        corrupt: dict[str, str] = {}
        for batch_names, pixels, batch_corrupt in _batches(processor, images, indices, batch, workers):
            if batch_names:
                features.append(_features(model, pixels, tokens, batch_names, stored))
            shard_names += batch_names
            corrupt |= batch_corrupt
            done = len(encoded) + len(shard_names) + len(corrupt)
            progress(done, count, (done - resumed) / (time.monotonic() - started))
        parts.write_shard(encoded, np.concatenate(features), shard_names, corrupt, stamp_of)
    files = [name for name in names if name in encoded.rows]
    report = None if remaining else finished_report(target)
    if report is None or report["files"] != files or report.get("job_sha256") != parts.job_sha256:
        parts.merge(encoded, files, per_shard)
    duration = time.monotonic() - started
    report = {
        **identity,
        "job_sha256": parts.job_sha256,
        "features_sha256": file_sha256(target),
        "images": len(files),
        "corrupt": [
            {"file": n, "reason": encoded.corrupt[n], "sha256": stamp_of[n]} for n in names if n in encoded.corrupt
        ],
        "resumed_images": resumed,
        "duration_s": round(duration, 2),
        "images_per_s": round((count - resumed) / duration, 2),
        "files": files,
        "images_sha256": [stamp_of[name] for name in files],
        **notes,
        "machine": machine(),
        "versions": versions(),
    }
    write_json(report_file(target), report)
    parts.delete()
    return report


def _file_hashes(files: Sequence[Path]) -> list[str]:
    """Hash image files; a file that cannot be read has its own stamp, and is listed as corrupt when it is decoded."""

    def stamp(file: Path) -> str:
        try:
            return file_sha256(file)
        except OSError as error:
            return f"unreadable {error.errno}"

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(stamp, files))


def _batches_per_shard(batch_bytes: int) -> int:
    return max(1, min(SHARD_BATCHES, SHARD_BYTES // batch_bytes))


class _Decoded(Dataset[tuple[str, np.ndarray | str]]):
    """Name of each image, with its pixels (3, image_px, image_px), or with the reason why it cannot be decoded."""

    def __init__(self, processor: Any, images: Images, indices: Sequence[int]) -> None:
        self.processor, self.images, self.indices = processor, images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray | str]:
        name = self.images.names[self.indices[index]]
        try:
            image = self.images.open(self.indices[index])
        except DataError as error:
            return name, str(error)
        return name, self.processor(images=[image], return_tensors="np")["pixel_values"][0]


def _collate(rows: Sequence[tuple[str, np.ndarray | str]]) -> _Batch:
    """Join the images of a batch.

    Worker processes send arrays, because every tensor would take a file descriptor, and where those run out the
    workers would wait indefinitely.
    """
    good = {name: pixels for name, pixels in rows if isinstance(pixels, np.ndarray)}
    corrupt = {name: reason for name, reason in rows if isinstance(reason, str)}
    return list(good), np.stack(list(good.values())) if good else np.empty(0), corrupt


def _batches(
    processor: Any, images: Images, indices: Sequence[int], batch: int, workers: int | None
) -> Iterator[_Batch]:
    """Decode images in batches.

    Raises:
        DataError: The processes that decode images cannot be started, or one of them ended.
    """
    count = min(os.cpu_count() or 1, 16) if workers is None else workers
    count = min(count, len(indices) // batch)
    loader = DataLoader(_Decoded(processor, images, indices), batch, num_workers=count, collate_fn=_collate)
    try:
        yield from loader
    except (OSError, RuntimeError) as error:
        if count == 0 and not isinstance(error, OSError):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"the images cannot be decoded in {count} processes ({reason}); give fewer --workers, or raise the limits "
            "of open files (`ulimit -n`) and memory."
        ) from error


@torch.inference_mode()
def _features(model: Any, pixels: np.ndarray, tokens: bool, names: list[str], stored: np.dtype[Any]) -> np.ndarray:
    """Encode a batch of images.

    Raises:
        NotFiniteError: The features of an image are not finite in the stored type.
    """
    outputs = model(torch.from_numpy(pixels).to(model.device, model.dtype))
    chosen = outputs.last_hidden_state if tokens else outputs.pooler_output
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused below
        features: np.ndarray = chosen.float().cpu().numpy().astype(stored)
    finite = np.isfinite(features).reshape(len(features), -1).all(1)
    if not finite.all():
        raise NotFiniteError(
            f"the features of {names[int(finite.argmin())]} are not finite (NaN or infinite); check the encoder with "
            "`pivot verify`, or compute in float32 or bfloat16."
        )
    return features
