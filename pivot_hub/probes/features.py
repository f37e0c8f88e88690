"""Frozen features: computed once for each encoder and set of images, and cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image

from pivot_hub.config.data_section import OnBadRow
from pivot_hub.data.image import DECODING
from pivot_hub.encoder.encode import EncodeOptions, encode_images, encode_share
from pivot_hub.encoder.encoding_run import Progress
from pivot_hub.encoder.feature_file import finished_report
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.encoder.feature_table import NotFiniteError
from pivot_hub.encoder.modeling_pivot import prepare_images
from pivot_hub.encoder.share import Share
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.files import write_json
from pivot_hub.outputs import lock_output
from pivot_hub.probes.classification.labelled_images import Labelled, ProbeImages

LAYOUT = 1  # version of the layout of cached files
BLOCK, CUDA_BLOCK = 8192, 131_072  # pooled features that are processed together, on a CPU and on a GPU
CELLS = 16_000_000  # numbers that are checked together


@dataclass(frozen=True)
class Features:
    """Features of labelled images.

    Args:
        values: (N, D) pooled features or (N, H*W, D) features of all tokens, memory-mapped from disk.
        labels: (N,) class numbers.
        skipped: One error message for each image that could not be decoded.
    """

    values: np.ndarray
    labels: np.ndarray
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pooled:
    """Selected rows of pooled features, L2-normalised as in the paper. Indexing with a slice reads that slice."""

    values: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.values.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, selection: slice) -> np.ndarray:
        values = np.asarray(self.values[self.rows[selection]], np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


@dataclass(frozen=True)
class EncodingOptions:
    """How images are encoded and where their features are cached.

    Args:
        dtype: Type that the encoder computes in. Features are stored as float32, or as float16 if this is float16.
        cache: Folder of the cached features; a folder below HF_HOME by default.
        batch: Number of images in one forward pass.
        workers: Number of processes that decode images; one for each core by default.
        progress: Function that is called after every batch.
        share: Which of several processes this is, which have the cache in common.
    """

    dtype: str = "float32"
    cache: Path | None = None
    batch: int = 32
    workers: int | None = None
    progress: Progress = lambda done, total, rate: None
    share: Share = field(default_factory=Share)

    def cache_folder(self) -> Path:
        return self.cache or Path(HF_HOME) / "pivot_hub" / "features"

    def encode_options(self, tokens: bool) -> EncodeOptions:
        return EncodeOptions(tokens, self.batch, self.dtype, workers=self.workers)


def cached_features(
    model: Any,
    image_processor: Any,
    data: Labelled,
    metadata: dict[str, Any],
    on_bad_row: OnBadRow = OnBadRow.STOP,
    tokens: bool = False,
    options: EncodingOptions = EncodingOptions(),
) -> Features:
    """Compute the features of labelled images, or read them from the cache.

    Args:
        model: The encoder, see `cached_values`.
        image_processor: Image processor of the encoder.
        data: The images and their labels.
        metadata: Name and hash of the encoder, see `cached_values`.
        on_bad_row: Whether an image that cannot be decoded raises an error, or is skipped and reported.
        tokens: Whether to keep all patch tokens of an image instead of their mean.
        options: How images are encoded.

    Raises:
        DataError: An image cannot be decoded and `on_bad_row` is STOP.
        ProbeError: A feature is not finite.
    """
    values, names, skipped = cached_values(model, image_processor, data.images, metadata, tokens, options)
    if skipped and on_bad_row == OnBadRow.STOP:
        raise DataError(skipped[0])
    positions = {name: i for i, name in enumerate(data.images.names)}
    return Features(values, data.labels[[positions[name] for name in names]], skipped)


def cached_values(
    model: Any,
    image_processor: Any,
    images: ProbeImages,
    metadata: dict[str, Any],
    tokens: bool = False,
    options: EncodingOptions = EncodingOptions(),
) -> tuple[np.ndarray, list[str], list[str]]:
    """Compute the features of images, or read them if they were cached for the same encoder, processor and images.

    A stopped run resumes where it was stopped. A cached file that was damaged is computed again.

    Args:
        model: The encoder, on its device and in `options.dtype`.
        image_processor: Image processor of the encoder.
        images: The images to encode.
        metadata: The encoder's name and `encoder_sha256`, which distinguish its weights from others.
        tokens: Whether to keep all patch tokens of an image instead of their mean.
        options: How images are encoded.

    Returns:
        (N, D) or (N, H*W, D) features, memory-mapped from disk; the names of the images; one error message for each
        image that cannot be decoded.

    Raises:
        ProbeError: A feature is not finite.
    """
    file, job = _cached_file(model, image_processor, images, metadata, tokens, options)
    report = finished_report(file)
    if report is None:
        encoded = options.encode_options(tokens)
        try:
            report = encode_images(model, image_processor, images, file, job, encoded, options.progress)
        except NotFiniteError as error:
            raise ProbeError(str(error)) from error
    values = np.load(file, mmap_mode="c")  # pages that are never written to stay on disk
    _check_finite(values, report["files"])
    return values, report["files"], [image["reason"] for image in report["corrupt"]]


def cache_share(
    model: Any,
    image_processor: Any,
    images: ProbeImages,
    metadata: dict[str, Any],
    tokens: bool = False,
    options: EncodingOptions = EncodingOptions(),
) -> None:
    """Compute the share of this process of what `cached_values` then returns, see there.

    Raises:
        ProbeError: A feature is not finite.
    """
    file, job = _cached_file(model, image_processor, images, metadata, tokens, options)
    if finished_report(file) is not None:
        return
    encoded = options.encode_options(tokens)
    try:
        encode_share(model, image_processor, images, file, job, options.share, encoded, options.progress)
    except NotFiniteError as error:
        raise ProbeError(str(error)) from error


def _cached_file(
    model: Any,
    image_processor: Any,
    images: ProbeImages,
    metadata: dict[str, Any],
    tokens: bool,
    options: EncodingOptions,
) -> tuple[Path, dict[str, Any]]:
    """Return the file that features are cached in, and what distinguishes them from others."""
    job = {
        **metadata,
        "layer": model.config.pivot["feature_layer"],
        "processor": image_processor.to_dict(),
        "images": images.stamp(),
        "tokens": tokens,
        "dtype": options.dtype,
        "layout": LAYOUT,
        "decoding": DECODING,
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    return options.cache_folder() / f"{key}.npy", {**metadata, "key": key}


def cached_digests(images: ProbeImages, options: EncodingOptions = EncodingOptions()) -> np.ndarray:
    """Hash the file of each image, or read the hashes if they were cached for the same images: (N, 32) uint8."""
    file = options.cache_folder() / f"{hashlib.sha256(images.stamp().encode()).hexdigest()}.digests.npy"

    def digest() -> None:
        digests = b"".join(images.digest(i) for i in range(len(images.names)))
        np.save(file, np.frombuffer(digests, np.uint8).reshape(-1, 32))

    _ensure_cached([file], digest)
    return np.load(file)


def _ensure_cached(files: Sequence[Path], make: Callable[[], None]) -> None:
    """Make cached files unless they are there with the contents that they were written with.

    The hashes of the contents are written beside the first file, last. Another process that makes the same files is
    waited for.
    """
    hash_file = files[0].with_name(f"{files[0].name}.sha256")
    with lock_output(files[0].with_name(f"{files[0].name}.cache"), wait=True):
        try:
            if json.loads(hash_file.read_text()) == _hashes(files):
                return
        except (OSError, ValueError):  # a file is missing, or is no JSON
            pass
        for file in (hash_file, *files):
            file.unlink(missing_ok=True)
        make()
        write_json(hash_file, _hashes(files))


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    hashes = {}
    for file in files:
        with file.open("rb") as stored:
            hashes[file.name] = hashlib.file_digest(stored, "sha256").hexdigest()
    return hashes


def _check_finite(values: np.ndarray, names: list[str]) -> None:
    """Raise a ProbeError that names the first image whose features are not finite."""
    cells = int(np.prod(values.shape[1:]))
    rows = max(1, CELLS // cells)
    for start in range(0, len(values), rows):
        finite = np.isfinite(values[start : start + rows]).reshape(-1, cells).all(1)
        if not finite.all():
            raise ProbeError(
                f"the features of {names[start + int(finite.argmin())]} are not finite (NaN or infinite); "
                "check the encoder, or compute in float32 or bfloat16."
            )


@torch.no_grad()
def patch_features(
    model: FeatureModel, image_processor: Any, images: Iterable[Image.Image], batch: int = 64
) -> np.ndarray:
    """Compute the patch tokens of images at the feature layer.

    Returns:
        (N, H*W, D) float32.
    """
    features = []
    for batch_images in _batched(images, batch):
        inputs = prepare_images(image_processor, batch_images, model.config, model.device)
        features.append(model(**inputs).last_hidden_state.float().cpu().numpy())
    return np.concatenate(features)


def pooled(tokens: np.ndarray) -> np.ndarray:
    """Average over patches and L2-normalise, as in the paper. (N, H*W, D) -> (N, D)."""
    mean = tokens.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def standardised(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that scales columns by the mean and spread of the train split, so one C fits every encoder."""
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-8
    return lambda features: (features - mean) / spread


def _batched(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        yield batch
