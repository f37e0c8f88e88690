"""Load an MLLM of any family of the table, refuse incomplete weights, and read sizes off a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from pivot_hub.encoder.configuration_pivot import (
    LAST,
    backbone_of,
    check_feature_layer,
    check_sizes,
    native_config,
)
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.encoder.modeling_pivot import refuse_pickles
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.processor import load_processor

# What a tower of native resolution is refused for, and the remedy, see `require_squares`.
SQUARES_ONLY = (
    "an MLLM of transformers' LLaVA classes, as this package builds them from parts,",
    "give one of the other backbones; a tower of native resolution is used alone, by PivotVisionModel, `pivot encode` "
    "and `pivot probe`, and that of Qwen2.5-VL also with `model.family: qwen2_5_vl`",
)


def load_mllm(name: str | Path, revision: str | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load an MLLM of any family of `mllm/families.py` in float32, and its processor.

    Args:
        name: Folder of a stage checkpoint or of any MLLM, or a Hub name.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: It is not an MLLM of the table, or its weights are incomplete or a pickle.
    """
    mllm_config(name, revision)
    model = load_complete(AutoModelForImageTextToText, str(name), revision)
    return cast(PreTrainedModel, model), load_processor(name, revision)


def load_llava(folder: str | Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load an MLLM of transformers' LLaVA classes with an encoder of square images, in float32.

    Raises:
        CheckpointError: The folder does not hold such an MLLM, or its weights are incomplete or a pickle.
    """
    require_llava(mllm_config(folder), folder)
    return cast(tuple[LlavaForConditionalGeneration, LlavaProcessor], load_mllm(folder))


def mllm_config(name: str | Path, revision: str | None = None) -> PreTrainedConfig:
    """Read the config of an MLLM.

    Raises:
        CheckpointError: It is not an MLLM of the table, or a size of its config is wrong.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is not a checkpoint: it has no config.json; give a stage's output folder.")
    try:
        config: Any = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its config cannot be read: {loading_problem(name, error)}.") from error
    try:
        family = family_of(config)
    except CheckpointError as error:
        raise CheckpointError(f"{name} {error}") from error
    try:
        vision: Any = native_config(config)
        check_sizes(config.get_text_config())
        if backbone_of(vision).layout is None and (layer := family.feature_layer(config)) != LAST:
            check_feature_layer(layer, getattr(vision, "num_hidden_layers", None))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return cast(PreTrainedConfig, config)


def require_llava(config: Any, name: object) -> None:
    """Refuse an MLLM that is not of LLaVA's classes with an encoder of square images.

    Raises:
        CheckpointError: It is another MLLM; the message says what to do with it.
    """
    if config.model_type != "llava":
        raise CheckpointError(
            f"{name} holds a {config.model_type} model, an MLLM, but not of LLaVA's classes, which this needs; give a "
            f"LLaVA checkpoint, or take its encoder out with `pivot extract {name} OUTPUT`."
        )
    require_squares(native_config(config), name, *SQUARES_ONLY)


def image_px(model: LlavaForConditionalGeneration) -> int:
    """Side of the square images that the model's encoder takes, in pixels."""
    return int(cast(PreTrainedModel, model.model.vision_tower).config.image_size)


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
