"""Load an MLLM, and ask it what a caller must know: its image size and its chat prompt."""

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
    PreTrainedTokenizerBase,
)

from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.errors import CheckpointError


def load_mllm(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a stage checkpoint in float32.

    Raises:
        CheckpointError: the folder holds no LLaVA model, or not all of its weights.
    """
    path = Path(folder)
    mllm_config(path)
    model = load_complete(LlavaForConditionalGeneration, str(path), None)
    processor = AutoProcessor.from_pretrained(path, backend="pil")
    return cast(LlavaForConditionalGeneration, model), cast(LlavaProcessor, processor)


def mllm_config(path: Path) -> LlavaConfig:
    """The config of a stage checkpoint.

    Raises:
        CheckpointError: the folder holds no LLaVA model.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give a stage's output folder.")
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llava":
        raise CheckpointError(f"{path} holds a {config.model_type} model, not an MLLM; give a LLaVA checkpoint.")
    return cast(LlavaConfig, config)


def image_px(model: LlavaForConditionalGeneration) -> int:
    """Side of the square images the model's encoder takes."""
    return int(cast(PreTrainedModel, model.model.vision_tower).config.image_size)


def register_tokens(model: LlavaForConditionalGeneration) -> int:
    """Tokens before the patches that enter the projector: LLaVA's classes drop CLS, and registers go on."""
    return max(prefix_tokens(cast(PreTrainedConfig, model.config.vision_config)) - 1, 0)


def chat_prompt(processor: LlavaProcessor | PreTrainedTokenizerBase, question: str, images: int = 1) -> str:
    """One question, on one image, several or none, in the chat format up to where the answer begins."""
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    turns: Any = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def load_complete(loader: Any, name: str, revision: str | None, **options: Any) -> Any:
    """Load a model in float32 and refuse one with weights missing: random weights must never pass for trained."""
    try:
        model, info = loader.from_pretrained(
            name, revision=revision, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: cannot be loaded: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing or info["mismatched_keys"]:
        named = missing or [str(k[0]) for k in info["mismatched_keys"]]
        raise CheckpointError(
            f"{name}: {len(named)} weights are missing or of another shape, {named[0]} first; "
            "download the checkpoint again or give its config.json the sizes of its weights."
        )
    return model
