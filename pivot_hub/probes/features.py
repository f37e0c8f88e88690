"""Frozen features: what a probe sees of images, computed once for an encoder and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image

from pivot_hub.data.image import DECODING
from pivot_hub.encoder.encode import Progress, encode_images
from pivot_hub.encoder.feature_model import FeatureModel
from pivot_hub.errors import DataError, ProbeError
from pivot_hub.probes.classification.labelled_images import Labelled, ProbeImages

LAYOUT = 1  # of the cache's files
BLOCK = 8192  # pooled features that are looked at together
CELLS = 16_000_000  # numbers that are looked at together


@dataclass(frozen=True)
class Features:
    """Features of labelled images.

    Args:
        values: (N, D), or of all tokens (N, H*W, D), mapped from disk.
        labels: (N,) class numbers.
        skipped: a sentence for each image that could not be decoded.
    """

    values: np.ndarray
    labels: np.ndarray
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Pooled:
    """Chosen rows of pooled features, L2-normalised: the paper's image feature. Read a slice at a time."""

    values: np.ndarray
    rows: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.values.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, some: slice) -> np.ndarray:
        values = np.asarray(self.values[self.rows[some]], np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)


def cached_features(
    model: Any,
    image_processor: Any,
    data: Labelled,
    metadata: dict[str, Any],
    on_bad_row: str = "stop",
    **options: Any,
) -> Features:
    """Features of labelled images.

    Args:
        model, image_processor, facts, **options: see `cached_values`.
        data: the images with their labels.
        on_bad_row: `stop` at an image that cannot be decoded, or `skip` it and say so.

    Raises:
        DataError: an image cannot be decoded and `on_bad_row` says stop.
        ProbeError: a feature is not finite.
    """
    values, names, skipped = cached_values(model, image_processor, data.images, metadata, **options)
    if skipped and on_bad_row == "stop":
        raise DataError(skipped[0])
    place = {name: i for i, name in enumerate(data.images.names)}
    return Features(values, data.labels[[place[name] for name in names]], skipped)


def cached_values(
    model: Any,
    image_processor: Any,
    images: ProbeImages,
    metadata: dict[str, Any],
    tokens: bool = False,
    dtype: str = "float32",
    cache: Path | None = None,
    batch: int = 32,
    workers: int | None = None,
    progress: Progress = lambda done, total, rate: None,
) -> tuple[np.ndarray, list[str], list[str]]:
    """Features of images, or those that were computed before of the same encoder, processor, images and layer.

    A stopped run goes on where it was.

    Args:
        model: the encoder, on its device in `dtype`.
        image_processor: its own.
        images: to encode.
        facts: encoder and encoder_sha256, which tell its weights from others.
        tokens: all patch tokens of an image instead of their mean.
        dtype: the encoder computes in; what is kept is float32, of float16 float16.
        cache: folder; below HF_HOME by default.
        batch: images of one pass.
        workers: processes that decode; one a core by default.
        progress: called after every batch.

    Returns:
        (N, D) or (N, H*W, D), mapped from disk; the names of their images; a sentence for each that cannot be decoded.

    Raises:
        ProbeError: a feature is not finite.
    """
    job = {
        **metadata,
        "layer": model.config.pivot["feature_layer"],
        "processor": image_processor.to_dict(),
        "images": images.stamp(),
        "tokens": tokens,
        "dtype": dtype,
        "layout": LAYOUT,
        "decoding": DECODING,
    }
    key = hashlib.sha256(json.dumps(job, sort_keys=True, default=str).encode()).hexdigest()
    file = (cache or Path(HF_HOME) / "pivot_hub" / "features") / f"{key}.npy"
    report = file.with_name(f"{file.name}.json")  # written last
    if not report.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        told = {**metadata, "key": key}
        encode_images(model, image_processor, images, file, told, tokens, batch, dtype, workers, progress)
    made = json.loads(report.read_text())
    values = np.load(file, mmap_mode="c")  # pages that nobody writes to stay on disk
    rows = max(1, CELLS // int(np.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        finite = np.isfinite(values[start : start + rows]).reshape(-1, int(np.prod(values.shape[1:]))).all(1)
        if not finite.all():
            raise ProbeError(
                f"the features of {made['files'][start + int(finite.argmin())]} are not finite (NaN or infinite); "
                "check the encoder, or compute in float32 or bfloat16."
            )
    return values, made["files"], [bad["reason"] for bad in made["corrupt"]]


@torch.no_grad()
def patch_features(
    model: FeatureModel, image_processor: Any, images: Iterable[Image.Image], batch: int = 64
) -> np.ndarray:
    """Patch tokens of images at the feature layer.

    Returns:
        (N, H*W, D) float32.
    """
    made = []
    for some in _batched(images, batch):
        pixels = image_processor(images=some, return_tensors="pt")["pixel_values"]
        made.append(model(pixels.to(model.device)).last_hidden_state.float().cpu().numpy())
    return np.concatenate(made)


def pooled(tokens: np.ndarray) -> np.ndarray:
    """Mean over patches, L2-normalised: the paper's image feature. (N, H*W, D) -> (N, D)."""
    mean = tokens.mean(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def standardised(train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Scale columns to the mean and spread they have on the training part, so one C fits every encoder."""
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-8
    return lambda features: (features - mean) / spread


def _batched(images: Iterable[Image.Image], size: int) -> Iterator[list[Image.Image]]:
    rest = iter(images)
    while some := list(islice(rest, size)):
        yield some
