"""Encoder repositories: write an encoder in its native format, read it back and verify it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.utils.hub import cached_file

from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.modeling_pivot import PICKLES
from pivot_hub.errors import CheckpointError
from pivot_hub.outputs import ENCODER, whole_folder
from pivot_hub.provenance import cached_commit, file_sha256, manifest_text, weights_sha256, write_manifest

REMOTE_CODE = ("configuration_pivot.py", "modeling_pivot.py")
# Relative; golden vectors are replayed on other machines, whose kernels sum in another order.
GOLDEN_TOLERANCE = 1e-3
HUBS_OWN = {".gitattributes"}  # the Hub adds it to every repository


def write_repository(
    output: str | Path,
    model: PivotVisionModel,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
    projector: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write an encoder as a repository that loads with plain `AutoModel`, `PivotVisionModel` and remote code.

    The folder appears as a whole, after two loading paths have read the weights back and given features that are
    equal bit for bit.

    Args:
        output: Folder that the repository is written to; an earlier repository is replaced.
        model: The encoder, with its image processor.
        metadata: Origin of the encoder, for provenance.json.
        files: Further files, by their name in the repository.
        projector: Weights of the projector that the encoder was trained with.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: The written weights do not read back equal, or the model has no image processor.
        OutputError: The output holds anything but an encoder repository, or another process is writing it.
    """
    target = Path(output)
    with whole_folder(target, ENCODER) as folder:
        fill_repository(folder, model)
        if projector is not None:
            save_file({k: v.contiguous() for k, v in projector.items()}, folder / "projector.safetensors")
        for name, path in (files or {}).items():
            shutil.copyfile(path, folder / name)
        _read_back(folder)
        write_manifest(folder, dict(metadata or {}))
    return target


def fill_repository(folder: Path, model: PivotVisionModel) -> None:
    """Write the files that every repository has, except its manifest: weights, configs, code and golden vectors.

    Args:
        folder: Folder to write to.
        model: The encoder, with its image processor.

    Raises:
        CheckpointError: The model has no image processor.
    """
    try:
        model.image_processor.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model.save_pretrained(folder)
    save_file(golden_vectors(model), folder / "golden.safetensors")


@torch.no_grad()
def golden_vectors(model: PivotVisionModel) -> dict[str, torch.Tensor]:
    """Encode two seeded random images, which `verify_repository` will encode again to compare the features.

    Returns:
        pixel_values (2, 3, image_px, image_px), last_hidden_state (2, H*W, D), pooler_output (2, D), on the CPU in
        float32.
    """
    size = model.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    outputs = model(pixels.to(model.device, model.dtype))
    vectors = {k: outputs[k].float().cpu().contiguous() for k in ("last_hidden_state", "pooler_output")}
    return {"pixel_values": pixels, **vectors}


def read_encoder(name: str | Path, **options: Any) -> tuple[PivotVisionModel, Any]:
    """Load the encoder of a native repository with its image processor.

    Args:
        name: Folder or Hub name.
        **options: Options of `PivotVisionModel.from_pretrained`; `dtype` is float32 by default.

    Raises:
        CheckpointError: There is no encoder, or it is not complete; the message names the remedy.
    """
    try:
        model = PivotVisionModel.from_pretrained(str(name), **{"dtype": torch.float32, **options})
        return model, model.image_processor
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix(f"{name}: ")
        hint = "" if Path(name).exists() else "; give a folder, or a Hub name where the Hub or its cache is in reach"
        raise CheckpointError(f"{name}: no encoder can be loaded: {reason.rstrip('.')}{hint}.") from error


def encoder_metadata(name: str | Path) -> dict[str, str]:
    """Identify the encoder that a result was measured on.

    Returns:
        encoder: the Hub name, or a folder's own name without its path; encoder_sha256: the hash of its weights, or the
        commit of a Hub repository.
    """
    path = Path(name)
    if path.is_dir():
        return {"encoder": path.resolve().name, "encoder_sha256": weights_sha256(path)}
    return {"encoder": str(name), "encoder_sha256": str(cached_commit(str(name)))}


def verify_repository(folder: str | Path) -> list[str]:
    """Check a repository that this package wrote: hashes, unexpected files, pickles, every key, golden vectors.

    Returns:
        One message for each problem; empty for an intact repository.
    """
    path, problems = Path(folder), []
    try:
        text = (path / "provenance.json").read_text()
        provenance = json.loads(text)
        expected, own_sha256 = provenance["files"], provenance["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{path}: provenance.json is missing or unreadable; pull the repository again."]
    computed = hashlib.sha256(manifest_text(provenance, False).encode()).hexdigest()
    if text != manifest_text(provenance) or own_sha256 != computed:
        return ["provenance.json differs from its own hash; pull the repository again."]
    present = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()} - {"provenance.json"} - HUBS_OWN
    for name in sorted(expected.keys() - present):
        problems.append(f"{name} is missing; pull the repository again.")
    for name in sorted(present - expected.keys()):
        kind = "a pickle, which may run code" if name.endswith(PICKLES) else "not expected"
        problems.append(f"{name} is {kind}; delete it.")
    for name in sorted(expected.keys() & present):
        if file_sha256(path / name) != expected[name]:
            problems.append(f"{name} differs from the hash it was published with; pull the repository again.")
    if problems:
        return problems
    try:
        distance = _replay(path)
    except CheckpointError as error:
        return [str(error)]
    if not distance < GOLDEN_TOLERANCE:
        problems.append(
            f"features differ from the golden vectors by {distance:.1e} relative; check torch and its kernels."
        )
    return problems


def check_golden(name: str | Path, model: PivotVisionModel) -> None:
    """Replay the golden vectors of the repository that a model was loaded from, if it has any.

    Args:
        name: Folder or Hub name of the repository.
        model: The encoder that was loaded from it.

    Raises:
        CheckpointError: The features differ from those that the repository was published with.
    """
    try:
        golden = cached_file(str(name), "golden.safetensors", _raise_exceptions_for_missing_entries=False)
    except OSError:  # an original encoder, which has no golden vectors, while the Hub is out of reach
        return
    if golden is None:
        return
    distance = _distance(model, Path(golden))
    if not distance < GOLDEN_TOLERANCE:
        raise CheckpointError(
            f"{name}: its features differ from the golden vectors by {distance:.1e} relative, so it is not what was "
            "published; pull the repository again, or check torch and its kernels."
        )


def _replay(folder: Path) -> float:
    """Relative distance of the repository's features from its golden vectors; refuse missing or unused keys."""
    model, _ = read_encoder(folder)
    _load_native(folder)
    return _distance(model, folder / "golden.safetensors")


@torch.no_grad()
def _distance(model: PivotVisionModel, golden_file: Path) -> float:
    """Relative distance of a model's features from golden vectors."""
    try:
        golden = load_file(golden_file)
        features = model(golden["pixel_values"].to(model.device, model.dtype)).last_hidden_state.float().cpu()
        return ((features - golden["last_hidden_state"]).norm() / golden["last_hidden_state"].norm()).item()
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"golden.safetensors cannot be replayed ({error}); pull the repository again.") from error


def _load_native(folder: Path) -> Any:
    """Load a repository with plain AutoModel, the first loading path, and refuse missing or unused keys."""
    native, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(
            f"{folder}: keys of model.safetensors and of the model differ, {info['missing_keys'] or 'none'} missing, "
            f"{info['unexpected_keys'] or 'none'} unused; write the repository again."
        )
    return native.eval()


@torch.no_grad()
def _read_back(folder: Path) -> None:
    """Load a written repository by the first two loading paths and compare the features bit for bit."""
    golden = load_file(folder / "golden.safetensors")
    pixels, features = golden["pixel_values"], golden["last_hidden_state"]
    encoder, _ = read_encoder(folder)
    layer = encoder.config.pivot["feature_layer"]
    hidden = _load_native(folder)(pixels, output_hidden_states=True).hidden_states[layer]
    native_features = encoder._patch_tokens(hidden)
    if not (torch.equal(native_features, features) and torch.equal(encoder(pixels).last_hidden_state, features)):
        raise CheckpointError(f"{folder}: the written weights give other features than the model they came from.")
