"""Encoder repositories: write an encoder in its native format, read it back, verify it."""

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
from pivot_hub.files import whole_folder
from pivot_hub.provenance import cached_commit, file_sha256, manifest_text, weights_sha256, write_manifest

REMOTE_CODE = ("configuration_pivot.py", "modeling_pivot.py")
# A golden vector is replayed on other machines, whose kernels sum in another order.
GOLDEN_TOLERANCE = 1e-3
HUBS_OWN = {".gitattributes"}  # the Hub puts it into every repository


def write_repository(
    output: str | Path,
    model: PivotVisionModel,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
    projector: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write an encoder as a repository that loads with plain `AutoModel`, `PivotVisionModel` and remote code.

    The folder appears whole, after its weights were read back by two doors and gave the same features bit for bit.

    Args:
        output: folder of the repository; one that is there is replaced.
        model: the encoder, with its image processor.
        facts: where it came from, for provenance.json.
        files: further files, by their name in the repository.
        projector: weights of the projector it was trained with.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: the written weights do not read back equal, or the model has no image processor.
    """
    target = Path(output)
    with whole_folder(target) as folder:
        fill_repository(folder, model)
        if projector is not None:
            save_file({k: v.contiguous() for k, v in projector.items()}, folder / "projector.safetensors")
        for name, path in (files or {}).items():
            shutil.copyfile(path, folder / name)
        _read_back(folder)
        write_manifest(folder, dict(metadata or {}))
    return target


def fill_repository(folder: Path, model: PivotVisionModel) -> None:
    """Put into a folder what every repository holds, not yet sealed: weights, configs, code, golden vectors.

    Raises:
        CheckpointError: the model has no image processor.
    """
    try:
        model.image_processor.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    model.save_pretrained(folder)
    save_file(golden_vectors(model), folder / "golden.safetensors")


@torch.no_grad()
def golden_vectors(model: PivotVisionModel) -> dict[str, torch.Tensor]:
    """Two seeded random images and their features: what `verify_repository` replays.

    Returns:
        pixel_values (2, 3, image_px, image_px), last_hidden_state (2, H*W, D), pooler_output (2, D), on the CPU in
        float32.
    """
    size = model.config.image_size
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = model(pixels.to(model.device, model.dtype))
    vectors = {k: made[k].float().cpu().contiguous() for k in ("last_hidden_state", "pooler_output")}
    return {"pixel_values": pixels, **vectors}


def read_encoder(name: str | Path, **options: Any) -> tuple[PivotVisionModel, Any]:
    """Load an encoder of any native repository with its image processor.

    Args:
        name: folder or Hub name.
        **options: as for `PivotVisionModel.from_pretrained`; float32 unless `dtype` is given.

    Raises:
        CheckpointError: there is none, or it is not whole; the message names the remedy.
    """
    try:
        model = PivotVisionModel.from_pretrained(str(name), **{"dtype": torch.float32, **options})
        return model, model.image_processor
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix(f"{name}: ")
        hint = "" if Path(name).exists() else "; give a folder, or a Hub name where the Hub or its cache is in reach"
        raise CheckpointError(f"{name}: no encoder can be loaded: {reason.rstrip('.')}{hint}.") from error


def encoder_metadata(name: str | Path) -> dict[str, str]:
    """What a result says of the encoder it was measured on.

    Returns:
        encoder: the Hub name, or a folder's own name without its path; encoder_sha256: the hash of its weights, or the
        commit of a Hub repository.
    """
    path = Path(name)
    if path.is_dir():
        return {"encoder": path.resolve().name, "encoder_sha256": weights_sha256(path)}
    return {"encoder": str(name), "encoder_sha256": str(cached_commit(str(name)))}


def verify_repository(folder: str | Path) -> list[str]:
    """Check a repository of ours: hashes, unexpected files, pickles, every key, golden vectors.

    Returns:
        What is wrong, a sentence each; empty for a sound repository.
    """
    path, problems = Path(folder), []
    try:
        text = (path / "provenance.json").read_text()
        provenance = json.loads(text)
        expected, own = provenance["files"], provenance["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{path}: provenance.json is missing or unreadable; pull the repository again."]
    if (
        text != manifest_text(provenance)
        or own != hashlib.sha256(manifest_text(provenance, False).encode()).hexdigest()
    ):
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
        off = _replay(path)
    except CheckpointError as error:
        return [str(error)]
    if not off < GOLDEN_TOLERANCE:
        problems.append(f"features differ from the golden vectors by {off:.1e} relative; check torch and its kernels.")
    return problems


def check_golden(name: str | Path, model: PivotVisionModel) -> None:
    """Replay the golden vectors of the repository a model was loaded from, if it has any.

    Raises:
        CheckpointError: the model gives other features than the repository was published with.
    """
    try:
        golden = cached_file(str(name), "golden.safetensors", _raise_exceptions_for_missing_entries=False)
    except OSError:  # an original from the Hub, out of reach now: it has none
        return
    if golden is not None and not (off := _distance(model, Path(golden))) < GOLDEN_TOLERANCE:
        raise CheckpointError(
            f"{name}: its features differ from the golden vectors by {off:.1e} relative, so it is not what was "
            "published; pull the repository again, or check torch and its kernels."
        )


def _replay(folder: Path) -> float:
    """Relative distance of the golden vectors to what the repository gives now, every key used."""
    model, _ = read_encoder(folder)
    _load_native(folder)
    return _distance(model, folder / "golden.safetensors")


@torch.no_grad()
def _distance(model: PivotVisionModel, golden_file: Path) -> float:
    try:
        golden = load_file(golden_file)
        made = model(golden["pixel_values"].to(model.device, model.dtype)).last_hidden_state.float().cpu()
        return ((made - golden["last_hidden_state"]).norm() / golden["last_hidden_state"].norm()).item()
    except (OSError, KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"golden.safetensors cannot be replayed ({error}); pull the repository again.") from error


def _load_native(folder: Path) -> Any:
    """Open the first door, plain AutoModel, and refuse a key that is missing or unused."""
    native, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(
            f"{folder}: keys of model.safetensors and of the model differ, {info['missing_keys'] or 'none'} missing, "
            f"{info['unexpected_keys'] or 'none'} unused; write the repository again."
        )
    return native.eval()


@torch.no_grad()
def _read_back(folder: Path) -> None:
    """Load what was written by the first two doors and compare features bit for bit."""
    golden = load_file(folder / "golden.safetensors")
    pixels, features = golden["pixel_values"], golden["last_hidden_state"]
    ours, _ = read_encoder(folder)
    pivot = ours.config.pivot
    hidden = _load_native(folder)(pixels, output_hidden_states=True).hidden_states[pivot["feature_layer"]]
    seen = ours._patch_tokens(hidden)
    if not (torch.equal(seen, features) and torch.equal(ours(pixels).last_hidden_state, features)):
        raise CheckpointError(f"{folder}: the written weights give other features than the model they came from.")
