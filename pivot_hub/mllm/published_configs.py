"""The parts of an MLLM without their weights: configs of published ones by name, and the model they make."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig

from pivot_hub.config.recipe import RECIPES
from pivot_hub.encoder.configuration_pivot import BACKBONES, backbone_of, native_config, prefix_tokens
from pivot_hub.errors import CheckpointError


@lru_cache
def published_parts() -> dict[str, dict[str, Any]]:
    """What `recipes/parts.yaml` says of each Hub name: config, parameters, licence."""
    return cast(dict[str, dict[str, Any]], yaml.safe_load((RECIPES / "parts.yaml").read_text()))


def part_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Find the config of an encoder or a language model, without its weights.

    Args:
        name: a folder; or a Hub name, which is looked up in `recipes/parts.yaml` before the Hub is asked.
        revision: of the Hub repository; one that is given is read from the Hub.

    Returns:
        The native config; of a two-tower model that of its vision tower.

    Raises:
        CheckpointError: there is no config, or it is of an architecture that transformers does not know.
    """
    try:
        if revision is None and not Path(name).is_dir() and name in published_parts():
            config = AutoConfig.for_model(**published_parts()[name]["config"])
        else:
            config = AutoConfig.from_pretrained(name, revision=revision)
        is_vision = hasattr(config, "vision_config") or config.model_type in BACKBONES
        return native_config(config) if is_vision else config
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: its config cannot be read: {reason}; give a folder that holds its config.json, connect to the "
            f"Hub, or give one of: {', '.join(published_parts())}."
        ) from error


def image_tokens(vision: PreTrainedConfig) -> int:
    """Tokens of an image in the language model: its patches and registers; LLaVA's classes drop CLS."""
    side = backbone_of(vision).image_px(vision) // int(cast(Any, vision).patch_size)
    return side**2 + max(prefix_tokens(vision) - 1, 0)


def meta_mllm(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, feature_layer: int
) -> LlavaForConditionalGeneration:
    """Make the MLLM that `mllm.build_mllm` makes of two parts, on the meta device: shapes and no weights.

    The vocabulary is the language model's own; `build_mllm` adds the tokens that its tokenizer lacks.

    Raises:
        CheckpointError: the parts do not go together in transformers' LLaVA classes.
    """
    if backbone_of(vision_config).maps:
        raise CheckpointError("timm models give feature maps, which transformers' LLaVA does not take.")
    text: Any = text_config
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=text.vocab_size - 1,
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default" if prefix_tokens(vision_config) else "full",
        image_seq_length=image_tokens(vision_config),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)
