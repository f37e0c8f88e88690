"""Load the MLLM of a stage checkpoint, refuse incomplete weights, and read sizes off a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from pivot_hub.encoder.configuration_pivot import check_feature_layer, check_sizes, native_config, prefix_tokens
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.encoder.modeling_pivot import refuse_pickles
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError

# What a tower of native resolution is refused for, and the remedy, see `require_squares`.
SQUARES_ONLY = (
    "an MLLM of transformers' LLaVA classes, as this package trains and explains them,",
    "give one of the other backbones; a tower of native resolution is used alone, by PivotVisionModel, `pivot encode` "
    "and `pivot probe`",
)


def load_mllm(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a stage checkpoint in float32.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: The folder does not hold a LLaVA model, or its weights are incomplete or a pickle.
    """
    path = Path(folder)
    mllm_config(path)
    model = load_complete(LlavaForConditionalGeneration, str(path), None)
    try:
        processor = AutoProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path}: its processor cannot be loaded: {loading_problem(path, error)}.") from error
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def mllm_config(path: Path) -> LlavaConfig:
    """Read the config of a stage checkpoint.

    Raises:
        CheckpointError: The folder does not hold a LLaVA model, a size of its config is wrong, or its vision tower is
            of native resolution.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give a stage's output folder.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{path}: its config cannot be read: {loading_problem(path, error)}.") from error
    if config.model_type != "llava":
        kind = f"{path} holds a {config.model_type} model"
        if hasattr(config, "vision_config") and hasattr(config, "image_token_id"):
            raise CheckpointError(
                f"{kind}, an MLLM, but not of LLaVA's classes, which training and probes need; give a LLaVA "
                f"checkpoint, or take its encoder out with `pivot extract {path} OUTPUT`."
            )
        raise CheckpointError(f"{kind}, not an MLLM; give a LLaVA checkpoint.")
    try:
        vision = native_config(config)
        check_sizes(config.text_config)
        check_feature_layer(config.vision_feature_layer, getattr(vision, "num_hidden_layers", None))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    require_squares(vision, path, *SQUARES_ONLY)
    return cast(LlavaConfig, config)


def image_px(model: LlavaForConditionalGeneration) -> int:
    """Side of the square images that the model's encoder takes, in pixels."""
    return int(cast(PreTrainedModel, model.model.vision_tower).config.image_size)


def register_tokens(model: LlavaForConditionalGeneration) -> int:
    """Number of tokens before the patches that enter the projector: LLaVA's classes drop CLS but keep registers."""
    return max(prefix_tokens(cast(PreTrainedConfig, model.config.vision_config)) - 1, 0)


def load_complete(loader: Any, name: str, revision: str | None, **options: Any) -> Any:
    """Load a model in float32 and refuse one whose weights are incomplete.

    transformers fills missing weights with random ones and only warns, so they would pass for trained weights.

    Args:
        loader: Class of transformers with a `from_pretrained`.
        name: Folder or Hub name of the model.
        revision: Hub revision of the model.
        **options: Further options for `from_pretrained`.

    Raises:
        CheckpointError: The model cannot be loaded, its weights are a pickle, are missing or have another shape, or it
            would run code of its own.
    """
    try:
        if Path(name).is_dir():
            refuse_pickles(Path(name))
        model, info = loader.from_pretrained(
            name,
            revision=revision,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: cannot be loaded: {loading_problem(name, error)}.") from error
    wrong = sorted(info["missing_keys"]) or [str(key[0]) for key in info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{name}: {len(wrong)} weights are missing or of another shape, {wrong[0]} first; "
            "download the checkpoint again or give its config.json the sizes of its weights."
        )
    return model
