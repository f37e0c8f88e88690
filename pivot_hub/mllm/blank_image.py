"""Run the vision tower on batches without images too, which training in several processes needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.mllm.inputs import blank_images


def encode_blank_images(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Make a model encode a black image, with no effect on its output, for every batch that has no image.

    Processes exchange the same gradients, and shards of the same weights, in the same order: if one had images and
    another had none, they would fail or wait for each other. In a step in which no process has an image, the tower
    gets gradients of zero, where a single process would give it none: AdamW then still moves it by its momentum.
    """
    inner: Any = model.model
    blank = blank_images(model, processor)

    def before_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values") is not None:
            return

        def add_blank(embedding: nn.Module, ids: Any, embeds: torch.Tensor) -> torch.Tensor:
            hook.remove()
            images = {name: value.to(embeds.device) for name, value in blank.items()}
            outputs = module.get_image_features(**images, return_dict=True)
            nothing = 0 * sum(feature.sum() for feature in outputs.pooler_output)
            for level in getattr(outputs, "deepstack_features", None) or ():
                nothing = nothing + 0 * sum(feature.sum() for feature in level)
            return embeds + nothing.to(embeds.dtype)

        # After the embedding, as for real images: every process must gather sharded weights in the same order.
        hook = module.get_input_embeddings().register_forward_hook(add_blank)

    inner.register_forward_pre_hook(before_forward, with_kwargs=True)
