"""The tokens of an image in any MLLM: what enters the projector and what the language model gets of it, as maps.

An MLLM that cuts tiles sees the whole image in one of its views too; maps show this view. A token's place is counted in
patches: from the image processor's own grid for a tower of native resolution, and otherwise in a square.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from pivot_hub.encoder.configuration_pivot import LAST, PivotVisionConfig, backbone_of, prefix_tokens
from pivot_hub.encoder.modeling_pivot import select_features
from pivot_hub.encoder.native_resolution import LAYOUTS, merge_side, to_maps
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.mllm.families import Family, family_of
from pivot_hub.mllm.inputs import process


def image_family(config: PreTrainedConfig) -> Family:
    """Return the family of an MLLM whose language model gets tokens of the image.

    Raises:
        CheckpointError: It is another model.
    """
    family = family_of(config)
    if not family.image_tokens:
        raise CheckpointError(
            f"{family.title} has no image tokens that a map could show: its images enter by cross attention; give an "
            "MLLM of another family."
        )
    return family


def feature_layer(model: PreTrainedModel) -> int:
    """Index of the hidden state that enters the projector, where 1 is the output of the first block.

    A tower's own output, after its last norm, counts as that of its last block.
    """
    layer = image_family(model.config).feature_layer(model.config)
    depth = int(_vision_config(model.config).num_hidden_layers)
    if isinstance(layer, str):
        return depth
    return layer if layer >= 0 else depth + 1 + layer


def inner_layer(model: PreTrainedModel, layer: int | None) -> int | None:
    """Check the number of a hidden state; return None for the feature layer.

    Raises:
        ValueError: The language model does not depend on the layer.
    """
    last = feature_layer(model)
    if layer is None or layer == last:
        return None
    if not 1 <= layer <= last:
        raise ValueError(f"layer {layer} is not one of 1 to {last}, the layers that the language model depends on.")
    return layer


@contextmanager
def captured_tokens(model: PreTrainedModel, layer: int | None = None) -> Iterator[dict[str, Tensor]]:
    """Capture what enters the projector, and what the language model gets, with gradients while the weights have none.

    The model's hooks and `requires_grad` flags are restored afterwards.

    Args:
        model: The MLLM.
        layer: Hidden state of the encoder that is captured instead of the feature layer, from `inner_layer`. Its graph
            has to begin at the pixels; that of the feature layer begins at its features.

    Yields:
        A dictionary that has `features`, in the order and shape of the tower's output, and `embeddings`
        (A, S, channels), the tokens of text and image, after each forward pass.
    """
    family, inner = image_family(model.config), cast(Any, model).model
    tower, language = getattr(inner, family.tower), getattr(inner, family.language)
    feature: int | str = family.feature_layer(model.config) if layer is None else layer
    captured: dict[str, Tensor] = {}
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def begin_at(features: Tensor) -> Tensor:
        captured["features"] = features.detach().requires_grad_()
        return captured["features"]

    def before_tower(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_hidden_states": True}  # a family may ask for its feature layer only

    def after_tower(module: nn.Module, args: Any, outputs: Any) -> None:
        features = select_features(outputs, feature)
        if layer is not None:
            captured["features"] = features
        elif feature == LAST:
            outputs.last_hidden_state = begin_at(features)
        else:
            states = list(outputs.hidden_states)
            states[cast(int, feature)] = begin_at(features)
            outputs.hidden_states = tuple(states)

    def before_merger(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return begin_at(args[0]), *args[1:]

    def before_language(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        captured["embeddings"] = kwargs["inputs_embeds"]

    hooks = [language.register_forward_pre_hook(before_language, with_kwargs=True)]
    if layer is None and family.projector is None:
        hooks.append(getattr(tower, family.mergers[0]).register_forward_pre_hook(before_merger))
    else:
        hooks.append(tower.register_forward_hook(after_tower))
    if feature != LAST:
        hooks.append(tower.register_forward_pre_hook(before_tower, with_kwargs=True))
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)


def image_tensors(processor: ProcessorMixin, image: Image.Image) -> dict[str, Tensor]:
    """Return the tensors of one image, as the MLLM's processor prepares them beside a text."""
    return process(processor, chat_prompt(processor, ""), [image]).images


def patch_grid(config: PreTrainedConfig, images: Mapping[str, Any]) -> tuple[int, int]:
    """Return the patches (rows, columns) of the view that shows the whole image.

    Args:
        config: Config of the MLLM.
        images: The image processor's outputs for one image, or for copies of it.
    """
    vision = _vision_config(config)
    layout = backbone_of(vision.backbone_config).layout
    if layout is None:
        side = vision.image_size // vision.patch_size
        return side, side
    return LAYOUTS[layout].grids(images, vision.backbone_config)[image_family(config).whole_view]


def fold_features(model: PreTrainedModel, features: Tensor, images: Mapping[str, Any], copies: int = 1) -> list[Tensor]:
    """Fold features of the tower into the map of the whole image.

    Args:
        model: The MLLM.
        features: A hidden state of the tower, or its output, for all views of all copies.
        images: The image processor's outputs for all copies of one image.
        copies: Number of copies of the image.

    Returns:
        (rows, columns, D) for each copy: patches in rows from the top; merged ones where the tower's output is merged.
    """
    config = cast(Any, model.config)
    vision = _vision_config(config).backbone_config
    backbone = backbone_of(vision)
    if backbone.layout is None:
        maps = list(features[:, prefix_tokens(vision) :].unflatten(1, patch_grid(config, images)))
    else:
        grids = LAYOUTS[backbone.layout].grids(images, vision)
        maps = to_maps(features, grids, backbone.layout, vision, merge_side(vision, backbone.merge))
    views = len(maps) // copies
    whole = image_family(config).whole_view % views
    return maps[whole::views]


def fold_embeddings(model: PreTrainedModel, embeddings: Tensor, ids: Tensor, images: Mapping[str, Any]) -> list[Tensor]:
    """Fold the image's tokens among a language model's inputs, or values for them, into the map of the whole image.

    Args:
        model: The MLLM.
        embeddings: Inputs (A, S, channels) of the language model.
        ids: Token ids (A, S).
        images: The image processor's outputs for all A copies of one image.

    Returns:
        (rows, columns, channels) for each copy: one token for each block of merged patches.
    """
    config, family = cast(Any, model.config), image_family(model.config)
    side = family.merge(config)
    rows, columns = (patches // side for patches in patch_grid(config, images))
    maps = []
    for row, own in zip(embeddings, ids, strict=True):
        tokens = row[own == family.image_token_id(config)]
        # Registers of an encoder come before its patches; tiles come before or after the whole image.
        start = len(tokens) - rows * columns if family.whole_view < 0 else register_tokens(config)
        maps.append(tokens[start : start + rows * columns].unflatten(0, (rows, columns)))
    return maps


def register_tokens(config: PreTrainedConfig) -> int:
    """Number of tokens before the patches that enter the language model: CLS, if it is kept, and registers."""
    prefix = prefix_tokens(_vision_config(config).backbone_config)
    kept_cls = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return prefix if kept_cls else max(prefix - 1, 0)


def seen_image(config: PreTrainedConfig, processor: ProcessorMixin, image: Image.Image) -> Image.Image:
    """Resize, crop or pad an image as the MLLM's own processor does, but keep its colours.

    Args:
        config: Config of the MLLM.
        processor: Processor of the MLLM.
        image: Image of any size.

    Returns:
        The image that the encoder sees, in its own shape for a tower of native resolution; of an MLLM that cuts tiles,
        the view of the whole image.
    """
    image_processor = cast(Any, processor).image_processor
    vision = _vision_config(config)
    if vision.image_size is None:  # it is resized as a whole, and then cut into patches
        rows, columns = patch_grid(config, image_tensors(processor, image))
        size = (columns * vision.patch_size, rows * vision.patch_size)
        return image.resize(size, Image.Resampling(int(image_processor.resample)))
    prepared = image_processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")
    views = torch.as_tensor(prepared["pixel_values"]).flatten(0, -4)
    pixels = views[image_family(config).whole_view].permute(1, 2, 0)
    return Image.fromarray(pixels.numpy().round().clip(0, 255).astype(np.uint8))


def seen_mask(config: PreTrainedConfig, processor: ProcessorMixin, mask: np.ndarray) -> np.ndarray:
    """Resize and crop a (H, W) bool mask with the image processor, exactly as `seen_image` does with an image.

    Returns:
        (height, width) bool, true for pixels of the seen image that lie on the mask by at least half.
    """
    return np.asarray(seen_image(config, processor, Image.fromarray(mask).convert("RGB")))[..., 0] >= 128


def crops_image(config: PreTrainedConfig, processor: ProcessorMixin) -> bool:
    """Return whether the MLLM sees only the middle of a wide image."""
    edge = np.zeros((64, 256), bool)
    edge[:, :32] = True
    return not seen_mask(config, processor, edge).any()


def _vision_config(config: PreTrainedConfig) -> Any:
    """Return the sizes of an MLLM's tower, as those of an encoder."""
    return PivotVisionConfig(cast(Any, config).vision_config)
