"""The image processor of an encoder that is taken out of an MLLM: as the MLLM's, without its tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.vision_part import VisionPart

# What an image processor of squares takes over from any other.
SHARED = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample", "do_convert_rgb")


def encoder_preprocessor(name: str | Path, part: VisionPart, revision: str | None = None) -> dict[str, Any]:
    """Return the preprocessor_config.json of an MLLM's encoder.

    An encoder of squares takes the whole image as one square, resized without keeping the aspect ratio unless the MLLM
    crops it; where the MLLM adds tiles of a large image, this is its thumbnail. A tower of native resolution keeps its
    image processor.

    Args:
        name: Folder or Hub name of the MLLM.
        part: The MLLM's vision tower.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: The MLLM has no image processor.
    """
    config: PreTrainedConfig = part.tower.config
    backbone = backbone_of(config)
    needed = backbone.image_processor
    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(str(name), revision=revision)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{name}: its image processor cannot be read: {loading_problem(name, error)}; save a {needed} there, as "
            "preprocessor_config.json."
        ) from error
    values = {k: v for k, v in values.items() if k not in ("processor_class", "auto_map")}
    own = str(values.get("image_processor_type") or needed).removesuffix("Pil").removesuffix("Fast")
    if backbone.layout is None:
        if own not in (needed, "CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "BitImageProcessor"):
            side = backbone.image_px(config)
            values = {k: values[k] for k in SHARED if k in values}
            values |= {"do_resize": True, "size": {"height": side, "width": side}}
            if needed == "CLIPImageProcessor":
                values["do_center_crop"] = False
            own = needed
        if own == "GotOcr2ImageProcessor":
            values["crop_to_patches"] = False
    elif needed == "Siglip2ImageProcessor" and own != needed:  # LFM2-VL's own cuts tiles
        merge = part.family.merge(part.config)
        most = int(values.get("max_image_tokens") or 256) * merge**2
        values = {k: values[k] for k in SHARED if k in values}
        values |= {"patch_size": part.config.vision_config.patch_size, "max_num_patches": most}
        own = needed
    return {**values, "image_processor_type": own}
