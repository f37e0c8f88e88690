"""How far training moved an MLLM from its parent: the weights of each part, and the features of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.mllm.trainable import parts_of
from pivot_hub.probes.result import ProbeResult, measure

BATCH = 64  # images in a forward pass


def distances(model: PreTrainedModel, parent: PreTrainedModel, conditions: dict[str, Any]) -> list[ProbeResult]:
    """Measure how far training moved each part: norm of the change over norm of the parent's weights, in percent."""
    results = []
    parent_parts = parts_of(parent)
    for part, parameters in parts_of(model).items():
        moved, size = 0.0, 0.0  # squared norms
        for name, weight in parameters.items():
            before = parent_parts[part][name]
            moved += float((weight - before).detach().double().square().sum())
            size += float(before.detach().double().square().sum())
        results.append(
            measure(
                f"shapes/distance/{part}",
                "relative_distance",
                np.array([[moved**0.5, size**0.5]]),
                protocol="norm of the change over the norm of the parent's weights",
                seed=0,
                duration_s=0,
                **conditions,
            )
        )
    return results


@torch.no_grad()
def hidden_states(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Compute the patch tokens of every hidden state of an MLLM's encoder, from the embeddings on.

    Returns:
        For each hidden state (N, H*W, D) float32.
    """
    encoder: Any = cast(Any, model).get_submodule("model.vision_tower")
    image_processor: Any = cast(Any, processor).image_processor
    prefix = prefix_tokens(encoder.config)
    batches = []
    for start in range(0, len(images), BATCH):
        pixels = image_processor(images=list(images[start : start + BATCH]), return_tensors="pt")["pixel_values"]
        output = encoder(pixels.to(model.device), output_hidden_states=True)
        batches.append([state[:, prefix:].float().cpu().numpy() for state in output.hidden_states])
    return [np.concatenate(states) for states in zip(*batches, strict=True)]


def feature_drift(
    model: PreTrainedModel,
    parent: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[Image.Image],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how far training moved the features of each layer: norm of the change over the parent's norm, in percent.

    Args:
        model: MLLM that is measured.
        parent: MLLM that it was trained from.
        processor: Processor of both.
        images: Images of test scenes.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.
    """
    states = zip(hidden_states(model, processor, images), hidden_states(parent, processor, images), strict=True)
    return [
        measure(
            f"shapes/drift/layer {layer}",
            "relative_distance",
            np.stack([np.linalg.norm(after - before, axis=(1, 2)), np.linalg.norm(before, axis=(1, 2))], axis=1),
            protocol="norm of the change of an image's patch tokens over their norm in the parent, summed over images",
            seed=0,
            duration_s=0,
            **conditions,
        )
        for layer, (after, before) in enumerate(states)
    ]
