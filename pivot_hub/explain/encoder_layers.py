"""One image in an encoder of any kind: the patch map of every layer, and where the CLS token attends to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.modeling_pivot import to_grid
from pivot_hub.errors import CheckpointError, DataError

OUTPUT = "output"  # label of features that are no hidden state: `last_hidden_state`, or `merged` tokens
RECORDING = "sdpa_with_cls_rows"  # name of the attention function that records the rows of the CLS token


@dataclass(frozen=True)
class EncodedImage:
    """One image in one encoder.

    Args:
        maps: Patch features (H, W, D) in float32 of each layer: the hidden states from 0, the embeddings, to the depth,
            and the encoder's own output if its feature layer is no hidden state. D of the output may differ, and so
            may its grid where it merges patches.
        labels: Name of each layer: the number of the hidden state, or OUTPUT.
        own: Index of the encoder's feature layer.
        cls_attention: Attention (H, W) of the CLS token to the patches in each block, the mean over heads; its sum is
            what CLS and registers leave. None if the tower has no CLS token.
    """

    maps: tuple[np.ndarray, ...]
    labels: tuple[str, ...]
    own: int
    cls_attention: tuple[np.ndarray, ...] | None

    def index(self, layer: int | None) -> int:
        """Return the index of a layer.

        Args:
            layer: Number of the layer from 0; a negative number counts from the last one; None for the feature layer.

        Raises:
            DataError: The encoder has no such layer; the message names the range.
        """
        return layer_index(layer, len(self.maps), self.own)

    @property
    def nbytes(self) -> int:
        """Memory that the maps take, in bytes."""
        return sum(features.nbytes for features in self.maps)


def layer_index(layer: int | None, layers: int, own: int) -> int:
    """Return the index of a layer of an encoder.

    Args:
        layer: Number of the layer from 0; a negative number counts from the last one; None for the feature layer.
        layers: Number of layers that the encoder has, the embeddings included.
        own: Index of the feature layer.

    Raises:
        DataError: The encoder has no such layer; the message names the range.
    """
    if layer is None:
        return own
    if not -layers <= layer < layers:
        raise DataError(f"layer is {layer}: it must be between {-layers} and {layers - 1} in this encoder.")
    return layer % layers


def has_cls(model: PivotVisionModel) -> bool:
    """Return whether a tower has one CLS token for the image, whose attention can be shown."""
    backbone = backbone_of(model.config.backbone_config)
    return backbone.prefix_tokens > 0 and backbone.layout is None


@torch.inference_mode()
def encode_image(model: PivotVisionModel, image: Image.Image) -> EncodedImage:
    """Encode an image, and keep every layer.

    Args:
        model: The encoder, of square images or of native resolution.
        image: RGB image of any size.

    Raises:
        CheckpointError: The features are not finite, or the tower returns no hidden states.
    """
    inputs: dict[str, Any] = model.prepare([image])
    with _recorded_cls_rows(model) as rows:
        outputs = cast(Any, model)(**inputs, output_hidden_states=True)
    if not outputs.hidden_states:
        raise CheckpointError("the tower returns no hidden states; install a newer transformers.")
    feature_layer = model.config.pivot["feature_layer"]
    states = [_patch_map(model, outputs, i, inputs) for i in range(len(outputs.hidden_states))]
    labels = [str(i) for i in range(len(states))]
    if isinstance(feature_layer, str):
        states.append(_own_output(model, outputs, inputs))
        labels.append(OUTPUT)
        own = len(states) - 1
    else:
        own = feature_layer % len(states)
    maps = tuple(state.float().cpu().numpy() for state in states)
    if not all(np.isfinite(features).all() for features in maps):
        raise CheckpointError("the features of this image are not finite (NaN or infinite); take another encoder.")
    attention = None
    if has_cls(model):
        prefix, grid = model.config.pivot["prefix_tokens"], maps[0].shape[:2]
        attention = tuple(row[prefix:].reshape(grid).cpu().numpy() for row in rows)
    return EncodedImage(maps, tuple(labels), own, attention)


def _patch_map(model: PivotVisionModel, outputs: Any, index: int, inputs: dict[str, Any]) -> Tensor:
    """Fold a hidden state into a map (H, W, D)."""
    if model.config.image_size is None:
        return cast(Tensor, model.maps(outputs, index, inputs)[0])
    hidden = outputs.hidden_states[index]
    if hidden.dim() == 4:  # timm's are maps (B, D, H, W)
        return cast(Tensor, hidden[0].permute(1, 2, 0))
    return _square_map(model, hidden[:, model.config.pivot["prefix_tokens"] :], inputs)


def _own_output(model: PivotVisionModel, outputs: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the features (H, W, D) that the encoder itself returns."""
    features = outputs.last_hidden_state
    return cast(Tensor, features[0]) if model.config.image_size is None else _square_map(model, features, inputs)


def _square_map(model: PivotVisionModel, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Fold patch tokens (1, H*W, D) into (H, W, D)."""
    height, width = (side // model.config.patch_size for side in inputs["pixel_values"].shape[-2:])
    return cast(Tensor, to_grid(tokens, height, width)[0].permute(1, 2, 0))


@contextmanager
def _recorded_cls_rows(model: PivotVisionModel) -> Iterator[list[Tensor]]:
    """Record, in each block of the forward passes within, the attention (N,) of the CLS token, the mean over heads.

    The attentions of all tokens, which transformers would return, take gigabytes in a large tower.
    """
    rows: list[Tensor] = []
    if not has_cls(model):
        yield rows
        return
    backbone = cast(Any, model.backbone)
    before = backbone.config._attn_implementation
    AttentionInterface.register(RECORDING, partial(_attend_and_record, rows))
    backbone.set_attn_implementation(RECORDING)
    try:
        yield rows
    finally:
        backbone.set_attn_implementation(before)


def _attend_and_record(
    rows: list[Tensor], module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *further: Any, **options: Any
) -> Any:
    """Attend as transformers' own function does, and append the weights (N,) of the first token.

    Args:
        rows: List that the weights are appended to.
        module: Module of the attention.
        query: Queries (1, heads, N, d).
        key: Keys (1, heads, N, d).
        value: Values (1, heads, N, d).
        mask: Attention mask.
        *further: Further arguments of transformers' function.
        **options: Its options, `scaling` among them.
    """
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    weights = (query[0, :, :1].float() * scaling) @ key[0].float().transpose(-1, -2)
    rows.append(weights.softmax(-1)[:, 0].mean(0))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, *further, **options)
