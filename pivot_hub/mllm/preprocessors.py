"""The image processor of an encoder that is taken out of an MLLM: as the MLLM's, without its tiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.vision_part import VisionPart

# What an image processor of squares takes over from any other.
SHARED = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb")
# Image processors that give one square for each image.
SQUARES = (
    "CLIPImageProcessor",
    "SiglipImageProcessor",
    "ViTImageProcessor",
    "BitImageProcessor",
    "LlavaImageProcessor",
    "Gemma3ImageProcessor",
)


def encoder_preprocessor(name: str | Path, part: VisionPart, revision: str | None = None) -> tuple[dict[str, Any], str]:
    """Return the preprocessor_config.json of an MLLM's encoder, and the name of the MLLM's image processor.

    An encoder of squares takes the whole image as one square, cropped where the MLLM crops it; where the MLLM adds
    tiles of a large image, this is its thumbnail. A tower of native resolution keeps its image processor, except
    LFM2-VL's, which cuts tiles.

    Args:
        name: Folder or Hub name of the MLLM.
        part: The MLLM's vision tower.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: The MLLM has no image processor, or its file is damaged.
    """
    config: PreTrainedConfig = part.tower.config
    backbone = backbone_of(config)
    needed = backbone.image_processor
    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(str(name), revision=revision)
        own = str(values.get("image_processor_type") or needed).removesuffix("Pil").removesuffix("Fast")
        values = {k: v for k, v in values.items() if k not in ("processor_class", "auto_map")}
        _check_numbers(values)
        shared = _shared_values(own, values)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{name}: its image processor cannot be read: {loading_problem(name, error)}; save a {needed} there, as "
            "preprocessor_config.json."
        ) from error
    kept = own
    if backbone.layout is None and own not in (needed, *SQUARES):
        side = backbone.image_px(config)
        values = shared | {"do_resize": True, "size": {"height": side, "width": side}}
        if needed == "CLIPImageProcessor":
            values["do_center_crop"] = False
        kept = needed
    elif needed == "Siglip2ImageProcessor" and own != needed:
        merge = part.family.merge(part.config)
        most = int(values.get("max_image_tokens") or 256) * merge**2
        values = shared | {"patch_size": part.config.vision_config.patch_size, "max_num_patches": most}
        kept = needed
    if kept == "GotOcr2ImageProcessor":
        values["crop_to_patches"] = False
    if kept == "Gemma3ImageProcessor":
        values["do_pan_and_scan"] = False
    if kept == "PixtralImageProcessor":  # images are resized so that the MLLM can merge their patches
        side = part.config.vision_config.patch_size * part.family.merge(part.config)
        values["patch_size"] = {"height": side, "width": side}
    return {**values, "image_processor_type": kept}, own


def _shared_values(own: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that a processor of squares takes over, with the defaults of the MLLM's own class."""
    own_class = getattr(transformers, f"{own}Pil", None)
    defaults = own_class.from_dict(values).to_dict() if own_class is not None else {}
    return {k: v for k in SHARED if (v := values.get(k, defaults.get(k))) is not None}


def _check_numbers(values: Any, key: str = "") -> None:
    """Raise a ValueError that names the key, if a number is not finite, or a standard deviation is 0."""
    if isinstance(values, dict):
        for name, value in values.items():
            _check_numbers(value, str(name))
    elif isinstance(values, list):
        for value in values:
            _check_numbers(value, key)
    elif (isinstance(values, float) and not math.isfinite(values)) or (key == "image_std" and values == 0):
        raise ValueError(f"{key} in preprocessor_config.json holds {values}, of which no pixel can be computed")
