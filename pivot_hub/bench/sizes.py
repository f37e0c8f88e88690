"""The MLLMs that steps of training are timed on: their shapes, and models of these shapes with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin, Qwen2Config, SiglipVisionConfig

from pivot_hub.bench.models import END_TOKEN_ID, PAD_TOKEN_ID, random_mllm, random_qwen2_5_vl
from pivot_hub.errors import ProbeError

# Of so many of Qwen2.5-VL's vision blocks, one attends to the whole image, and the others to windows of 112 px.
FULL_EVERY, WINDOW_PATCHES = 8, 64


@dataclass(frozen=True)
class TransformerShape:
    """The shape of an encoder or a language model.

    Args:
        hidden_size: Width of the hidden states.
        layers: Number of blocks.
        heads: Number of attention heads.
        intermediate_size: Width inside the MLP of a block.
        key_value_heads: Number of key-value heads; as many as heads if None.
    """

    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    key_value_heads: int | None = None


@dataclass(frozen=True)
class Size:
    """Shapes of a model and of its preference pairs; the tiny ones have the proportions of the real ones.

    Args:
        family: Model type of the MLLM, llava with SigLIP and Qwen2, or qwen2_5_vl.
        vision: Shape of the encoder.
        image_px: Side of the images in pixels.
        patch_px: Side of a patch in pixels.
        merge: Patches a side that become one token of the language model.
        language: Shape of the language model.
        vocabulary: Tokens of the vocabulary.
        prompt_tokens: Tokens of a question.
        answer_tokens: Mean tokens of an answer.
        max_answer_tokens: Tokens of the longest answer.
    """

    vision: TransformerShape
    image_px: int
    patch_px: int
    language: TransformerShape
    vocabulary: int
    prompt_tokens: int
    answer_tokens: int
    max_answer_tokens: int
    family: str = "llava"
    merge: int = 1

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def image_tokens(self) -> int:
        return self.patches // self.merge**2

    @property
    def prefix_tokens(self) -> int:
        """Tokens before an answer: the image and the question."""
        return self.image_tokens + self.prompt_tokens


SIZES = {
    # The ratios of encoder to language model, vocabulary to layers and prefix to answer are those of the size below,
    # with a quarter of its tokens.
    "tiny": Size(
        vision=TransformerShape(216, 6, 4, 808),
        image_px=96,
        patch_px=8,
        language=TransformerShape(256, 8, 4, 1493, key_value_heads=1),
        vocabulary=7300,
        prompt_tokens=15,
        answer_tokens=38,
        max_answer_tokens=128,
    ),
    "so400m-1.5b": Size(
        vision=TransformerShape(1152, 27, 16, 4304),
        image_px=384,
        patch_px=16,
        language=TransformerShape(1536, 28, 12, 8960, key_value_heads=2),
        vocabulary=151936,
        prompt_tokens=60,
        answer_tokens=150,
        max_answer_tokens=512,
    ),
    "tiny-qwen2.5-vl": Size(
        vision=TransformerShape(160, 8, 4, 428),
        image_px=280,
        patch_px=14,
        language=TransformerShape(256, 9, 4, 1376, key_value_heads=1),
        vocabulary=4800,
        prompt_tokens=15,
        answer_tokens=38,
        max_answer_tokens=128,
        family="qwen2_5_vl",
        merge=2,
    ),
    "qwen2.5-vl-3b": Size(
        vision=TransformerShape(1280, 32, 16, 3420),
        image_px=560,
        patch_px=14,
        language=TransformerShape(2048, 36, 16, 11008, key_value_heads=2),
        vocabulary=151936,
        prompt_tokens=60,
        answer_tokens=150,
        max_answer_tokens=512,
        family="qwen2_5_vl",
        merge=2,
    ),
}


def random_policy(shape: Size, dtype: torch.dtype) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Make the MLLM of a size with random weights, and its processor."""
    vision, language = shape.vision, shape.language
    text: dict[str, Any] = {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.key_value_heads,
        "intermediate_size": language.intermediate_size,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "pad_token_id": PAD_TOKEN_ID,
        "eos_token_id": END_TOKEN_ID,
        "bos_token_id": None,
    }
    model: Any
    processor: Any
    if shape.family == "qwen2_5_vl":
        half_head = language.hidden_size // language.heads // 2
        section = [half_head - 2 * (3 * half_head // 8), 3 * half_head // 8, 3 * half_head // 8]  # as 16, 24, 24 of 64
        grids = {
            "depth": vision.layers,
            "num_heads": vision.heads,
            "hidden_size": vision.hidden_size,
            "out_hidden_size": language.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "patch_size": shape.patch_px,
            "spatial_merge_size": shape.merge,
            "fullatt_block_indexes": list(range(FULL_EVERY - 1, vision.layers, FULL_EVERY)),
        }
        rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1_000_000.0}
        model, processor = random_qwen2_5_vl(grids, {**text, "rope_parameters": rope})
        return model.to(dtype), processor
    vision_config = SiglipVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        intermediate_size=vision.intermediate_size,
        image_size=shape.image_px,
        patch_size=shape.patch_px,
        vision_use_head=False,
    )
    model, processor = random_mllm(vision_config, Qwen2Config(**text), feature_layer=-2)
    return model.to(dtype), processor


def size_of(name: str) -> Size:
    """Return the size of a name.

    Raises:
        ProbeError: There is none of this name; the message lists them.
    """
    if name not in SIZES:
        raise ProbeError(f"there is no size {name!r}; give one of {', '.join(SIZES)}.")
    return SIZES[name]
