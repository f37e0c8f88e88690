"""Run the vision tower on batches without images too, which training in several processes needs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from pivot_hub.mllm.load import image_px


def encode_blank_images(model: LlavaForConditionalGeneration) -> None:
    """Make a model encode a black image, with no effect on its output, for every batch that has no image.

    Processes exchange the same gradients, and shards of the same weights, in the same order: if one had images and
    another had none, they would fail or wait for each other. In a step in which no process has an image, the tower
    gets gradients of zero, where a single process would give it none: AdamW then still moves it by its momentum.
    """
    inner: Any = model.model
    side, channels = image_px(model), cast(Any, inner.vision_tower.config).num_channels

    def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is not None:
            return

        def add_blank(embedding: nn.Module, ids: Any, embeds: torch.Tensor) -> torch.Tensor:
            hook.remove()
            blank = torch.zeros(1, channels, side, side, dtype=embeds.dtype, device=embeds.device)
            features = torch.stack(list(module.get_image_features(blank, return_dict=True).pooler_output))
            return embeds + 0 * features.sum().to(embeds.dtype)

        # After the embedding, as for real images: every process must gather sharded weights in the same order.
        hook = module.get_input_embeddings().register_forward_hook(add_blank)

    inner.register_forward_pre_hook(before_forward, with_kwargs=True)
