"""Join a vision encoder, a projector and a language model into an MLLM of LLaVA's classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import backbone_of
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.chat_templates import ChatFormat, chat_format
from pivot_hub.mllm.load import load_complete


def build_mllm(
    vision: str,
    language: str,
    feature_layer: int = -2,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a vision encoder and a causal language model with a fresh projector.

    Args:
        vision: folder or Hub name of the encoder; of a two-tower model the vision tower is taken.
        language: folder or Hub name of the causal language model.
        feature_layer: hidden state that enters the projector, -2 in the paper.
        seed: of the projector's weights, the only new ones.

    Returns:
        The model in float32 and its processor, chat template included.

    Raises:
        CheckpointError: a part is missing or some of its weights are.
    """
    encoder, image_processor = _load_encoder(vision, vision_revision)
    tower = encoder.backbone
    head = load_complete(AutoModelForCausalLM, language, language_revision)
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, head, chat)
    prefix = encoder.config.pivot["prefix_tokens"]
    strategy: Literal["default", "full"] = "default" if prefix else "full"
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=head.config,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(chat.image_token)),
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        # LLaVA's classes drop one prefix token, CLS; registers go on to the language head.
        image_seq_length=patches + max(prefix - 1, 0),
        tie_word_embeddings=head.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # the parts bring their weights: none is drawn twice
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = head.model
    model.lm_head = head.lm_head
    model.tie_weights()
    stop = tokenizer.convert_tokens_to_ids(chat.turn_end)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    processor = _processor(cast(PivotVisionConfig, encoder.config), image_processor, tokenizer, chat)
    return model, processor


def read_processor(
    vision: str, language: str, vision_revision: str | None = None, language_revision: str | None = None
) -> LlavaProcessor:
    """The processor that `build_mllm` gives, without loading a weight.

    Raises:
        CheckpointError: a part's config, image processor or tokenizer cannot be read.
    """
    try:
        config = PivotVisionConfig.from_pretrained(vision, revision=vision_revision or "main")
        image_processor = read_image_processor(vision, config.backbone_config, revision=vision_revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix(f"{vision}: ").rstrip(".")
        hint = "" if Path(vision).exists() else "; give a folder, or a Hub name where the Hub or its cache is in reach"
        raise CheckpointError(f"{vision}: its configuration cannot be read: {reason}{hint}.") from error
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, None, chat)
    return _processor(config, image_processor, tokenizer, chat)


def _processor(
    config: PivotVisionConfig, image_processor: Any, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
) -> LlavaProcessor:
    prefix = config.pivot["prefix_tokens"]
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default" if prefix else "full",
        num_additional_image_tokens=prefix,
        image_token=chat.image_token,
        chat_template=chat.template,
    )


def _load_encoder(name: str, revision: str | None) -> tuple[PivotVisionModel, Any]:
    """Load an encoder with its image processor; one whose hidden states are maps does not fit LLaVA's classes."""
    encoder, image_processor = read_encoder(name, revision=revision)
    if backbone_of(encoder.config.backbone_config).maps:
        raise CheckpointError(
            f"{name}: timm models give feature maps, which transformers' LLaVA does not take; give the same encoder "
            "in its transformers format, or use it as a feature extractor."
        )
    return encoder, image_processor


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {reason}") from error


def _add_tokens(tokenizer: PreTrainedTokenizerBase, head: PreTrainedModel | None, chat: ChatFormat) -> None:
    """Give the tokenizer the image and turn tokens where it lacks them, and the embedding room for them."""
    known = tokenizer.get_vocab()
    new = [t for t in (chat.image_token, chat.turn_start, chat.turn_end) if t not in known]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if head is not None and len(tokenizer) > cast(nn.Embedding, head.get_input_embeddings()).num_embeddings:
        head.resize_token_embeddings(len(tokenizer), mean_resizing=False)
