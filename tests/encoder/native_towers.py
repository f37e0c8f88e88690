"""Small random towers of native resolution, written as encoder repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.repository import write_repository

WIDTH = 32
SIZES: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 3}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen3_vl_vision": {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "out_hidden_size": 48,
        "depth": 3,
        "num_heads": 2,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    },
    "pixtral": {**SIZES, "num_attention_heads": 2, "image_size": 112, "patch_size": 14},
    "siglip2_vision_model": {
        **SIZES,
        "num_attention_heads": 2,
        "patch_size": 16,
        "num_patches": 16,
        "vision_use_head": False,
    },
}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl_vision": (
        "Qwen2VLImageProcessorPil",
        {
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 784, "longest_edge": 20_000},
        },
    ),
    "pixtral": (
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 112}, "patch_size": {"height": 14, "width": 14}},
    ),
    "siglip2_vision_model": ("Siglip2ImageProcessorPil", {"patch_size": 16, "max_num_patches": 24}),
}


def write_tower(model_type: str, folder: Path) -> Path:
    """Write a tower with random weights; equal calls write equal weights."""
    torch.manual_seed(0)
    model = PivotVisionModel(PivotVisionConfig(AutoConfig.for_model(model_type, **TOWERS[model_type]))).eval()
    name, options = PROCESSORS[model_type]
    model.image_processor = getattr(transformers, name)(**options)
    return write_repository(folder / model_type, model)
