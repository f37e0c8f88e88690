"""Load the vision tower and the projector of any MLLM of the table, without its language model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.hub import cached_file

from pivot_hub.encoder.configuration_pivot import BACKBONES, check_sizes, native_config
from pivot_hub.encoder.modeling_pivot import unused_keys
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.mllm.families import REMOTE_CODE_FAMILIES, Family, family_of
from pivot_hub.mllm.weight_files import FLOATS, Progress, StoredTensor, WeightFiles, widest_dtype

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # OWNER/NAME
SCALE = "_scale_inv"  # ends the names of the scales of weights in FP8


@dataclass(frozen=True)
class VisionPart:
    """The vision tower of an MLLM and its projector, in the type that they are stored in.

    Args:
        family: The MLLM's entry in the table.
        config: Config of the MLLM.
        tower: The vision tower, of transformers' own class.
        projector: Weights of the projector; empty where the tower contains it.
        weights: The MLLM's weight files.
    """

    family: Family
    config: Any
    tower: PreTrainedModel
    projector: dict[str, torch.Tensor]
    weights: WeightFiles

    @property
    def feature_layer(self) -> int | str:
        """What enters the projector: the number of a hidden state, or `last_hidden_state`."""
        return self.family.feature_layer(self.config)


def mllm_family(name: str | Path, revision: str | None = None) -> tuple[Any, Family]:
    """Read the config of an MLLM, and look up its entry in the table.

    Args:
        name: Folder or Hub name.
        revision: Revision of the Hub repository.

    Raises:
        CheckpointError: It is not an MLLM of the table: an encoder, a LoRA adapter, a model that brings code of its
            own, or nothing at all. The message names the remedy.
    """
    if not Path(name).is_dir() and not HUB_NAME.fullmatch(str(name)):
        raise CheckpointError(f"{name}: there is no such folder; give an MLLM's folder, or its Hub name OWNER/NAME.")
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(name), revision=revision)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its config cannot be read: {loading_problem(name, error)}.") from error
    if not values and _has_file(name, "adapter_config.json", revision):
        raise CheckpointError(
            f"{name}: is a LoRA adapter, not a model; merge it into its base with peft's merge_and_unload(), save the "
            "result, and extract from that."
        )
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type in BACKBONES or model_type == "pivot_vision":
        raise CheckpointError(f"{name}: is an encoder ({model_type}) already; load it with PivotVisionModel.")
    if model_type in REMOTE_CODE_FAMILIES:
        raise CheckpointError(
            f"{name}: is a {model_type} model, which brings code of its own that is not run; "
            f"{REMOTE_CODE_FAMILIES[model_type]}."
        )
    try:
        config = AutoConfig.from_pretrained(str(name), revision=revision, trust_remote_code=False)
    except LOADING_ERRORS as error:
        if "auto_map" in values:
            raise CheckpointError(
                f"{name}: is a {model_type} model, which brings code of its own that is not run; give a repository in "
                "transformers' own format."
            ) from error
        raise CheckpointError(f"{name}: its config cannot be read: {loading_problem(name, error)}.") from error
    try:
        family = family_of(config)
        # Older releases wrote other names, such as `idefics3` for `idefics3_vision`, which the class itself corrects.
        config.vision_config.model_type = type(config.vision_config).model_type
        native_config(config)
        check_sizes(config.get_text_config())
        family.feature_layer(config)
    except (CheckpointError, ValueError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    return config, family


def read_vision_part(
    name: str | Path,
    revision: str | None = None,
    progress: Progress = lambda done, total: None,
    with_projector: bool = True,
) -> VisionPart:
    """Load the vision tower and the projector of an MLLM; no tensor of the language model is read or allocated.

    Args:
        name: Folder or Hub name.
        revision: Revision of the Hub repository.
        progress: Function that is called after each read, with the bytes read and the bytes to read.
        with_projector: Whether to read the projector; without it, only the tower is read.

    Raises:
        CheckpointError: It is not an MLLM of the table, or its tower is incomplete, quantised or damaged.
    """
    config, family = mllm_family(name, revision)
    weights = WeightFiles(name, revision)
    keys = [key for key in weights.keys() if _is_vision(key, family, with_projector)]  # noqa: SIM118
    stored = weights.describe(keys)
    options = _loading_options(name, stored, config)
    tensors = weights.read(keys, progress)
    model_class: Any = AutoModelForImageTextToText._model_mapping[type(config)]
    projector_name = family.projector if with_projector else None
    kept = (family.tower, projector_name)
    try:
        model, info = _without_language_model(model_class, kept).from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True, **options
        )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: its vision tower cannot be loaded: {loading_problem(name, error)}.") from error
    inner = model.model
    tower = getattr(inner, family.tower)
    parts = (f"{family.tower}.", f"{family.projector}.")
    missing = sorted(key for key in info["missing_keys"] if key.removeprefix("model.").startswith(parts))
    wrong = missing or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"{name}: {len(wrong)} weights of its vision tower or projector are missing or of another shape than "
            f"config.json says ({wrong[0]} first); download it again, or give the config that belongs to them."
        )
    inside = [key.partition(f"{family.tower}.")[2] for key in info["unexpected_keys"]]
    if unused := unused_keys(tower, filter(None, inside)):
        raise CheckpointError(
            f"{name}: {len(unused)} weights of its vision tower are not used ({unused[0]} first), because config.json "
            "says fewer layers than the weights have; give the config that belongs to them."
        )
    projector = {} if projector_name is None else getattr(inner, projector_name).state_dict()
    for key, tensor in [*tower.named_parameters(), *projector.items()]:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name}: {key} holds values that are not finite (NaN or infinite); take another checkpoint."
            )
    return VisionPart(family, config, tower.eval(), projector, weights)


def _is_vision(key: str, family: Family, with_projector: bool) -> bool:
    """Return whether a tensor belongs to the vision tower or the projector, whatever the release that saved it."""
    names = key.split(".")[:3]
    if family.language in names or names[0] == "lm_head" or (family.projector in names and not with_projector):
        return False
    return bool({"vision_tower", "visual", "vision_model", family.tower, family.projector} & set(names))


def _loading_options(name: str | Path, stored: dict[str, StoredTensor], config: Any) -> dict[str, Any]:
    """Return the type that the tower is loaded in, which holds all of its values, and how it is dequantised.

    A tower in FP8 is dequantised by transformers. Where only the language model is quantised, the config's entry is
    deleted, so that transformers does not quantise the tower.

    Raises:
        CheckpointError: There are no tensors, or the tower is quantised in another way.
    """
    if not stored:
        raise CheckpointError(f"{name}: holds no weights of a vision tower; give the whole checkpoint.")
    quantised = sorted(key for key, tensor in stored.items() if tensor.dtype not in FLOATS)
    settings = getattr(config, "quantization_config", None)
    settings = settings if isinstance(settings, dict) else getattr(settings, "to_dict", dict)()
    method = str(settings.get("quant_method", "an unknown method"))
    options: dict[str, Any] = {"dtype": widest_dtype(t for key, t in stored.items() if not key.endswith(SCALE))}
    if not quantised:
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        return options
    if method == "fp8" and all(f"{key.removesuffix('.weight')}.weight{SCALE}" in stored for key in quantised):
        return options | {"quantization_config": FineGrainedFP8Config(dequantize=True)}
    raise CheckpointError(
        f"{name}: its vision tower is quantised ({method}, {quantised[0]} first); give the checkpoint that it was "
        "quantised from, or dequantise it with transformers, model.dequantize(), and save that."
    )


def _without_language_model(model_class: Any, kept: tuple[str | None, ...]) -> Any:
    """Return an MLLM's class whose models have only the modules named in `kept`: a tower, and mostly a projector.

    `from_pretrained` builds models without memory, so the language model costs none before it is dropped, and
    transformers converts the keys of every release as it does for the whole model.
    """

    class WithoutLanguageModel(model_class):
        _tied_weights_keys: Any = {}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name in [n for n, _ in self.model.named_children() if n not in kept]:
                delattr(self.model, name)
            for name in [n for n, _ in self.named_children() if n != "model"]:
                delattr(self, name)

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            """Tie nothing: the embeddings are dropped."""

    WithoutLanguageModel.__name__ = model_class.__name__  # by which transformers looks up its conversions of keys
    return WithoutLanguageModel


def _has_file(name: str | Path, file: str, revision: str | None) -> bool:
    try:
        return cached_file(str(name), file, revision=revision, _raise_exceptions_for_missing_entries=False) is not None
    except LOADING_ERRORS:
        return False
