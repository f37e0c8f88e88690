"""Patch features of an encoder: how alike places of an image are to it, and their main axes as colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.explain.gradcam import feature_layer


@torch.inference_mode()
def patch_tokens(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Image.Image, layer: int | None = None
) -> np.ndarray:
    """Patch features inside an MLLM, CLS and registers dropped.

    Args:
        model: the MLLM.
        processor: its processor, which brings the image to the encoder's size.
        image: any size.
        layer: hidden state of the encoder; by default the feature layer, which enters the projector.

    Returns:
        (H, W, D) float32.
    """
    tower: Any = model.model.vision_tower
    pixels = cast(Any, processor).image_processor(images=image, return_tensors="pt")["pixel_values"]
    states = tower(pixels.to(model.device, model.dtype), output_hidden_states=True).hidden_states
    tokens = states[feature_layer(model) if layer is None else layer][0, prefix_tokens(tower.config) :]
    side = round(tokens.shape[0] ** 0.5)
    return tokens.reshape(side, side, -1).float().cpu().numpy()


def similarity(tokens: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cosine of one patch with every patch.

    Args:
        tokens: (H, W, D).
        row: of the patch, from the top; column: from the left.

    Returns:
        (H, W), from -1 to 1; 1 at the patch itself.
    """
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True).clip(1e-12)
    return unit @ unit[row, column]


def principal_colours(encoders: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float, bool]:
    """Show the three main axes of patch features as red, green and blue.

    Encoders of one width get one basis, so that a colour means the same in each; others get one each.

    Args:
        encoders: (H, W, D) of each.

    Returns:
        Of each (H, W, 3) uint8; the share of all variance that the three axes hold (the smallest, of several bases);
        and whether the basis is one.
    """
    joint = len({tokens.shape[-1] for tokens in encoders}) == 1
    groups = [list(encoders)] if joint else [[tokens] for tokens in encoders]
    colours, shares = [], []
    for group in groups:
        rows = np.concatenate([tokens.reshape(-1, tokens.shape[-1]) for tokens in group])
        centre = rows.mean(0)
        _, lengths, axes = np.linalg.svd(rows - centre, full_matrices=False)
        axes = axes[:3] * np.sign(axes[:3].sum(-1, keepdims=True) + 1e-12)  # an axis has no sign of its own
        placed = (rows - centre) @ axes.T
        low, high = np.percentile(placed, [2, 98], axis=0)
        shares.append(float((lengths[:3] ** 2).sum() / (lengths**2).sum()))
        for tokens in group:
            scaled = ((tokens - centre) @ axes.T - low) / (high - low).clip(1e-12)
            colours.append((255 * scaled.clip(0, 1)).round().astype(np.uint8))
    return colours, min(shares), joint
