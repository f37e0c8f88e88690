"""Extract the encoder of an MLLM and write it as an encoder repository."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils.hub import cached_file

from pivot_hub import __version__
from pivot_hub.config.recipe import load_recipe
from pivot_hub.encoder import PivotVisionConfig, PivotVisionModel
from pivot_hub.encoder.configuration_pivot import backbone_of, prefix_tokens
from pivot_hub.encoder.repository import write_repository
from pivot_hub.errors import CheckpointError, RecipeError
from pivot_hub.mllm.any_tower import public_name
from pivot_hub.mllm.base_comparison import base_comparison
from pivot_hub.mllm.preprocessors import encoder_preprocessor
from pivot_hub.mllm.vision_part import VisionPart, read_vision_part
from pivot_hub.mllm.weight_files import Progress, WeightFiles
from pivot_hub.outputs import ENCODER, check_replaceable
from pivot_hub.provenance import tensors_sha256, versions, weights_sha256


def extract_encoder(
    checkpoint: str | Path,
    output: str | Path,
    command: str | None = None,
    revision: str | None = None,
    progress: Progress = lambda done, total: None,
    compare_with_base: bool = True,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Extract the encoder of an MLLM, of this package or anyone's, and write it as a repository.

    Only the tensors of the vision tower and the projector are read. The features equal those inside the MLLM bit for
    bit: the tower is loaded by the MLLM's own class, and the repository is read back before the folder appears.

    Args:
        checkpoint: Folder of a finished stage; folder or Hub name of an MLLM of the table in `families.py`.
        output: Folder that the repository is written to; an earlier repository is replaced.
        command: Command that reproduces this encoder, for provenance.json. By default it is derived from the
            recipes, provided that all of them are shipped ones, or from the name of the MLLM.
        revision: Revision of a Hub repository.
        progress: Function that is called after each read, with the bytes read and the bytes to read.
        compare_with_base: Whether to compare the tower with that of the base model, which the card of somebody else's
            MLLM names, to find out whether training moved it. Where the base cannot be read, the encoder is extracted
            all the same, and provenance.json says why there is no comparison.
        log: Function that receives lines on what was read, on what differs from the MLLM, and on that comparison.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: The checkpoint is not an MLLM of the table, its tower is incomplete, quantised or damaged, or
            the written weights do not read back equal.
        OutputError: The output holds anything but an encoder repository, or another process is writing it.
    """
    check_replaceable(Path(output), ENCODER)  # before the work, and again after it
    stage = _stage_provenance(Path(checkpoint))
    part = read_vision_part(checkpoint, revision, progress)
    preprocessor, own_processor = encoder_preprocessor(checkpoint, part, revision)
    read, total = part.weights.bytes_read, part.weights.total_bytes
    log(f"{part.family.title}: read {read / 1e6:,.1f} MB of the checkpoint's {total / 1e6:,.1f} MB")
    notes = _differences(part, preprocessor["image_processor_type"], own_processor)
    for note in notes:
        log(note)
    default: list[str] | None
    if stage is not None:
        metadata = _stage_metadata(Path(checkpoint), stage, part)
        default = _commands(stage)
    else:
        metadata = _source_metadata(part)
        source = metadata["provenance"]["source"]
        source |= {"notes": notes}
        if source["license"] is None:
            log(f"the licence of {source['name']} is not known: its card states none, or cannot be read")
        source |= base_comparison(part, source["base_model"], revision, log) if compare_with_base else {}
        source["base_model"] = _public_names(source["base_model"])
        default = [f"pivot extract {part.weights.name} encoder" + (f" --revision {revision}" if revision else "")]
        if Path(checkpoint).is_dir():
            default = None  # a folder of another machine reproduces nothing
    try:
        config = PivotVisionConfig(part.tower.config, metadata["pivot"])
        model = PivotVisionModel(config, part.tower)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    recipe = Path(checkpoint) / "recipe.yaml"
    return write_repository(
        output,
        model,
        metadata["provenance"] | {"commands": [command] if command else default},
        files={"recipe.yaml": recipe} if stage is not None and recipe.is_file() else {},
        projector=part.projector or None,
        preprocessor=preprocessor,
    )


def extract_once(checkpoint: str | Path, output: str | Path, command: str | None = None) -> bool:
    """Call `extract_encoder` unless `output` already holds this checkpoint's encoder.

    Returns:
        Whether the encoder was extracted by this call.
    """
    file = Path(output) / "provenance.json"
    if file.is_file() and json.loads(file.read_text()).get("mllm_weights_sha256") == weights_sha256(Path(checkpoint)):
        return False
    extract_encoder(checkpoint, output, command)
    return True


def _stage_provenance(checkpoint: Path) -> dict[str, Any] | None:
    """Read the provenance of a stage's checkpoint; None for an MLLM that is none.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = checkpoint / "provenance.json"
    if not file.is_file():
        return None
    try:
        provenance = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged; train the stage again, or copy it again.") from error
    is_stage = isinstance(provenance, dict) and {"stage", "model", "recipe", "recipe_sha256"} <= provenance.keys()
    return provenance if is_stage else None


def _stage_metadata(checkpoint: Path, provenance: dict[str, Any], part: VisionPart) -> dict[str, Any]:
    """Derive the `pivot` entry of an encoder's config from its stage's provenance, and the encoder's own provenance.

    The base of an encoder from a recipe that starts from an MLLM is that MLLM.
    """
    model = provenance["model"]
    if "mllm" in model:
        base, revision, language = model["mllm"], model.get("revision"), part.config.get_text_config().model_type
    else:
        base, revision, language = model["vision"], model.get("vision_revision"), model["language"]
    pivot = {
        "stage": provenance["stage"],
        "base_model": base,
        "base_revision": revision,
        "feature_layer": part.feature_layer,
        "language_head": language,
        "recipe_sha256": provenance["recipe_sha256"],
        "pivot_hub_version": __version__,
    }
    return {"pivot": pivot, "provenance": {"mllm": provenance, "mllm_weights_sha256": weights_sha256(checkpoint)}}


def _source_metadata(part: VisionPart) -> dict[str, Any]:
    """Describe an MLLM that this package did not train: its name, commit, hash, and what its card says.

    Of a folder only its own name is recorded, without its path.
    """
    weights, path = part.weights, Path(part.weights.name)
    name = path.resolve().name if path.is_dir() else weights.name
    tensors = {**part.tower.state_dict(), **part.projector}
    source = {
        "name": name,
        "revision": weights.commit,
        "model_type": part.config.model_type,
        "tower_sha256": tensors_sha256(tensors),
        **_read_card(weights),
    }
    pivot = {
        "stage": "extracted",
        "base_model": name,
        "base_revision": weights.commit,
        "feature_layer": part.feature_layer,
        "language_head": part.config.get_text_config().model_type,
        "pivot_hub_version": __version__,
    }
    return {"pivot": pivot, "provenance": {"source": source, "versions": versions()}}


def _differences(part: VisionPart, processor: str, own_processor: str) -> list[str]:
    """Say in sentences in what the encoder alone differs from the encoder in its MLLM, given the same image."""
    notes = []
    prefix = prefix_tokens(part.tower.config)
    is_square = backbone_of(part.tower.config).layout is None
    if part.family.tiles != "none" and is_square:
        notes.append(
            f"The MLLM cuts large images ({part.family.tiles}); the encoder alone takes the whole image as one square."
        )
    if processor != own_processor and not is_square:
        notes.append(f"Images are resized by {processor}, not as by {own_processor} of the MLLM.")
    strategy = getattr(part.config, "vision_feature_select_strategy", None)
    dropped = {"default": 1, "full": 0}.get(str(strategy), prefix)
    if is_square and dropped < prefix:
        notes.append(f"The MLLM's projector also takes {prefix - dropped} prefix tokens, which the encoder leaves out.")
    if is_square and dropped > prefix:
        notes.append("The MLLM leaves out the first patch of an image, which the encoder keeps.")
    return notes


def _read_card(weights: WeightFiles) -> dict[str, Any]:
    """Return licence and base model of a source as its card states them; None where it does not."""
    folder = Path(weights.name)
    try:
        if folder.is_dir():
            file: str | Path = folder / "README.md"
        else:
            file = str(cached_file(weights.name, "README.md", revision=weights.commit))
        card = ModelCard.load(file, ignore_metadata_errors=True).data.to_dict() if Path(file).is_file() else {}
    except (OSError, ValueError, HfHubHTTPError):
        card = {}
    link = card.get("license_link")
    if not isinstance(link, str) or not (link.startswith(("https://", "http://")) or re.fullmatch(r"[\w.-]+", link)):
        card["license_link"] = None  # a path of somebody's machine
    return {key: card.get(key) for key in ("license", "license_name", "license_link", "base_model")}


def _public_names(names: Any) -> Any:
    """Return the base models of a card without the paths of folders, which a tool may have written into it."""
    if isinstance(names, list):
        return [_public_names(name) for name in names]
    return public_name(names) if isinstance(names, str) else names


def _commands(provenance: dict[str, Any]) -> list[str] | None:
    """Commands that reproduce this encoder, or None if a recipe of its lineage is not shipped or was overridden."""
    name = provenance["recipe"]
    step: dict[str, Any] | None = provenance
    while step:
        try:
            shipped = load_recipe(step["recipe"]).recipe
        except RecipeError:
            return None
        if not shipped.has_sha256(step["recipe_sha256"]):
            return None
        step = (step["parent"] or {}).get("provenance")
    return [f"pivot train {name} --parents", f"pivot extract runs/{name} encoder"]
