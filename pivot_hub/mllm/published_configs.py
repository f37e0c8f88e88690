"""Configs of published MLLMs and their parts by Hub name, and the MLLMs that they describe, without any weights."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from pivot_hub.config.recipe import RECIPES, JoinedFamily
from pivot_hub.encoder.configuration_pivot import BACKBONES, check_sizes, native_config
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.joined_families import JOINED
from pivot_hub.mllm.load import SQUARES_ONLY, mllm_config


@lru_cache
def _published() -> dict[str, dict[str, Any]]:
    """Read `recipes/parts.yaml`: config, number of parameters and licence of each model, by its Hub name."""
    return cast(dict[str, dict[str, Any]], yaml.safe_load((RECIPES / "parts.yaml").read_text()))


def published_parts() -> dict[str, dict[str, Any]]:
    """Return config, number of parameters and licence of each encoder and language model, by its Hub name."""
    return {name: entry for name, entry in _published().items() if "vision_config" not in entry["config"]}


def published_mllms() -> dict[str, dict[str, Any]]:
    """Return config, number of parameters and licence of each whole MLLM, by its Hub name."""
    return {name: entry for name, entry in _published().items() if "vision_config" in entry["config"]}


def part_config(name: str, revision: str | None = None, squares: bool = True) -> PreTrainedConfig:
    """Find the config of an encoder or a language model, without its weights.

    Args:
        name: Folder or Hub name. A Hub name is looked up in `recipes/parts.yaml` first, and on the Hub second.
        revision: Revision of the Hub repository; if given, the config is always read from the Hub.
        squares: Whether an encoder of square images is needed.

    Returns:
        The native config. For a two-tower model it is the config of the vision tower.

    Raises:
        CheckpointError: There is no config, transformers does not know its architecture, or it is of a tower of native
            resolution where square images are needed.
    """
    try:
        if revision is None and not Path(name).is_dir() and name in published_parts():
            config = AutoConfig.for_model(**published_parts()[name]["config"])
        else:
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        is_vision = hasattr(config, "vision_config") or config.model_type in BACKBONES
        part = native_config(config) if is_vision else config
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{name}: its config cannot be read: {loading_problem(name, error)}; give a folder that "
            "holds its config.json, connect to the "
            f"Hub, or give one of: {', '.join(published_parts())}."
        ) from error
    if is_vision and squares:
        require_squares(part, name, *SQUARES_ONLY)
    return part


def whole_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """Find the config of an MLLM, without its weights.

    Args:
        name: Folder or Hub name. A Hub name is looked up in `recipes/parts.yaml` first, and on the Hub second.
        revision: Revision of the Hub repository; if given, the config is always read from the Hub.

    Raises:
        CheckpointError: There is no config, or it is not of an MLLM of the table.
    """
    if revision is None and not Path(name).is_dir() and name in published_mllms():
        return AutoConfig.for_model(**published_mllms()[name]["config"])
    return mllm_config(name, revision)


def joined_config(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    feature_layer: int,
    family: JoinedFamily | None = None,
) -> PreTrainedConfig:
    """Return the config of the MLLM of two parts.

    It describes the model that `mllm.build.build_mllm` builds, except that the vocabulary is the language model's own,
    whereas `build_mllm` adds the tokens that its tokenizer lacks.

    Args:
        vision_config: Native config of the encoder.
        text_config: Config of the language model.
        feature_layer: Hidden state of the encoder that enters the projector.
        family: Model type of the MLLM; LLaVA's by default.

    Raises:
        CheckpointError: The family cannot combine the parts.
    """
    joined = JOINED[family]
    joined.check("the encoder", vision_config, feature_layer)
    joined.check_language("the language model", text_config)
    try:
        check_sizes(text_config)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return joined.config(vision_config, text_config, feature_layer, cast(Any, text_config).vocab_size - 1)


def meta_mllm(
    vision_config: PreTrainedConfig, text_config: PreTrainedConfig, feature_layer: int
) -> LlavaForConditionalGeneration:
    """Build the MLLM of `joined_config` on the meta device, with shapes but without weights."""
    return cast(LlavaForConditionalGeneration, meta_model(joined_config(vision_config, text_config, feature_layer)))


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the MLLM of a config on the meta device, with shapes but without weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
