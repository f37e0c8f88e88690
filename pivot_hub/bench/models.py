"""MLLMs with random weights, and processors, for benchmarks: speed does not depend on the values of the weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

from pivot_hub.config.recipe import RECIPES
from pivot_hub.encoder.configuration_pivot import backbone_of, prefix_tokens
from pivot_hub.mllm.build import read_processor
from pivot_hub.mllm.chat_templates import QWEN
from pivot_hub.mllm.processor import images_only
from pivot_hub.mllm.published_configs import meta_mllm

PAD_TOKEN_ID, END_TOKEN_ID = 0, 1  # in the vocabulary of `word_tokenizer`
SPECIAL = ("<pad>", QWEN.turn_end, QWEN.image_token)


def random_mllm(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, feature_layer: int, device: str = "cpu"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Make an MLLM with random weights in float32, and the word processor that fits it.

    Args:
        vision_config: Config of the encoder.
        text_config: Config of the language model.
        feature_layer: Hidden state of the encoder that enters the projector.
        device: Device that the weights are drawn on.
    """
    vision, text = cast(Any, vision_config), cast(Any, text_config)
    image_px = backbone_of(vision_config).image_px(vision_config)
    processor = word_processor(text.vocab_size, image_px, vision.patch_size, prefix_tokens(vision_config))
    config = meta_mllm(vision_config, text_config, feature_layer).config
    config.image_token_id = processor.image_token_id
    with torch.device(device):
        return LlavaForConditionalGeneration(config), processor


def random_qwen2_5_vl(
    vision: dict[str, Any], text: dict[str, Any]
) -> tuple[Qwen2_5_VLForConditionalGeneration, ProcessorMixin]:
    """Make a Qwen2.5-VL with random weights in float32, and the word processor that fits it.

    Args:
        vision: Sizes of the vision tower, under the names of its config.
        text: Sizes of the language model, under the names of its config.
    """
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=SPECIAL.index(QWEN.image_token))
    image_processor = Qwen2VLImageProcessorPil(patch_size=vision["patch_size"], merge_size=vision["spatial_merge_size"])
    processor_class: Any = images_only(Qwen2_5_VLProcessor)
    processor = processor_class(image_processor, word_tokenizer(text["vocab_size"]), None)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose words `w0`, `w1`, ... are one token each, so that the length of a row can be set exactly.

    Args:
        vocabulary: Tokens of the vocabulary, the special ones included.
    """
    token_ids = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(vocabulary - len(SPECIAL)))])}
    words = Tokenizer(WordLevel(token_ids, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token=QWEN.turn_end, extra_special_tokens=[QWEN.image_token]
    )


def word_processor(vocabulary: int, image_px: int, patch_px: int, prefix_tokens: int = 0) -> LlavaProcessor:
    """Make a processor of LLaVA's class with the tokens of `word_tokenizer`.

    Args:
        vocabulary: Tokens of the vocabulary, the special ones included.
        image_px: Side of the images in pixels.
        patch_px: Side of a patch in pixels.
        prefix_tokens: Tokens that the encoder puts before the patches.
    """
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": image_px, "width": image_px}),
        tokenizer=word_tokenizer(vocabulary),
        patch_size=patch_px,
        vision_feature_select_strategy="default" if prefix_tokens else "full",
        num_additional_image_tokens=prefix_tokens,
        image_token=QWEN.image_token,
    )


def text_processor(image_px: int, patch_px: int) -> LlavaProcessor:
    """Read the processor of the shipped Shapes base parts, with a real tokenizer, and set its image size.

    Args:
        image_px: Side of the images in pixels.
        patch_px: Side of a patch in pixels.
    """
    base = RECIPES / "shapes/base"
    processor = cast(LlavaProcessor, read_processor(str(base / "vision"), str(base / "language")))
    processor.image_processor.size = {"height": image_px, "width": image_px}
    processor.patch_size = patch_px
    return processor
