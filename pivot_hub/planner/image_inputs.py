"""What an MLLM takes for an image of a number of tokens, from its config alone: the planner has no processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from pivot_hub.encoder.configuration_pivot import backbone_of, native_config
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.families import FAMILIES, family_of
from pivot_hub.mllm.joined_families import image_tokens as tokens_of_square

HEIGHT_PX, WIDTH_PX = 480, 640  # the image that is assumed where the recipe gives no number of tokens
# With their published settings, InternVL3, SmolVLM2 and Idefics3 make 4 by 3 tiles of that image, and a small copy.
TILES = 4 * 3 + 1
# Heights of images of the same shape that are tried to find one of a number of tokens.
HEIGHTS_PX = range(48, 2304 + 1, 48)


@dataclass(frozen=True)
class PlannedImage:
    """An image as the MLLM takes it.

    Args:
        features: Tokens of the language model that take features of the image.
        tokens: All tokens of the image, with those around its features.
        inputs: Function that makes the arguments of the MLLM's forward for a number of such images, with float tensors
            of a type.
        assumption: What is assumed about the image.
    """

    features: int
    tokens: int
    inputs: Callable[[int, torch.dtype], dict[str, Tensor]]
    assumption: str


def planned_image(model: PreTrainedModel, tokens: int | None) -> PlannedImage:
    """Return an image of a number of tokens, or what the MLLM makes of one of 640x480 pixels.

    An image of about that shape is chosen whose features take at most the number of tokens; the rest are text.

    Args:
        model: The MLLM on the meta device.
        tokens: Mean number of tokens of an image; None if it is unknown.

    Raises:
        CheckpointError: The planner does not know what this family makes of an image.
    """
    config: Any = model.config
    pixels = family_of(config).pixels
    if pixels == "grid":
        return _grid(config, tokens)
    if pixels == "resolutions":
        return _best_resolution(model.model, config, tokens)
    if pixels is not None:
        return _squares(config, tokens)
    known = ", ".join(family.title for family in FAMILIES.values() if family.pixels is not None)
    raise CheckpointError(
        f"the planner does not know what {family_of(config).title} makes of an image; it plans {known}."
    )


def tokens_of_scene(config: Any, image_px: int) -> int | None:
    """Return the tokens of a square image whose size is known, or None where they do not follow from the config.

    Args:
        config: Config of the MLLM.
        image_px: Side of the image in pixels, which Qwen's processors are taken to leave as it is. InternVL's tiles are
            not counted: of an image that is not of the encoder's size, the tokens are unknown.
    """
    family, vision = family_of(config), config.vision_config
    if family.pixels == "grid":
        return int(image_px // (vision.patch_size * family.merge(config))) ** 2
    if config.model_type == "internvl" and image_px == backbone_of(native_config(config)).image_px(
        native_config(config)
    ):
        return int(image_px // vision.patch_size[0] // family.merge(config)) ** 2 + 2  # <img> and </img>
    return None


def _assumed(tokens: int, what: str, given: int | None) -> str:
    if given is None:
        return f"images of {WIDTH_PX}x{HEIGHT_PX} px, each {what} and {tokens} tokens"
    return f"images of {given} tokens, each {what}"


def _grid(config: Any, tokens: int | None) -> PlannedImage:
    """An image as a sequence of patches, in a grid whose shape is the image's."""
    vision = config.vision_config
    merge, patch = vision.spatial_merge_size, vision.patch_size
    if tokens is None:
        height, width = (round(px / (patch * merge)) for px in (HEIGHT_PX, WIDTH_PX))
    else:
        height = max(round((tokens * HEIGHT_PX / WIDTH_PX) ** 0.5), 1)
        width = max(tokens // height, 1)
    patches, features = height * width * merge**2, height * width
    channels = getattr(vision, "in_channels", 3)

    def inputs(images: int, dtype: torch.dtype) -> dict[str, Tensor]:
        values = channels * vision.temporal_patch_size * patch**2
        return {
            "pixel_values": _pixels(dtype, images * patches, values),
            "image_grid_thw": torch.tensor([[1, height * merge, width * merge]]).expand(images, 3).clone(),
        }

    what = f"a grid of {width * merge}x{height * merge} patches"
    return PlannedImage(features, max(tokens or 0, features), inputs, _assumed(features, what, tokens))


def _squares(config: Any, tokens: int | None) -> PlannedImage:
    """An image as one square of the encoder's size, or as several."""
    family, vision = family_of(config), config.vision_config
    side = backbone_of(native_config(config)).image_px(native_config(config))
    patch = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    one = (side // patch // family.merge(config)) ** 2
    if config.model_type == "llava":
        one = tokens_of_square(native_config(config))
    count, what = 1, f"one square of {side} px"
    if family.tiles != "none":
        count = TILES if tokens is None else max(tokens // one, 1)
        what = f"{count} squares of {side} px"
    features = count * one
    in_rows = family.pixels == "rows of tiles"

    def inputs(images: int, dtype: torch.dtype) -> dict[str, Tensor]:
        leading = (images, count) if in_rows else (images * count,)
        return {"pixel_values": _pixels(dtype, *leading, getattr(vision, "num_channels", 3), side, side)}

    return PlannedImage(features, max(tokens or 0, features), inputs, _assumed(features, what, tokens))


def _best_resolution(inner: Any, config: Any, tokens: int | None) -> PlannedImage:
    """An image as one square, and the squares of the resolution among a config's list that fits it best."""
    side = config.vision_config.image_size

    def measured(height: int) -> tuple[int, int, int]:
        """Return the features, the squares and the height of an image."""
        size = [height, height * WIDTH_PX // HEIGHT_PX]
        count = image_size_to_num_patches(size, config.image_grid_pinpoints, side)
        options: dict[str, Any] = {"image_newline": torch.empty(1, device="meta")}
        if config.model_type == "llava_next":
            options["vision_feature_select_strategy"] = config.vision_feature_select_strategy
        else:
            options["vision_aspect_ratio"] = config.vision_aspect_ratio
        square = torch.empty(count, (side // config.vision_config.patch_size) ** 2, 1, device="meta")
        packed, _ = inner.pack_image_features([square], torch.tensor([size]), **options)
        return len(packed[0]), count, height

    if tokens is None:
        features, count, height = measured(HEIGHT_PX)
    else:
        every = [measured(height) for height in HEIGHTS_PX]
        features, count, height = max(
            [image for image in every if image[0] <= tokens] or every[:1], key=lambda image: image[0]
        )

    def inputs(images: int, dtype: torch.dtype) -> dict[str, Tensor]:
        channels = config.vision_config.num_channels
        return {
            "pixel_values": _pixels(dtype, images, count, channels, side, side),
            "image_sizes": torch.tensor([[height, height * WIDTH_PX // HEIGHT_PX]]).expand(images, 2).clone(),
        }

    what = f"{count} squares of {side} px"
    return PlannedImage(features, max(tokens or 0, features), inputs, _assumed(features, what, tokens))


def _pixels(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return pixels that are not black. Some MLLMs look at them, and take black images for padding."""
    return torch.ones(shape, dtype=torch.uint8).to(dtype)
