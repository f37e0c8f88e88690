"""Small random MLLMs of every family of the table, saved as their repositories on the Hub are."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

SIDE, PATCH, WIDTH, IMAGE_TOKEN = 56, 14, 32, 5
# A tower of squares, and one of Qwen's kind.
SQUARES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
GRIDS: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "hidden_size": WIDTH,
    "out_hidden_size": WIDTH,
    "intermediate_size": 64,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
HYBRID = ["linear_attention", "full_attention"]
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_resize": True, "do_rescale": True}
ONE_SQUARE = {**NORMALISED, "size": {"height": SIDE, "width": SIDE}}
QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 784, "longest_edge": 20_000},
}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]


@dataclass(frozen=True)
class Recipe:
    """How a small MLLM is made.

    Args:
        model_type: Model type of the MLLM.
        vision: Vision config, with its model type where the MLLM takes several.
        text: Text config, with its model type where the MLLM takes several.
        processor: Content of preprocessor_config.json.
        further: Further entries of the MLLM's config.
    """

    model_type: str
    vision: dict[str, Any]
    text: dict[str, Any]
    processor: dict[str, Any]
    further: dict[str, Any]


def _llava(model_type: str, vision: str, text: str, processor: str, sizes: Any, **further: Any) -> Recipe:
    return Recipe(
        model_type,
        {"model_type": vision, **SQUARES},
        {"model_type": text, **TEXT},
        {"image_processor_type": processor, **sizes},
        {"image_token_index": IMAGE_TOKEN, **further},
    )


def _qwen(model_type: str, text: dict[str, Any], **vision: Any) -> Recipe:
    return Recipe(model_type, {**GRIDS, **vision}, text, QWEN_PROCESSOR, {"image_token_id": IMAGE_TOKEN})


CROPPED = {**NORMALISED, "size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PIXTRAL = {"size": {"longest_edge": 2 * SIDE}}
FLAT_TOWER = {"vision_use_head": False}
DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
WITH_MROPE = {**TEXT, "rope_parameters": MROPE}
TINY = {
    "llava": _llava("llava", "clip_vision_model", "llama", "CLIPImageProcessor", CROPPED),
    "llava with pixtral": _llava(
        "llava",
        "pixtral",
        "mistral",
        "PixtralImageProcessor",
        {**PIXTRAL, "patch_size": {"height": PATCH, "width": PATCH}},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    "llava_next": _llava(
        "llava_next",
        "clip_vision_model",
        "llama",
        "LlavaNextImageProcessor",
        {**CROPPED, "image_grid_pinpoints": PINPOINTS},
        image_grid_pinpoints=PINPOINTS,
    ),
    "llava_onevision": _llava(
        "llava_onevision",
        "siglip_vision_model",
        "qwen2",
        "LlavaOnevisionImageProcessor",
        {**ONE_SQUARE, "image_grid_pinpoints": PINPOINTS},
        image_grid_pinpoints=PINPOINTS,
    ),
    "paligemma": _llava(
        "paligemma", "siglip_vision_model", "gemma", "SiglipImageProcessor", ONE_SQUARE, projection_dim=WIDTH
    ),
    "gemma3": _llava(
        "gemma3", "siglip_vision_model", "gemma3_text", "Gemma3ImageProcessor", ONE_SQUARE, mm_tokens_per_image=4
    ),
    "idefics3": _llava(
        "idefics3",
        "idefics3_vision",
        "llama",
        "Idefics3ImageProcessor",
        {**NORMALISED, "size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    ),
    "smolvlm": _llava(
        "smolvlm",
        "smolvlm_vision",
        "llama",
        "SmolVLMImageProcessor",
        {**NORMALISED, "size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}},
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    ),
    "internvl": Recipe(
        "internvl",
        {**SQUARES, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        {"model_type": "qwen2", **TEXT},
        {"image_processor_type": "GotOcr2ImageProcessor", **ONE_SQUARE, "crop_to_patches": True},
        {"image_token_id": IMAGE_TOKEN, "downsample_ratio": 0.5},
    ),
    "qwen2_vl": Recipe(
        "qwen2_vl",
        {"depth": 3, "embed_dim": WIDTH, "num_heads": 2, "mlp_ratio": 2, "hidden_size": WIDTH, "patch_size": PATCH},
        WITH_MROPE,
        QWEN_PROCESSOR,
        {"image_token_id": IMAGE_TOKEN},
    ),
    "qwen2_5_vl": _qwen("qwen2_5_vl", WITH_MROPE, window_size=2 * 2 * PATCH, fullatt_block_indexes=[1]),
    "qwen3_vl": _qwen("qwen3_vl", {**WITH_MROPE, "head_dim": 8}, **DEEPSTACK),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe", {**WITH_MROPE, "head_dim": 8, **EXPERTS}, **DEEPSTACK),
    "qwen3_5": _qwen("qwen3_5", {**TEXT, "head_dim": 8, "layer_types": HYBRID}, num_position_embeddings=16),
    "qwen3_5_moe": _qwen("qwen3_5_moe", {**TEXT, "head_dim": 8, **EXPERTS}, num_position_embeddings=16),
    "glm4v": Recipe(
        "glm4v",
        {**GRIDS, "image_size": SIDE},
        WITH_MROPE,
        {**QWEN_PROCESSOR, "image_processor_type": "Glm4vImageProcessor"},
        {"image_token_id": IMAGE_TOKEN},
    ),
    "glm4v_moe": Recipe(
        "glm4v_moe",
        {**GRIDS, "image_size": SIDE},
        {**WITH_MROPE, "n_routed_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1},
        {**QWEN_PROCESSOR, "image_processor_type": "Glm4vImageProcessor"},
        {"image_token_id": IMAGE_TOKEN},
    ),
    "mistral3": _llava(
        "mistral3",
        "pixtral",
        "mistral",
        "PixtralImageProcessor",
        {**PIXTRAL, "patch_size": PATCH},  # the MLLM's processor multiplies it
        vision_feature_layer=-1,
        spatial_merge_size=2,
    ),
    "gemma4": Recipe(
        "gemma4",
        {
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 64,
        },
        {
            **TEXT,
            "head_dim": 8,
            "global_head_dim": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 320,
        },
        {
            "image_processor_type": "Gemma4ImageProcessor",
            "patch_size": 16,
            "max_soft_tokens": 70,
            "pooling_kernel_size": 3,
        },
        {"image_token_id": IMAGE_TOKEN, "audio_config": None},
    ),
    "lfm2_vl": Recipe(
        "lfm2_vl",
        {
            "model_type": "siglip2_vision_model",
            **{k: v for k, v in SQUARES.items() if k != "image_size"},
            "patch_size": 16,
            "num_patches": 16,
            **FLAT_TOWER,
        },
        {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
        {"image_processor_type": "Lfm2VlImageProcessorFast", "max_image_tokens": 4, **NORMALISED},
        {"image_token_id": IMAGE_TOKEN, "downsample_factor": 2},
    ),
    "kimi_k25": Recipe(
        "kimi_k25",
        {k: v for k, v in SQUARES.items() if k != "image_size"},
        {
            "model_type": "deepseek_v3",
            **TEXT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 1,
        },
        {"image_processor_type": "Kimi_K25ImageProcessor"},
        {"image_token_id": IMAGE_TOKEN, "projection_hidden_size": WIDTH},
    ),
    "mllama": Recipe(
        "mllama",
        {
            **{k: v for k, v in SQUARES.items() if k != "num_attention_heads"},
            "num_global_layers": 2,
            "attention_heads": 2,
            "vision_output_dim": 3 * WIDTH,
            "intermediate_layers_indices": [0, 2],
            "max_num_tiles": 4,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]},
        {"image_processor_type": "MllamaImageProcessor", **ONE_SQUARE, "max_image_tiles": 4},
        {"image_token_index": IMAGE_TOKEN},
    ),
}


def make_mllm(folder: Path, name: str, change: Callable[[Any], None] = lambda model: None) -> PreTrainedModel:
    """Write a small random MLLM with its image processor.

    Args:
        folder: Folder to write.
        name: Entry of TINY.
        change: Function that changes the model before it is saved.
    """
    recipe = deepcopy(TINY[name])  # configs change the dictionaries that they are made from
    vision = {**(FLAT_TOWER if recipe.vision.get("model_type") == "siglip_vision_model" else {}), **recipe.vision}
    config_class: Any = CONFIG_MAPPING[recipe.model_type]
    config = config_class(vision_config=vision, text_config=recipe.text, **recipe.further)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    # Weights that initialisation leaves at zero, such as gates, would hide what they multiply.
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.5)
    change(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(recipe.processor))
    return model
