"""Encoder repositories: detach an encoder from an MLLM, write it in its native format, read it back, verify it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from pivot_hub import __version__
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.configuration_pivot import BACKBONES
from pivot_hub.errors import CheckpointError
from pivot_hub.files import whole_folder, write_json
from pivot_hub.mllm import load_mllm
from pivot_hub.provenance import file_sha256, seal, weights_sha256

REMOTE_CODE = ("configuration_pivot.py", "modeling_pivot.py")
AUTO_MAP = {
    "AutoConfig": "configuration_pivot.PivotVisionConfig",
    "AutoModel": "modeling_pivot.PivotVisionModel",
}
# A golden vector is replayed on other machines, whose kernels sum in another order.
GOLDEN_TOLERANCE = 1e-3


def extract_encoder(checkpoint: str | Path, output: str | Path) -> Path:
    """Detach the encoder of a stage checkpoint and write it as a repository.

    The result loads with plain `AutoModel`, with `PivotVisionModel`, and with `trust_remote_code=True`;
    its features equal those inside the MLLM bit for bit, which is checked before the folder appears.

    Args:
        checkpoint: folder of a finished align, instruct, sft or dpo stage.
        output: folder of the repository; one that is there is replaced.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: the checkpoint is no MLLM of ours, or the written weights do not read back equal.
    """
    source, target = Path(checkpoint), Path(output)
    mllm, processor = load_mllm(source)
    facts = _stage_facts(source)
    model = PivotVisionModel.from_mllm(mllm, facts["pivot"])
    with whole_folder(target) as folder:
        write_repository(folder, model, processor.image_processor)
        projector = mllm.model.multi_modal_projector.state_dict()
        save_file({k: v.contiguous() for k, v in projector.items()}, folder / "projector.safetensors")
        if (source / "recipe.yaml").is_file():
            shutil.copy2(source / "recipe.yaml", folder / "recipe.yaml")
        seal(folder, facts["provenance"])
        _read_back(folder, model)
    return target


def write_repository(folder: Path, model: PivotVisionModel, image_processor: Any) -> None:
    """Write weights under canonical keys, configs, processor, remote code and golden vectors; not yet sealed."""
    backbone = cast(PreTrainedModel, model.backbone)
    backbone.save_pretrained(folder)
    prefix = BACKBONES[backbone.config.model_type].key_prefix
    weights = {prefix + k.removeprefix(prefix): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": AUTO_MAP, "pivot": model.config.pivot}
    write_json(folder / "config.json", config)
    image_processor.save_pretrained(folder)
    for name in REMOTE_CODE:
        shutil.copy2(Path(__file__).parent / name, folder / name)
    save_file(golden_vectors(model), folder / "golden.safetensors")


def golden_vectors(model: PivotVisionModel) -> dict[str, torch.Tensor]:
    """Two seeded random images and their features: what `verify_repository` replays.

    Returns:
        pixel_values (2, 3, image_px, image_px), last_hidden_state (2, H*W, D), pooler_output (2, D).
    """
    size = model.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    with torch.no_grad():
        made = model(pixels)
    return {
        "pixel_values": pixels,
        "last_hidden_state": made.last_hidden_state.contiguous(),
        "pooler_output": made.pooler_output.contiguous(),
    }


def read_encoder(name: str | Path) -> tuple[PivotVisionModel, Any]:
    """Load an encoder of any native repository with its image processor.

    Raises:
        CheckpointError: there is none, or some of its weights are missing.
    """
    try:
        model = PivotVisionModel.from_pretrained(str(name), dtype=torch.float32)
        return model, AutoImageProcessor.from_pretrained(str(name), backend="pil")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{name}: no encoder can be loaded: {reason}") from error


def verify_repository(folder: str | Path) -> list[str]:
    """Check a repository of ours: hashes, unexpected files, pickles, every key, golden vectors.

    Returns:
        What is wrong, a sentence each; empty for a sound repository.
    """
    path, problems = Path(folder), []
    try:
        provenance = json.loads((path / "provenance.json").read_text())
        expected = provenance["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{path}: provenance.json is missing or unreadable; pull the repository again."]
    present = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - {"provenance.json"}
    for name in sorted(expected.keys() - present):
        problems.append(f"{name} is missing; pull the repository again.")
    for name in sorted(present - expected.keys()):
        kind = "a pickle, which may run code" if name.endswith((".bin", ".pt", ".pkl", ".pth")) else "not expected"
        problems.append(f"{name} is {kind}; delete it.")
    for name in sorted(expected.keys() & present):
        if file_sha256(path / name) != expected[name]:
            problems.append(f"{name} differs from the hash it was published with; pull the repository again.")
    if problems:
        return problems
    try:
        model, _ = read_encoder(path)
    except CheckpointError as error:
        return [str(error)]
    golden = load_file(path / "golden.safetensors")
    with torch.no_grad():
        made = model(golden["pixel_values"]).last_hidden_state
    off = ((made - golden["last_hidden_state"]).norm() / golden["last_hidden_state"].norm()).item()
    if not off < GOLDEN_TOLERANCE:
        problems.append(f"features differ from the golden vectors by {off:.1e} relative; check torch and its kernels.")
    return problems


def _stage_facts(checkpoint: Path) -> dict[str, Any]:
    """What is known of a checkpoint's making: its provenance, and the `pivot` entry of the config."""
    file = checkpoint / "provenance.json"
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} has no provenance.json; give the output folder of a finished stage.")
    provenance = json.loads(file.read_text())
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


def _read_back(folder: Path, model: PivotVisionModel) -> None:
    """Load what was written through the first two doors and compare features bit for bit."""
    golden = load_file(folder / "golden.safetensors")
    pixels = golden["pixel_values"]
    native, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(f"{folder}: written keys do not read back: {info}.")
    with torch.no_grad():
        hidden = native.eval()(pixels, output_hidden_states=True).hidden_states
        ours = read_encoder(folder)[0](pixels).last_hidden_state
    seen = hidden[model.config.pivot["feature_layer"]][:, model.config.pivot["prefix_tokens"] :]
    if not (torch.equal(seen, golden["last_hidden_state"]) and torch.equal(ours, golden["last_hidden_state"])):
        raise CheckpointError(f"{folder}: the written weights give other features than the model they came from.")
