"""Patch features of an encoder: similarities of patches, and principal components as colours."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.explain.image_maps import captured_tokens, fold_features, image_tensors, inner_layer


@torch.no_grad()
def patch_tokens(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, layer: int | None = None
) -> np.ndarray:
    """Compute an image's patch features inside an MLLM, without CLS and registers.

    Args:
        model: The MLLM.
        processor: Processor of the model, which resizes the image for the encoder.
        image: Image of any size.
        layer: Hidden state of the encoder; by default the feature layer, which enters the projector.

    Returns:
        Features (H, W, D) in float32; of an MLLM that cuts tiles, those of the view of the whole image.

    Raises:
        CheckpointError: The MLLM has no image tokens.
    """
    inner: Any = cast(Any, model).model
    images = image_tensors(processor, image)
    accepted = inspect.signature(inner.get_image_features).parameters
    inputs = {name: value.to(model.device) for name, value in images.items() if name in accepted}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with captured_tokens(model, inner_layer(model, layer)) as tokens:
        inner.get_image_features(**inputs)
    return fold_features(model, tokens["features"].detach(), images)[0].float().cpu().numpy()


def similarity(tokens: np.ndarray, row: int, column: int) -> np.ndarray:
    """Compute the cosine similarity of one patch with every patch.

    Args:
        tokens: Patch features (H, W, D).
        row: Row of the patch, counted from the top.
        column: Column of the patch, counted from the left.

    Returns:
        Similarities (H, W) from -1 to 1, with 1 at the patch itself.
    """
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True).clip(1e-12)
    return unit @ unit[row, column]


def principal_colours(encoders: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float, bool]:
    """Show the first three principal components of patch features as red, green and blue.

    Encoders with the same number of channels share one basis, so that a colour means the same for each. Otherwise,
    each encoder has a basis of its own.

    Args:
        encoders: Patch features (H, W, D) of each encoder.

    Returns:
        Colours (H, W, 3) in uint8 for each encoder; the share of the variance that the three components explain
        (the smallest one if there are several bases); and whether the encoders share a basis.
    """
    joint = len({tokens.shape[-1] for tokens in encoders}) == 1
    groups = [list(encoders)] if joint else [[tokens] for tokens in encoders]
    colours, shares = [], []
    for group in groups:
        rows = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in group])
        centre = rows.mean(0)
        axes, share = _principal_axes(rows - centre)
        components = (rows - centre) @ axes.T
        low, high = np.percentile(components, [2, 98], axis=0)
        shares.append(share)
        for tokens in group:
            scaled = ((tokens - centre) @ axes.T - low) / (high - low).clip(1e-12)
            colours.append((255 * scaled.clip(0, 1)).round().astype(np.uint8))
    return colours, min(shares), joint


def _principal_axes(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the three main axes of centred features, and the share of the variance along them.

    They come from the smaller of the two products of the features with themselves, which takes a fifth of the time of a
    singular value decomposition.

    Args:
        rows: Centred features (N, D).

    Returns:
        Axes (3, D), each with a positive sum because its sign is arbitrary, and zero where features vary along fewer
        axes; and their share, 1 for features that do not vary.
    """
    wide = len(rows) < rows.shape[1]
    squares, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    squares, vectors = squares[::-1].clip(0), vectors[:, ::-1]
    kept = int((squares[:3] > 1e-6 * max(float(squares[0]), 1e-30)).sum())
    axes = np.zeros((3, rows.shape[1]), rows.dtype)
    axes[:kept] = (rows.T @ vectors[:, :kept] / np.sqrt(squares[:kept])).T if wide else vectors[:, :kept].T
    axes *= np.where(axes.sum(-1, keepdims=True) < 0, -1, 1)
    total = float(squares.sum())
    return axes, float(squares[:3].sum()) / total if total > 0 else 1.0
