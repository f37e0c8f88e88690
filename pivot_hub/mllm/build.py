"""Build an MLLM from a vision encoder, a new projector and a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from pivot_hub.config.recipe import JoinedFamily
from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.image_shapes import refuse_native
from pivot_hub.encoder.modeling_pivot import read_image_processor
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem, read_encoder
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.chat_templates import ChatFormat, chat_format
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.joined_families import JOINED
from pivot_hub.mllm.load import SQUARES_ONLY, load_complete
from pivot_hub.mllm.published_configs import meta_model


def build_mllm(
    vision: str,
    language: str,
    feature_layer: int = -2,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    seed: int = 0,
    family: JoinedFamily | None = None,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Join a vision encoder and a causal language model with a new projector.

    Args:
        vision: Folder, Hub name or short name of the encoder. A two-tower model contributes its vision tower.
        language: Folder or Hub name of the causal language model.
        feature_layer: Hidden state that enters LLaVA's projector, -2 in the paper; other families' take the last one.
        vision_revision: Hub revision of the encoder.
        language_revision: Hub revision of the language model.
        seed: Seed of the projector's weights, the only new ones.
        family: Model type of the MLLM; LLaVA's by default.

    Returns:
        The model in float32 and its processor, which includes the chat template.

    Raises:
        CheckpointError: A part does not exist, some of its weights are missing, or the family does not take it
            or the feature layer.
    """
    joined = JOINED[family]
    if family is None:  # before the weights are read
        refuse_native(vision, *SQUARES_ONLY, vision_revision)
    elif feature_layer != -2:
        raise CheckpointError(f"the projector of {family} reads the last hidden state; leave out `feature_layer`.")
    encoder, image_processor = read_encoder(vision, revision=vision_revision)
    tower = encoder.backbone
    joined.check(vision, tower.config, feature_layer)
    language_model = load_complete(AutoModelForCausalLM, language, language_revision)
    joined.check_language(language, language_model.config)
    tokenizer = _load_tokenizer(language, language_revision, joined.attributes)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, language_model, chat, joined.tokens)
    image_token = cast(int, tokenizer.convert_tokens_to_ids(joined.image_token(chat)))
    config = joined.config(tower.config, language_model.config, feature_layer, image_token)
    joined.set_token_ids(config, tokenizer)
    model: Any = meta_model(config)  # the parts bring their weights, so none are initialised here
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joined.set_vision(model.model, tower, config)
    joined.set_language(model.model, language_model.model, config)
    model.lm_head = language_model.lm_head
    model.tie_weights()
    stop = tokenizer.convert_tokens_to_ids(chat.turn_end)
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=tokenizer.pad_token_id)
    return model, joined.processor(tower.config, image_processor, tokenizer, chat)


def read_processor(
    vision: str,
    language: str,
    vision_revision: str | None = None,
    language_revision: str | None = None,
    family: JoinedFamily | None = None,
) -> ProcessorMixin:
    """Build the processor that `build_mllm` returns, without loading any weights.

    Args:
        vision: Folder, Hub name or short name of the encoder.
        language: Folder or Hub name of the causal language model.
        vision_revision: Hub revision of the encoder.
        language_revision: Hub revision of the language model.
        family: Model type of the MLLM; LLaVA's by default.

    Raises:
        CheckpointError: A part's config, image processor or tokenizer cannot be read, or the family does not take the
            encoder.
    """
    joined = JOINED[family]
    if family is None:
        refuse_native(vision, *SQUARES_ONLY, vision_revision)
    try:
        config = PivotVisionConfig.from_pretrained(vision, revision=vision_revision or "main").backbone_config
        image_processor = read_image_processor(vision, config, revision=vision_revision)
    except LOADING_ERRORS as error:
        problem = loading_problem(vision, error)
        raise CheckpointError(f"{vision}: its configuration cannot be read: {problem}.") from error
    joined.check(vision, config, -1)
    tokenizer = _load_tokenizer(language, language_revision, joined.attributes)
    chat = chat_format(tokenizer)
    _add_tokens(tokenizer, None, chat, joined.tokens)
    return joined.processor(config, image_processor, tokenizer, chat)


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


def _load_tokenizer(name: str, revision: str | None, attributes: Mapping[str, str]) -> PreTrainedTokenizerBase:
    own = {"extra_special_tokens": dict(attributes)} if attributes else {}
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, **own)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {loading_problem(name, error)}.") from error


def _add_tokens(
    tokenizer: PreTrainedTokenizerBase,
    language_model: PreTrainedModel | None,
    chat: ChatFormat,
    tokens: Sequence[str],
) -> None:
    """Add the image and turn tokens that the tokenizer lacks, and enlarge the embedding where it is too small."""
    vocabulary = tokenizer.get_vocab()
    needed = (chat.image_token, chat.turn_start, chat.turn_end, *tokens)
    absent = [token for token in needed if token not in vocabulary]
    if absent:
        tokenizer.add_special_tokens({"extra_special_tokens": absent})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if language_model is None:
        return
    if len(tokenizer) > cast(nn.Embedding, language_model.get_input_embeddings()).num_embeddings:
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
