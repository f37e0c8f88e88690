"""The vision tower of any model: of an MLLM of the table, of an encoder, or of a two-tower model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.modeling_pivot import read_image_processor, refuse_config
from pivot_hub.encoder.repository import LOADING_ERRORS, loading_problem
from pivot_hub.errors import CheckpointError
from pivot_hub.files import write_json
from pivot_hub.mllm.families import FAMILIES, REMOTE_CODE_FAMILIES
from pivot_hub.mllm.preprocessors import encoder_preprocessor
from pivot_hub.mllm.vision_part import HUB_NAME, VisionPart, read_vision_part
from pivot_hub.mllm.weight_files import Progress, WeightFiles, widest_dtype
from pivot_hub.outputs import scratch_folder
from pivot_hub.provenance import tensors_sha256


@dataclass(frozen=True)
class AnyTower:
    """A vision tower in the type that it is stored in, whose tensors have the names of transformers' own class.

    Args:
        name: Folder or Hub name, as it was given.
        revision: Commit of a Hub repository; None for a folder.
        kind: `mllm` or `encoder`.
        model_type: Model type of the MLLM or the encoder.
        tower: The tower, of transformers' own class.
        feature_layer: What enters the projector: the number of a hidden state, or a name. None for an encoder that
            belongs to no MLLM, and for an MLLM that joins the features of several layers.
        encoder: Function that returns the tower as a PivotVisionModel with its image processor.
    """

    name: str
    revision: str | None
    kind: str
    model_type: str
    tower: PreTrainedModel
    feature_layer: int | str | None
    encoder: Callable[[], PivotVisionModel]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.tower.state_dict())

    @property
    def dtype(self) -> torch.dtype:
        """Type of most of the stored values."""
        return self.tower.dtype

    def describe(self) -> dict[str, Any]:
        """Identify the tower in a record that others may read: of a folder, its own name without its path."""
        return {
            "name": public_name(self.name),
            "revision": self.revision,
            "kind": self.kind,
            "model_type": self.model_type,
            "dtype": dtype_name(self.dtype),
            "feature_layer": self.feature_layer,
            "tensors_sha256": tensors_sha256(self.tensors),
        }


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type without its package, as in `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def public_name(name: str) -> str:
    """Return a Hub name as it is, and of a folder its own name without its path."""
    if Path(name).is_dir():
        return Path(name).resolve().name
    return name if HUB_NAME.fullmatch(name) else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def read_tower(
    name: str | Path, revision: str | None = None, progress: Progress = lambda done, total: None
) -> AnyTower:
    """Load the vision tower of an MLLM, an encoder or a two-tower model; of an MLLM nothing else is read.

    Args:
        name: Folder or Hub name.
        revision: Revision of the Hub repository.
        progress: Function that is called after each read of an MLLM, with the bytes read and the bytes to read.

    Raises:
        CheckpointError: There is no such model, it has no vision tower that is supported, or its weights are
            incomplete, quantised or damaged.
    """
    name = resolve_encoder(name, revision=revision)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except LOADING_ERRORS:
        values = {}
    if not values and not Path(name).exists() and _is_path(str(name)):
        raise CheckpointError(
            f"{name}: there is no such folder; give the folder of an MLLM or an encoder, or its name on the Hub."
        )
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if not values or model_type in FAMILIES or model_type in REMOTE_CODE_FAMILIES:
        part = read_vision_part(name, revision, progress, with_projector=False)  # names what is wrong where all is
        return tower_of_part(part, revision)
    try:
        refuse_config(values, str(name))  # before any header of the weights is read
        weights = WeightFiles(name, revision)
        dtype = widest_dtype(weights.describe(weights.keys()).values())
        encoder = PivotVisionModel.from_pretrained(str(name), dtype=dtype, revision=revision)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{name}: is neither an MLLM of the table nor an encoder that can be loaded: "
            f"{loading_problem(name, error)}."
        ) from error
    native: PreTrainedConfig = encoder.config.backbone_config
    pivot = encoder.config.pivot
    layer = None if pivot["stage"] == "base" else pivot["feature_layer"]
    return AnyTower(
        str(name),
        weights.commit,
        "encoder",
        native.model_type,
        encoder.backbone,
        layer,
        lambda: with_processor(encoder),
    )


def _is_path(name: str) -> bool:
    """Return whether a name cannot be one of the Hub, which are `owner/name` or `name`."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1


def tower_of_part(part: VisionPart, revision: str | None = None) -> AnyTower:
    """Return the tower of an MLLM that was read by `read_vision_part`.

    Args:
        part: The vision tower, with or without its projector.
        revision: Revision of the Hub repository, which its image processor is read from.
    """
    try:
        layer: int | str | None = part.feature_layer
    except CheckpointError:
        layer = None
    name, model_type = part.weights.name, part.config.model_type
    return AnyTower(
        name, part.weights.commit, "mllm", model_type, part.tower, layer, lambda: _encoder_of_part(part, revision)
    )


def _encoder_of_part(part: VisionPart, revision: str | None) -> PivotVisionModel:
    """Wrap the tower of an MLLM, with the image processor that its extracted encoder would have."""
    name = part.weights.name
    preprocessor, _ = encoder_preprocessor(name, part, revision)
    encoder = PivotVisionModel(PivotVisionConfig(part.tower.config), part.tower).eval()
    try:
        with scratch_folder("pivot-preprocessor") as folder:
            write_json(folder / "preprocessor_config.json", preprocessor)
            encoder.image_processor = read_image_processor(str(folder), part.tower.config)
    except LOADING_ERRORS as error:
        problem = loading_problem(name, error).replace(f"{folder}: ", "")
        raise CheckpointError(f"{name}: its image processor cannot be loaded: {problem}.") from error
    return encoder


def with_processor(encoder: PivotVisionModel) -> PivotVisionModel:
    """Load an encoder's image processor, and return the encoder.

    Raises:
        CheckpointError: It has none.
    """
    try:
        encoder.image_processor  # noqa: B018  (it is loaded when it is first read)
    except LOADING_ERRORS as error:
        raise CheckpointError(str(error)) from error
    return encoder


def same_model(a: str | Path, b: str | Path, revision_a: str | None, revision_b: str | None) -> bool:
    """Return whether two names mean one model: the same folder, or the same revision of a Hub repository."""
    if Path(a).is_dir() or Path(b).is_dir():
        return Path(a).resolve() == Path(b).resolve()
    return (str(a), revision_a) == (str(b), revision_b)
