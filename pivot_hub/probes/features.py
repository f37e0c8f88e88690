"""Frozen features: what a probe sees of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image


class FeatureModel(Protocol):
    """What a probe asks of an encoder: `PivotVisionModel`, or an export of one."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


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
