"""Build an MLLM of LLaVA's classes from a vision encoder, a new projector and a language model."""

from __future__ import annotations

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
from pivot_hub.encoder.configuration_pivot import backbone_of, check_feature_layer
from pivot_hub.encoder.image_shapes import refuse_native
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem, read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.chat_templates import ChatFormat, chat_format
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import SQUARES_ONLY, load_complete


def build_mllm(
    vision: str,
    language: str,
    feature_layer: int = -2,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join a vision encoder and a causal language model with a new projector.

    Args:
        vision: Folder, Hub name or short name of the encoder. A two-tower model contributes its vision tower.
        language: Folder or Hub name of the causal language model.
        feature_layer: Hidden state that enters the projector, -2 in the paper.
        vision_revision: Hub revision of the encoder.
        language_revision: Hub revision of the language model.
        seed: Seed of the projector's weights, the only new ones.

    Returns:
        The model in float32 and its processor, which includes the chat template.

    Raises:
        CheckpointError: A part does not exist, some of its weights are missing, or the encoder is a tower of native
            resolution.
    """
    refuse_native(vision, *SQUARES_ONLY, vision_revision)
    encoder, image_processor = _load_encoder(vision, vision_revision)
    try:
        check_feature_layer(feature_layer, encoder.config.num_hidden_layers)
    except ValueError as error:
        raise CheckpointError(f"{vision}: {error}") from error
    tower = encoder.backbone
    language_model = load_complete(AutoModelForCausalLM, language, language_revision)
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, language_model, chat)
    prefix = encoder.config.pivot["prefix_tokens"]
    strategy: Literal["default", "full"] = "default" if prefix else "full"
    patches = (encoder.config.image_size // encoder.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids(chat.image_token)),
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        # LLaVA's classes drop one prefix token, CLS; registers enter the language model.
        image_seq_length=patches + max(prefix - 1, 0),
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # the parts bring their weights, so none are initialised here
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = LlavaMultiModalProjector(config)
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.tie_weights()
    stop = tokenizer.convert_tokens_to_ids(chat.turn_end)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    processor = _processor(cast(PivotVisionConfig, encoder.config), image_processor, tokenizer, chat)
    return model, processor


def read_processor(
    vision: str, language: str, vision_revision: str | None = None, language_revision: str | None = None
) -> LlavaProcessor:
    """Build the processor that `build_mllm` returns, without loading any weights.

    Args:
        vision: Folder, Hub name or short name of the encoder.
        language: Folder or Hub name of the causal language model.
        vision_revision: Hub revision of the encoder.
        language_revision: Hub revision of the language model.

    Raises:
        CheckpointError: A part's config, image processor or tokenizer cannot be read, or the encoder is a tower of
            native resolution.
    """
    refuse_native(vision, *SQUARES_ONLY, vision_revision)
    try:
        config = PivotVisionConfig.from_pretrained(vision, revision=vision_revision or "main")
        image_processor = read_image_processor(vision, config.backbone_config, revision=vision_revision)
    except LOADING_ERRORS as error:
        problem = loading_problem(vision, error)
        raise CheckpointError(f"{vision}: its configuration cannot be read: {problem}.") from error
    tokenizer = _load_tokenizer(language, language_revision)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, None, chat)
    return _processor(config, image_processor, tokenizer, chat)


def randomise_vision(model: PreTrainedModel, seed: int) -> None:
    """Replace the vision tower's weights by the random ones that its training would start from.

    The result is a baseline: what such a model shows does not come from the encoder's training. The projector keeps its
    weights, also where the tower contains it.
    """
    family = family_of(model.config)
    tower: Any = getattr(model.model, family.tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random_tower = type(tower)._from_config(tower.config)
    weights = random_tower.state_dict()
    own = {name: w for name, w in weights.items() if family.part_of(f"model.{family.tower}.{name}") == "vision"}
    tower.load_state_dict(own, strict=False)


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
    """Load an encoder and its image processor; refuse one whose hidden states are maps, which LLaVA cannot use."""
    encoder, image_processor = read_encoder(name, revision=revision)
    if backbone_of(encoder.config.backbone_config).maps:
        raise CheckpointError(
            f"{name}: timm models give feature maps, which transformers' LLaVA does not take; give the same encoder "
            "in its transformers format, or use it as a feature extractor."
        )
    return encoder, image_processor


def _load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {loading_problem(name, error)}.") from error


def _add_tokens(tokenizer: PreTrainedTokenizerBase, language_model: PreTrainedModel | None, chat: ChatFormat) -> None:
    """Add the image and turn tokens that the tokenizer lacks, and enlarge the embedding where it is too small."""
    vocabulary = tokenizer.get_vocab()
    absent = [token for token in (chat.image_token, chat.turn_start, chat.turn_end) if token not in vocabulary]
    if absent:
        tokenizer.add_special_tokens({"extra_special_tokens": absent})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language_model is None:
        return
    if len(tokenizer) > cast(nn.Embedding, language_model.get_input_embeddings()).num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
