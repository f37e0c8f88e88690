"""Processors of small MLLMs of the families that are trained, with the tokens that the real ones have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoImageProcessor, PreTrainedTokenizerFast, ProcessorMixin

from pivot_hub.mllm.processor import VIDEO, images_only
from tests.mllm.tiny_mllms import IMAGE_TOKEN, PATCH

FIRST = ["<pad>", "<s>", "</s>", "<unk>", "<unused>"]  # the image token follows, at IMAGE_TOKEN
MARKERS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ProcessorRecipe:
    """How a processor is made.

    Args:
        name: Class of transformers.
        image: Token that is repeated once for each feature of an image.
        further: Further tokens of the vocabulary.
        attributes: Tokens that the processor reads from the tokenizer, by their attribute.
        placeholder: What the chat template writes for an image; the image token by default.
        options: Further arguments of the processor.
    """

    name: str
    image: str
    further: tuple[str, ...] = ()
    attributes: dict[str, str] = field(default_factory=dict)
    placeholder: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _llava(name: str, **options: Any) -> ProcessorRecipe:
    return ProcessorRecipe(name, "<image>", options={"patch_size": PATCH, **options})


def _qwen(name: str) -> ProcessorRecipe:
    return ProcessorRecipe(
        name,
        "<|image_pad|>",
        ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        placeholder="<|vision_start|><|image_pad|><|vision_end|>",
    )


def _idefics(name: str) -> ProcessorRecipe:
    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    tokens = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles)
    return ProcessorRecipe(name, "<image>", tokens, options={"image_seq_len": 4})


CLIP = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
PROCESSORS = {
    "llava": _llava("LlavaProcessor", **CLIP),
    "llava_next": _llava("LlavaNextProcessor", **CLIP),
    "llava_onevision": ProcessorRecipe(
        "LlavaOnevisionProcessor",
        "<image>",
        ("<video>",),
        options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3VLProcessor"),
    "qwen3_5": _qwen("Qwen3VLProcessor"),
    "internvl": ProcessorRecipe(
        "InternVLProcessor",
        "<IMG_CONTEXT>",
        ("<img>", "</img>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        options={"image_seq_length": 4},
    ),
    "idefics3": _idefics("Idefics3Processor"),
    "smolvlm": _idefics("SmolVLMProcessor"),
    "gemma3": ProcessorRecipe(
        "Gemma3Processor",
        "<image_soft_token>",
        ("<start_of_image>", "<end_of_image>"),
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        placeholder="<start_of_image>",
        options={"image_seq_length": 4},
    ),
    "mistral3": ProcessorRecipe(
        "PixtralProcessor",
        "[IMG]",
        ("[IMG_BREAK]", "[IMG_END]"),
        options={"patch_size": PATCH, "spatial_merge_size": 2},
    ),
    "glm4v": ProcessorRecipe(
        "Glm4vProcessor",
        "<|image|>",
        ("<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
        placeholder="<|begin_of_image|><|image|><|end_of_image|>",
    ),
}


def tiny_tokenizer(recipe: ProcessorRecipe) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the recipe's special tokens."""
    special = [*FIRST, recipe.image, *MARKERS, *recipe.further]
    assert special[IMAGE_TOKEN] == recipe.image
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=recipe.attributes,
        chat_template=TEMPLATE.replace("PLACEHOLDER", recipe.placeholder or recipe.image),
    )


def add_processor(folder: Path, name: str) -> ProcessorMixin:
    """Write the processor of a small MLLM that `make_mllm` wrote into a folder.

    Args:
        folder: Folder of the MLLM, with its image processor.
        name: Entry of PROCESSORS.
    """
    recipe = PROCESSORS[name]
    tokenizer = tiny_tokenizer(recipe)
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor_class: Any = getattr(transformers, recipe.name)
    parts: list[Any] = [image_processor, tokenizer]
    if VIDEO in processor_class.get_attributes():
        processor_class = images_only(processor_class)
        parts.append(None)
    processor = processor_class(*parts, chat_template=tokenizer.chat_template, **recipe.options)
    processor.save_pretrained(folder)
    return processor
