"""Encode many images and write their features to one file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from pivot_hub.encoder.image_shapes import input_names, token_shape
from pivot_hub.encoder.repository import encoder_metadata, read_encoder
from pivot_hub.errors import DataError
from pivot_hub.files import write_json
from pivot_hub.outputs import lock_output
from pivot_hub.provenance import file_sha256, machine, versions

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Inputs of the encoder's forward by their names: pixel_values, and for a tower of native resolution its shapes.
_Inputs = dict[str, np.ndarray]
# Names and inputs of a batch's good images; reasons of its corrupt ones by their names.
_Batch = tuple[list[str], _Inputs, dict[str, str]]
# A stopped run resumes at the last complete shard, which holds at most so many batches and so many bytes of features.
NUMBERS = 32_000_000  # of the pixels of images of their own shapes in a forward pass
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
    feature_layer: int | str | None = None,
) -> dict[str, Any]:
    """Encode every image of a folder; a stopped run resumes when it is called again.

    If images were added to a folder or replaced since a finished run, only those are encoded.

    Args:
        encoder: Folder or Hub name of the encoder.
        folder: Folder that holds the images, also in its subfolders.
        output: File to write: `.parquet`, with columns `file` and `features`, or `.npy`, for which the report lists
            the file of each row.
        tokens: Whether to write all patch tokens (H*W, D) of an image instead of their mean (D). Those of a tower of
            native resolution are written as .parquet only, in which the columns `height` and `width` are the shape of
            the image's own grid.
        batch: Number of images in a forward pass.
        dtype: Precision that the encoder computes in: float32, float16 (stored as it is) or bfloat16 (stored as
            float32).
        workers: Number of processes that decode images; by default one for each core, 0 for none.
        progress: Function that is called after every batch.
        feature_layer: Hidden state to write, see `PivotVisionModel.from_pretrained`; the repository's own by default.

    Returns:
        The report, which is also written beside the output as `<output>.json`: encoder, shape of an image's features,
        files in order, corrupt images with their reason, files and linked folders that were not read, images per
        second.

    Raises:
        CheckpointError: The encoder cannot be loaded, or gives other features than it was published with.
        DataError: There is no image, the output has an unknown suffix or one that the features do not fit, the parts
            of another run are in its place, or features are not finite.
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
    model, processor = read_encoder(encoder, dtype=DTYPES[dtype], feature_layer=feature_layer)
    check_suffix(target, model.config, tokens)
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


def check_suffix(target: Path, config: Any, tokens: bool) -> None:
    """Refuse an .npy file for tokens of images that each have a shape of their own.

    Raises:
        DataError: The file cannot hold the tokens; the message names the remedy.
    """
    if tokens and config.image_size is None and target.suffix == ".npy":
        raise DataError(
            f"{target}: patch tokens of a tower of native resolution have another shape for each image, which .npy "
            "does not hold; give --out a name that ends in .parquet, or leave --tokens out."
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
        DataError: The parts of another run are in the output's place, the output's suffix does not fit, features are
            not finite, or the processes that decode images cannot run.
        OutputError: The output was not written by this function, or another process is writing it.
    """
    check_suffix(target, model.config, tokens)
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
    shape: list[int | str] = token_shape(model.config) if tokens else [model.config.hidden_size]
    stored = np.dtype("float16" if dtype == "float16" else "float32")
    identity = {**metadata, "feature_layer": model.config.pivot["feature_layer"], "shape": shape, "dtype": dtype}
    job = {**identity, "processor": processor.to_dict(), "decoding": DECODING}
    parts = FeatureParts(target, job, shape, stored)
    encoded = parts.open(stamp_of)
    resumed = len(encoded)
    remaining = [index for index, name in enumerate(names) if name not in encoded]
    shard = _Shard()
    for batch_names, inputs, corrupt in _batches(model, processor, images, remaining, batch, workers):
        features = _features(model, inputs, tokens, batch_names, stored) if batch_names else []
        batch_bytes = sum(f.nbytes for f in features)
        if shard.is_full(batch_bytes):
            parts.write_shard(encoded, shard.features, shard.names, shard.corrupt, stamp_of)
            shard = _Shard()
        shard.add(batch_names, features, corrupt)
        done = len(encoded) + len(shard)
        progress(done, count, (done - resumed) / (time.monotonic() - started))
    if len(shard):
        parts.write_shard(encoded, shard.features, shard.names, shard.corrupt, stamp_of)
    files = [name for name in names if name in encoded.rows]
    report = None if remaining else finished_report(target)
    if report is None or report["files"] != files or report.get("job_sha256") != parts.job_sha256:
        parts.merge(encoded, files, batch * _batches_per_shard(batch * parts.image_bytes(encoded)))
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
        **parts.grids(encoded, files),
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


@dataclass
class _Shard:
    """Images that were encoded and are not on disk yet."""

    names: list[str] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)
    batches: int = 0
    size: int = 0  # in bytes

    def __len__(self) -> int:
        return len(self.names) + len(self.corrupt)

    def is_full(self, batch_bytes: int) -> bool:
        """Return whether a further batch would make the shard longer than a stopped run may lose."""
        return self.batches == SHARD_BATCHES or (self.batches > 0 and self.size + batch_bytes > SHARD_BYTES)

    def add(self, names: list[str], features: list[np.ndarray], corrupt: dict[str, str]) -> None:
        self.names += names
        self.features += features
        self.corrupt |= corrupt
        self.batches += 1
        self.size += sum(f.nbytes for f in features)


def _batches_per_shard(batch_bytes: int) -> int:
    return max(1, min(SHARD_BATCHES, SHARD_BYTES // batch_bytes))


class _Decoded(Dataset[tuple[str, _Inputs | str]]):
    """Name of each image, with its inputs (1, ...) of the encoder, or with the reason why it cannot be used."""

    def __init__(self, model: Any, processor: Any, images: Images, indices: Sequence[int]) -> None:
        self.processor, self.images, self.indices = processor, images, indices
        self.inputs = input_names(model.config)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[str, _Inputs | str]:
        name = self.images.names[self.indices[index]]
        try:
            image = self.images.open(self.indices[index])
        except DataError as error:
            return name, str(error)
        try:
            prepared = self.processor(images=[image], return_tensors="pt")
        except ValueError as error:
            if len(self.inputs) == 1:
                raise
            # Processors of towers of native resolution refuse extreme shapes.
            return name, f"{name}: its image processor does not take {image.width} x {image.height} px ({error})"
        return name, {key: np.asarray(prepared[key]) for key in self.inputs}


def _collate(rows: Sequence[tuple[str, _Inputs | str]]) -> _Batch:
    """Join the images of a batch.

    Worker processes send arrays, because every tensor would take a file descriptor, and where those run out the
    workers would wait indefinitely.
    """
    good = {name: inputs for name, inputs in rows if isinstance(inputs, dict)}
    corrupt = {name: reason for name, reason in rows if isinstance(reason, str)}
    return list(good), _joined(list(good.values())), corrupt


def _joined(inputs: Sequence[_Inputs]) -> _Inputs:
    """Join the inputs of single images to those of a batch; empty of none."""
    return {key: _join([one[key] for one in inputs]) for key in (inputs[0] if inputs else ())}


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Join inputs of single images along their first axis, padded with zeros to the largest along the others.

    Image processors join images in the same way: they pad images that a tower tells apart by their shapes, and write
    the patches of one image after those of another.
    """
    largest = [max(sides) for sides in zip(*(a.shape[1:] for a in arrays), strict=True)]
    padded = [
        np.pad(a, [(0, 0), *((0, most - side) for side, most in zip(a.shape[1:], largest, strict=True))])
        if list(a.shape[1:]) != largest
        else a
        for a in arrays
    ]
    return np.concatenate(padded)


def _batches(
    model: Any, processor: Any, images: Images, indices: Sequence[int], batch: int, workers: int | None
) -> Iterator[_Batch]:
    """Decode images in batches.

    Raises:
        DataError: The processes that decode images cannot be started, or one of them ended.
    """
    count = min(os.cpu_count() or 1, 16) if workers is None else workers
    count = min(count, len(indices) // batch)
    decoded = _Decoded(model, processor, images, indices)
    at_once = batch if len(decoded.inputs) == 1 else 1  # images of their own shapes may be large
    loader = DataLoader(decoded, at_once, num_workers=count, collate_fn=_collate)
    try:
        yield from loader if at_once == batch else _grouped(loader, batch)
    except (OSError, RuntimeError) as error:
        if count == 0 and not isinstance(error, OSError):
            raise
        reason = str(error).strip().splitlines()[-1]
        raise DataError(
            f"the images cannot be decoded in {count} processes ({reason}); give fewer --workers, or raise the limits "
            "of open files (`ulimit -n`) and memory."
        ) from error


def _grouped(singles: Iterable[_Batch], batch: int) -> Iterator[_Batch]:
    """Group single images to batches that hold at most `batch` images, and NUMBERS numbers unless one holds more."""
    names: list[str] = []
    inputs: list[_Inputs] = []
    corrupt: dict[str, str] = {}
    numbers = 0
    for own_names, own_inputs, own_corrupt in singles:
        size = own_inputs["pixel_values"].size if own_inputs else 0
        if len(names) + len(corrupt) == batch or (names and numbers + size > NUMBERS):
            yield names, _joined(inputs), corrupt
            names, inputs, corrupt, numbers = [], [], {}, 0
        names, corrupt, numbers = names + own_names, corrupt | own_corrupt, numbers + size
        inputs += [own_inputs] if own_inputs else []
    if names or corrupt:
        yield names, _joined(inputs), corrupt


@torch.inference_mode()
def _features(model: Any, inputs: _Inputs, tokens: bool, names: list[str], stored: np.dtype[Any]) -> list[np.ndarray]:
    """Encode a batch of images.

    Returns:
        The features of each image: (D), (H*W, D), or (H, W, D) for a tower of native resolution.

    Raises:
        NotFiniteError: The features of an image are not finite in the stored type.
    """
    tensors = {key: torch.from_numpy(array).to(model.device) for key, array in inputs.items()}
    outputs = model(**{**tensors, "pixel_values": tensors["pixel_values"].to(model.dtype)})
    chosen = outputs.last_hidden_state if tokens else outputs.pooler_output
    moved = [f.float().cpu() for f in chosen] if isinstance(chosen, tuple) else chosen.float().cpu()
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused below
        features = [image.numpy().astype(stored) for image in moved]
    for name, values in zip(names, features, strict=True):
        if not np.isfinite(values).all():
            raise NotFiniteError(
                f"the features of {name} are not finite (NaN or infinite); check the encoder with `pivot verify`, or "
                "compute in float32 or bfloat16."
            )
    return features
