"""Towers of native resolution behind the interface of square encoders, for probes whose heads need one grid."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.modeling_pivot import prepare_images
from pivot_hub.encoder.native_resolution import merge_side

SCENE_ROWS = 8  # rows of tokens of a scene, as the encoders of the synthetic Shapes dataset have


class FixedGrid:
    """Tower of native resolution that gives every image the grid that it gives a square one.

    Maps of another shape are interpolated bilinearly.

    Args:
        model: The tower.
        image_processor: Image processor of the tower.
        px: Side of the square image whose grid is taken.

    Attributes:
        side: Rows and columns of the grid.
    """

    @torch.no_grad()
    def __init__(self, model: Any, image_processor: Any, px: int) -> None:
        self._model, self.device, self.dtype = model, model.device, model.dtype
        inputs = prepare_images(image_processor, [Image.new("RGB", (px, px))], model.config, model.device)
        (features,) = model(**inputs).last_hidden_state
        self.side = max(features.shape[:2])
        config = model.config
        self.config = SimpleNamespace(
            image_size=self.side * config.patch_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            pivot=config.pivot,
            backbone_config=config.backbone_config,
        )

    def __call__(self, pixel_values: Tensor, **shapes: Tensor) -> BaseModelOutputWithPooling:
        """Encode images: last_hidden_state (B, side * side, D) and its mean, pooler_output (B, D)."""
        maps = self._model(pixel_values, **shapes).last_hidden_state
        tokens = torch.stack([self._resized(features).flatten(0, 1) for features in maps])
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))

    def _resized(self, features: Tensor) -> Tensor:
        """Interpolate a map (H, W, D) to (side, side, D)."""
        if features.shape[:2] == (self.side, self.side):
            return features
        channels_first = features.permute(2, 0, 1)[None].float()
        resized = functional.interpolate(channels_first, (self.side, self.side), mode="bilinear", antialias=True)
        return resized[0].permute(1, 2, 0).to(features.dtype)


def scene_px(config: Any) -> int:
    """Return the side in pixels at which scenes of the synthetic Shapes dataset are rendered for an encoder.

    It is the size of its images. For a tower of native resolution, which has none, it fills SCENE_ROWS rows and columns
    of tokens if the image processor keeps it; of merged tokens where the tower merges patches, so that all of its
    layers are measured on the same images.

    Args:
        config: Config of the encoder, a PivotVisionConfig for a tower of native resolution.
    """
    if config.image_size is not None:
        return int(config.image_size)
    native = config.backbone_config
    return int(SCENE_ROWS * merge_side(native, backbone_of(native).merge) * config.patch_size)
