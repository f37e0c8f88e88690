"""Small random encoders in the forms of the Hub's originals: towers, two-tower models, classifiers, MAE."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

IMAGE_PX = 32
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_PX,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
SQUARE = {"height": IMAGE_PX, "width": IMAGE_PX}


@dataclass(frozen=True)
class Original:
    """Contents of an architecture's repositories on the Hub.

    Args:
        model: Name of the class whose weights the repositories hold.
        config: Name of its config's class.
        native: Name of the class that plain AutoModel loads the written encoder as.
        processor: Contents of preprocessor_config.json.
        prefix_tokens: Number of tokens before the first patch.
        towers: Whether the vision config is one of two.
        changes: Entries of the vision config that differ from SIZES.
    """

    model: str
    config: str
    native: str
    processor: dict[str, Any]
    prefix_tokens: int
    towers: bool = False
    changes: dict[str, Any] = field(default_factory=dict)


SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": SQUARE,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# As in openai's repositories: no image_processor_type, and sizes are numbers.
CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": IMAGE_PX, "crop_size": IMAGE_PX}
BIT = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 36}, "crop_size": SQUARE}
VIT = {"image_processor_type": "ViTImageProcessor", "size": SQUARE}
DINOV3 = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": SQUARE, "resample": 2}

ORIGINALS = {
    "siglip": Original("SiglipVisionModel", "SiglipVisionConfig", "SiglipVisionModel", SIGLIP, 0),
    "siglip2": Original("SiglipModel", "SiglipConfig", "SiglipVisionModel", SIGLIP, 0, towers=True),
    "clip": Original("CLIPModel", "CLIPConfig", "CLIPVisionModel", CLIP, 1, towers=True),
    "dinov2": Original("Dinov2Model", "Dinov2Config", "Dinov2Model", BIT, 1),
    "dinov2-registers": Original(
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", BIT, 5
    ),
    "dinov3": Original(
        "DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3ViTModel", DINOV3, 5, changes={"num_register_tokens": 4}
    ),
    "vit": Original("ViTForImageClassification", "ViTConfig", "ViTModel", VIT, 1),
    "mae": Original(
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        "ViTModel",
        VIT,
        1,
        changes={"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1},
    ),
    "aimv2": Original("Aimv2VisionModel", "Aimv2VisionConfig", "Aimv2VisionModel", CLIP, 0),
}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": IMAGE_PX, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2},
    "pretrained_cfg": {"input_size": [3, IMAGE_PX, IMAGE_PX], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    "num_classes": 2,
    "label_names": ["a", "b"],
    "model_type": "timm_wrapper",
}


def make_vision(folder: Path, kind: str = "siglip", **changes: int) -> Path:
    """Save a small random encoder with its image processor, in the form of its original on the Hub."""
    original = ORIGINALS[kind]
    sizes = {**SIZES, **original.changes, **changes}
    config_class = getattr(transformers, original.config)
    both = {"vision_config": sizes, "text_config": TEXT, "projection_dim": 32}
    torch.manual_seed(0)
    model = getattr(transformers, original.model)(config_class(**(both if original.towers else sizes)))
    # New biases and layer scales all have one value (0, 1e-5), which would hide keys that are mixed up.
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(original.processor))
    return folder
