"""Extract the encoder of an MLLM checkpoint and write it as an encoder repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pivot_hub import __version__
from pivot_hub.config.recipe import load_recipe
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.repository import write_repository
from pivot_hub.errors import CheckpointError, RecipeError
from pivot_hub.mllm.load import load_mllm
from pivot_hub.outputs import ENCODER, check_replaceable
from pivot_hub.provenance import weights_sha256


def extract_encoder(checkpoint: str | Path, output: str | Path, command: str | None = None) -> Path:
    """Extract the encoder of a stage checkpoint and write it as a repository.

    Its features equal those inside the MLLM bit for bit. This is checked before the folder appears.

    Args:
        checkpoint: Folder of a finished align, instruct, sft or dpo stage.
        output: Folder that the repository is written to; an earlier repository is replaced.
        command: Command that reproduces this encoder, for provenance.json. By default it is derived from the
            recipes, provided that all of them are shipped ones.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: The checkpoint is not a stage's MLLM, or the written weights do not read back equal.
        OutputError: The output holds anything but an encoder repository, or another process is writing it.
    """
    source = Path(checkpoint)
    check_replaceable(Path(output), ENCODER)  # before the work, and again after it
    mllm, processor = load_mllm(source)
    metadata = _stage_metadata(source)
    model = PivotVisionModel.from_mllm(mllm, metadata["pivot"], processor.image_processor)
    commands = [command] if command else _commands(metadata["provenance"]["mllm"])
    recipe = {"recipe.yaml": source / "recipe.yaml"} if (source / "recipe.yaml").is_file() else {}
    projector = mllm.model.multi_modal_projector.state_dict()
    return write_repository(
        output, model, metadata["provenance"] | {"commands": commands}, files=recipe, projector=projector
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


def _stage_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's provenance, and derive the `pivot` entry of its encoder's config from it."""
    file = checkpoint / "provenance.json"
    if not file.is_file():
        raise CheckpointError(
            f"{checkpoint} has no provenance.json; give the output folder of a finished stage. The encoder of "
            "another LLaVA model is saved by PivotVisionModel.from_mllm(mllm).save_pretrained(FOLDER)."
        )
    try:
        provenance = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged; train the stage again, or copy it again.") from error
    model = provenance["model"]
    pivot = {
        "stage": provenance["stage"],
        "base_model": model["vision"],
        "base_revision": model.get("vision_revision"),
        "feature_layer": model["feature_layer"],
        "language_head": model["language"],
        "recipe_sha256": provenance["recipe_sha256"],
        "pivot_hub_version": __version__,
    }
    return {"pivot": pivot, "provenance": {"mllm": provenance, "mllm_weights_sha256": weights_sha256(checkpoint)}}


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
