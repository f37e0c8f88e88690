"""How far training moved an MLLM from its parent: the weights of each part, and the features of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.errors import ProbeError
from pivot_hub.mllm.families import family_of
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


def hidden_states(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> list[np.ndarray]:
    """Compute the patch tokens of every hidden state of an MLLM's encoder, from the embeddings on.

    Args:
        model: MLLM of any family whose tower takes a whole image.
        processor: Processor of the MLLM.
        images: Images of one size.

    Returns:
        For each hidden state (N, H*W, D) float32.

    Raises:
        ProbeError: The MLLM cuts images into tiles.
    """
    encoder = _encoder_of(model, processor)
    prefix = prefix_tokens(encoder.backbone.config)
    batches = []
    for outputs, shapes in _outputs(encoder, images):
        if shapes:
            layers = range(len(outputs.hidden_states))
            states = [torch.stack(encoder.maps(outputs, layer, shapes)).flatten(1, 2) for layer in layers]
        else:
            states = [state[:, prefix:] for state in outputs.hidden_states]
        batches.append([state.float().cpu().numpy() for state in states])
    return [np.concatenate(states) for states in zip(*batches, strict=True)]


def features(model: PreTrainedModel, processor: ProcessorMixin, images: Sequence[Image.Image]) -> np.ndarray:
    """Compute the patch tokens that enter an MLLM's projector, (N, H*W, D) float32; see `hidden_states`."""
    encoder = _encoder_of(model, processor)
    batches = []
    for outputs, shapes in _outputs(encoder, images):
        tokens = outputs.last_hidden_state
        batches.append((torch.stack(tokens).flatten(1, 2) if shapes else tokens).float().cpu().numpy())
    return np.concatenate(batches)


def _encoder_of(model: PreTrainedModel, processor: ProcessorMixin) -> PivotVisionModel:
    """Return the tower of an MLLM, which is not copied, with its feature layer and image processor."""
    family = family_of(model.config)
    tower = getattr(model.model, family.tower)
    encoder = PivotVisionModel(
        PivotVisionConfig(tower.config, {"feature_layer": family.feature_layer(model.config)}), tower
    )
    encoder.image_processor = cast(Any, processor).image_processor
    return encoder


@torch.no_grad()
def _outputs(encoder: PivotVisionModel, images: Sequence[Image.Image]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield an encoder's outputs batch by batch, with the images' shapes for a tower of native resolution."""
    for start in range(0, len(images), BATCH):
        inputs = encoder.prepare(list(images[start : start + BATCH]))
        if inputs["pixel_values"].ndim == 5:
            raise ProbeError(
                "the MLLM cuts images into tiles, of which features cannot be compared patch by patch; leave out the "
                "measures distance and counterfactuals."
            )
        outputs = encoder(**inputs, output_hidden_states=True)
        yield outputs, {name: value for name, value in inputs.items() if name != "pixel_values"}


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
