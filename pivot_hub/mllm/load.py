"""Load the MLLM of a stage checkpoint, refuse incomplete weights, and read sizes off a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.errors import CheckpointError


def load_mllm(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a stage checkpoint in float32.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: The folder does not hold a LLaVA model, or some of its weights are missing.
    """
    path = Path(folder)
    mllm_config(path)
    model = load_complete(LlavaForConditionalGeneration, str(path), None)
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def mllm_config(path: Path) -> LlavaConfig:
    """Read the config of a stage checkpoint.

    Raises:
        CheckpointError: The folder does not hold a LLaVA model.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give a stage's output folder.")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llava":
        raise CheckpointError(f"{path} holds a {config.model_type} model, not an MLLM; give a LLaVA checkpoint.")
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
        CheckpointError: The model cannot be loaded, or weights are missing or have another shape.
    """
    try:
        model, info = loader.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: cannot be loaded: {reason}") from error
    wrong = sorted(info["missing_keys"]) or [str(key[0]) for key in info["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f"{name}: {len(wrong)} weights are missing or of another shape, {wrong[0]} first; "
            "download the checkpoint again or give its config.json the sizes of its weights."
        )
    return model
