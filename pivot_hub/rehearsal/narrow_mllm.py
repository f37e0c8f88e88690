"""A narrow copy of a whole MLLM, with a processor that is put together without the MLLM's repository.

A recipe that starts from a published MLLM names a repository, whose weights, tokenizer and image settings a machine
without a network does not have. The copy is made from the config alone: layers, heads, image size and vocabulary are
the MLLM's, and a head has 8 channels. Its tokenizer is that of the shipped Shapes base parts with the MLLM's image
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3ImageProcessorPil,
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from pivot_hub.config.recipe import RECIPES
from pivot_hub.errors import RehearsalError
from pivot_hub.mllm.families import FAMILIES, family_of
from pivot_hub.mllm.processor import VIDEO, images_only

HEAD_CHANNELS = 8
MLP_CHANNELS = 32
SHAPES_LANGUAGE = RECIPES / "shapes/base/language"
TILES_A_SIDE = 2  # tiles along an edge, in MLLMs that cut an image into tiles; more tiles launch no more kernels


@dataclass(frozen=True)
class _Parts:
    """How the processor of a family of MLLMs is put together.

    Args:
        processor: Class of transformers.
        image_processor: Function that makes the image processor, from the MLLM's config.
        image: Token that is repeated once for each feature of an image.
        further: Further tokens of the vocabulary.
        ids: Fields of the config that hold the id of a token, with the token.
        attributes: Tokens that the processor reads from the tokenizer, by their attribute.
        placeholder: What the chat template writes for an image; the image token by default.
        options: Function that returns further arguments of the processor, from the MLLM's config.
    """

    processor: str
    image_processor: Callable[[Any], Any]
    image: str
    further: tuple[str, ...] = ()
    ids: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    placeholder: str | None = None
    options: Callable[[Any], dict[str, Any]] = lambda config: {}


def _side(size: Any) -> int:
    """Return the side of a square that a config gives as one number or as height and width."""
    return int(size if isinstance(size, int) else size[0])


def _square(config: Any) -> dict[str, int]:
    side = _side(config.vision_config.image_size)
    return {"height": side, "width": side}


def _features_of_a_square(config: Any) -> int:
    vision = config.vision_config
    return int((_side(vision.image_size) // _side(vision.patch_size) // family_of(config).merge(config)) ** 2)


def _qwen(processor: str) -> _Parts:
    def image_processor(config: Any) -> Any:
        vision = config.vision_config
        return Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )

    return _Parts(
        processor,
        image_processor,
        "<|image_pad|>",
        ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
    )


def _smolvlm_images(config: Any) -> Any:
    side = _side(config.vision_config.image_size)
    return SmolVLMImageProcessorPil(size={"longest_edge": TILES_A_SIDE * side}, max_image_size={"longest_edge": side})


PARTS = {
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "smolvlm": _Parts(
        "SmolVLMProcessor",
        _smolvlm_images,
        "<image>",
        (
            "<fake_token_around_image>",
            "<end_of_utterance>",
            "<global-img>",
            *(f"<row_{r + 1}_col_{c + 1}>" for r in range(TILES_A_SIDE) for c in range(TILES_A_SIDE)),
        ),
        {"image_token_id": "<image>"},
        options=lambda config: {"image_seq_len": _features_of_a_square(config)},
    ),
    "internvl": _Parts(
        "InternVLProcessor",
        lambda config: GotOcr2ImageProcessorPil(
            size=_square(config), crop_to_patches=True, min_patches=TILES_A_SIDE**2, max_patches=TILES_A_SIDE**2
        ),
        "<IMG_CONTEXT>",
        ("<img>", "</img>", "<video>"),
        {"image_token_id": "<IMG_CONTEXT>"},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        options=lambda config: {"image_seq_length": _features_of_a_square(config)},
    ),
    "gemma3": _Parts(
        "Gemma3Processor",
        lambda config: Gemma3ImageProcessorPil(size=_square(config)),
        "<image_soft_token>",
        ("<start_of_image>", "<end_of_image>"),
        {
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        placeholder="<start_of_image>",
        options=lambda config: {"image_seq_length": config.mm_tokens_per_image},
    ),
    "llava_onevision": _Parts(
        "LlavaOnevisionProcessor",
        lambda config: LlavaOnevisionImageProcessorPil(
            size=_square(config), image_grid_pinpoints=config.image_grid_pinpoints
        ),
        "<image>",
        ("<video>",),
        {"image_token_id": "<image>", "video_token_id": "<video>"},
        options=lambda config: {
            "num_image_tokens": _features_of_a_square(config),
            "vision_feature_select_strategy": "full",
        },
    ),
}


def write_narrow_mllm(config: PreTrainedConfig, folder: Path) -> None:
    """Write the narrow copy of an MLLM with random weights, and its processor.

    Args:
        config: Config of the MLLM.
        folder: Folder that receives both.

    Raises:
        RehearsalError: The processor of this family cannot be put together without its repository.
    """
    if config.model_type not in PARTS:
        known = ", ".join(FAMILIES[name].title for name in PARTS)
        raise RehearsalError(
            f"a rehearsal cannot put the processor of {family_of(config).title} together without its repository; "
            f"rehearse a recipe of {known}, or one whose `model` names `vision` and `language`."
        )
    parts = PARTS[config.model_type]
    tokenizer = _tokenizer(parts)
    narrow = narrow_mllm_config(config)
    text: Any = narrow.get_text_config()
    for name, token in parts.ids.items():
        setattr(narrow, name, tokenizer.convert_tokens_to_ids(token))
    for each in (narrow, text):
        each.pad_token_id, each.eos_token_id, each.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    if len(tokenizer) > text.vocab_size:
        raise RehearsalError(
            f"a vocabulary of {text.vocab_size} tokens is smaller than the {len(tokenizer)} of the tokenizer that a "
            "rehearsal reads rows with; rehearse an MLLM with a larger one."
        )
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(narrow, dtype=torch.float32)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.detach().any():  # as Gemma 3's projector begins, which would hide all images
            torch.nn.init.normal_(weight, std=0.02)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor_class: Any = getattr(transformers, parts.processor)
    given: list[Any] = [parts.image_processor(config), tokenizer]
    if VIDEO in processor_class.get_attributes():
        processor_class = images_only(processor_class)
        given.append(None)
    processor_class(*given, chat_template=tokenizer.chat_template, **parts.options(config)).save_pretrained(folder)


def narrow_mllm_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of an MLLM's config with narrow parts."""
    narrow: Any = deepcopy(config)
    narrow.text_config = narrow_config(narrow.text_config)
    narrow.vision_config = narrow_config(narrow.vision_config)
    if hasattr(narrow.vision_config, "out_hidden_size"):  # a tower that contains the projector
        narrow.vision_config.out_hidden_size = narrow.text_config.hidden_size
    return cast(PreTrainedConfig, narrow)


def narrow_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a part's config with 8 channels a head; layers, heads and vocabulary stay."""
    narrow: Any = deepcopy(config)
    heads = narrow.num_heads if hasattr(narrow, "num_heads") else narrow.num_attention_heads
    narrow.hidden_size = HEAD_CHANNELS * heads
    if hasattr(narrow, "intermediate_size"):
        narrow.intermediate_size = MLP_CHANNELS
    if getattr(narrow, "head_dim", None) is not None:
        narrow.head_dim = HEAD_CHANNELS
    rope = getattr(narrow, "rope_parameters", None) or {}
    if "mrope_section" in rope:  # time, row and column share the channels
        third = HEAD_CHANNELS // 2 // 3
        narrow.rope_parameters = {**rope, "mrope_section": [HEAD_CHANNELS // 2 - 2 * third, third, third]}
    return cast(PreTrainedConfig, narrow)


def _tokenizer(parts: _Parts) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the shipped Shapes base parts with the tokens of a family."""
    tokenizer: Any = AutoTokenizer.from_pretrained(SHAPES_LANGUAGE, extra_special_tokens=dict(parts.attributes))
    tokenizer.add_tokens([parts.image, *parts.further], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|>", parts.placeholder or parts.image)
    return cast(PreTrainedTokenizerBase, tokenizer)
