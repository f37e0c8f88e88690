"""Encoder repositories: write an encoder in its native format, read it back and verify it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pivot_hub import __version__
from pivot_hub.config.encoder_names import resolve_encoder
from pivot_hub.data.image import image_files
from pivot_hub.encoder import PivotVisionModel
from pivot_hub.encoder.golden import (
    GOLDEN_TOLERANCE,
    check_golden,
    golden_distance,
    golden_file,
    golden_vectors,
    replay,
)
from pivot_hub.encoder.modeling_pivot import AUTO_MAP, PICKLES, native_class
from pivot_hub.errors import CheckpointError
from pivot_hub.files import write_json
from pivot_hub.outputs import ENCODER, is_bystander, whole_folder
from pivot_hub.provenance import cached_commit, file_sha256, hub_commit, manifest_text, weights_sha256, write_manifest

REMOTE_CODE = ("configuration_pivot.py", "modeling_pivot.py", "native_resolution.py")
# Errors of transformers at a model, a config, a processor or a tokenizer that it cannot load.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
    RecursionError,
    StrictDataclassError,
    SafetensorError,
)
# Hashes of the code files in every version of this package; those of the running version are known besides.
KNOWN_CODE: dict[str, list[str]] = json.loads(Path(__file__).with_name("known_code.json").read_text())
# The files that a repository may hold. None of them but the code runs anything when it is loaded.
KINDS = (
    *REMOTE_CODE,
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "golden.safetensors",
    "projector.safetensors",
    "recipe.yaml",
    "report.json",
    "metrics.jsonl",
    "results/*.json",
    ".eval_results/*.yaml",
    "export.json",
    "onnx/*.onnx",
    "onnx/*.onnx_data",
    "quanto/model.safetensors",
    "quanto/quantization_map.json",
    "*.md",
    "*.txt",
    "*.png",
    "LICENSE*",
    "NOTICE*",
)


def write_repository(
    output: str | Path,
    model: PivotVisionModel,
    metadata: Mapping[str, Any] | None = None,
    files: Mapping[str, Path] | None = None,
    projector: Mapping[str, torch.Tensor] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
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
        preprocessor: Content of preprocessor_config.json, if it is not what the model's image processor writes.

    Returns:
        The repository folder.

    Raises:
        CheckpointError: The written weights do not read back equal, or the model has no image processor.
        OutputError: The output holds anything but an encoder repository, or another process is writing it.
    """
    target = Path(output)
    with whole_folder(target, ENCODER) as folder:
        fill_repository(folder, model, preprocessor)
        if projector is not None:
            save_file({k: v.contiguous() for k, v in projector.items()}, folder / "projector.safetensors")
        for name, path in (files or {}).items():
            shutil.copyfile(path, folder / name)
        _read_back(folder)
        write_manifest(folder, dict(metadata or {}))
    return target


def fill_repository(folder: Path, model: PivotVisionModel, preprocessor: Mapping[str, Any] | None = None) -> None:
    """Write the files that every repository has, except its manifest: weights, configs, code and golden vectors.

    Args:
        folder: Folder to write to.
        model: The encoder, with its image processor. Afterwards its weights are float32, in which golden vectors are
            computed; they are written in the type that they have before.
        preprocessor: Content of preprocessor_config.json, if it is not what the model's image processor writes.

    Raises:
        CheckpointError: The model has no image processor.
    """
    try:
        if preprocessor is None:
            model.image_processor.save_pretrained(folder)
        model.save_pretrained(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if preprocessor is not None:
        write_json(folder / "preprocessor_config.json", preprocessor)
    save_file(golden_vectors(cast(torch.nn.Module, model).float()), folder / "golden.safetensors")  # type: ignore[arg-type]


def read_encoder(name: str | Path, check: bool = True, **options: Any) -> tuple[PivotVisionModel, Any]:
    """Load the encoder of a native repository with its image processor, and replay its golden vectors if it has any.

    Args:
        name: Folder, Hub name or short name.
        check: Whether to replay the golden vectors, so that altered weights are never used.
        **options: Options of `PivotVisionModel.from_pretrained`; `dtype` is float32 by default.

    Raises:
        CheckpointError: There is no encoder, it is not complete, or its features are not those that it was published
            with; the message names the remedy.
    """
    dtype = options.pop("dtype", torch.float32)
    name = resolve_encoder(name, revision=options.get("revision"))
    try:
        is_ours = check and golden_file(name, options.get("revision")) is not None
        loaded_dtype = torch.float32 if is_ours else dtype  # golden vectors are those of float32
        model = PivotVisionModel.from_pretrained(str(name), dtype=loaded_dtype, **options)
        processor = model.image_processor
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{name}: no encoder can be loaded: {loading_problem(name, error)}.") from error
    if is_ours:
        check_golden(name, model, options.get("revision"))
        cast(torch.nn.Module, model).to(dtype)
    return model, processor


def loading_problem(name: str | Path, error: Exception) -> str:
    """Describe in one line, without a full stop, why a model or a part of it cannot be loaded, with the remedy.

    Args:
        name: Folder or Hub name.
        error: Exception that transformers raised.
    """
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"access to it must be asked for; ask on https://huggingface.co/{name}, then log in with `hf auth login`, "
            "or set HF_TOKEN"
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "there is no such repository, or it is private; check the name, or log in with `hf auth login`"
    lines = (str(error).strip() or type(error).__name__).splitlines()
    reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    reason = reason.removeprefix(f"{name}: ").rstrip(".")
    hint = "" if Path(name).exists() else "; give a folder, or a Hub name where the Hub or its cache is in reach"
    return f"{reason}{hint}"


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
    """Check a repository that this package wrote: hashes, unexpected files, code, links, every key, golden vectors.

    Files of the Hub's client, of git and of file managers are passed over, see `bystanders`.

    Returns:
        One message for each problem; empty for an intact repository. A hash shows damage; it does not show who wrote
        the repository.
    """
    path, problems = Path(folder), []
    if (reason := _not_a_repository(path)) is not None:
        return [f"{path}: {reason}"]
    try:
        text = (path / "provenance.json").read_text()
        provenance = json.loads(text)
        expected, own_sha256 = provenance["files"], provenance["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return [f"{path}: provenance.json is unreadable; pull the repository again."]
    computed = hashlib.sha256(manifest_text(provenance, False).encode()).hexdigest()
    if text != manifest_text(provenance) or own_sha256 != computed:
        return ["provenance.json differs from its own hash; pull the repository again."]
    names = {f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_symlink() or not f.is_dir()}
    present = {name for name in names if not is_bystander(name)} - {"provenance.json"}
    outside = {name for name in present if _leads_out(path / name, path)}
    for name in sorted(outside):
        problems.append(f"{name} is a link out of the repository; delete it.")
    for name in sorted(expected.keys() - present):
        problems.append(f"{name} is missing; pull the repository again.")
    for name in sorted(present - outside):
        if name.endswith(PICKLES):
            problems.append(f"{name} is a pickle, which may run code; delete it.")
        elif name not in expected:
            problems.append(f"{name} is not expected; delete it.")
        elif file_sha256(path / name) != expected[name]:
            problems.append(f"{name} differs from the hash it was published with; pull the repository again.")
        elif not any(fnmatch(name, kind) for kind in KINDS):
            problems.append(f"{name} is not a kind of file that an encoder repository holds; delete it.")
        elif name in REMOTE_CODE and expected[name] not in _known_code(name):
            problems.append(
                f"{name} is not the code of any version of pivot_hub {__version__} and before; do not run it: load the "
                "repository with pivot_hub or without trust_remote_code, or update pivot_hub."
            )
    problems += [] if problems else _foreign_code(path)
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


def bystanders(folder: str | Path) -> list[str]:
    """List the files of a folder that `verify_repository` passes over."""
    path = Path(folder)
    names = (f.relative_to(path).as_posix() for f in path.rglob("*") if not f.is_dir())
    return sorted(name for name in names if is_bystander(name))


def _not_a_repository(path: Path) -> str | None:
    """Say what a folder is that this package did not write as an encoder repository; None for one that it wrote."""
    if not path.is_dir():
        return "there is no such folder; give the folder of an encoder repository, or its name on the Hub."
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        config = {}
    config = config if isinstance(config, dict) else {}
    model_type = config.get("model_type")
    if "image_token_index" in config or "image_token_id" in config:
        return (
            f"is an MLLM ({model_type}), not an encoder; take its encoder out with `pivot extract {path} OUTPUT`, and "
            "verify that."
        )
    if (path / "provenance.json").exists():
        return None
    if "pivot" in config:
        return (
            "was written by save_pretrained, which writes no checksums, or its provenance.json is missing; write it by "
            "`pivot extract` or write_repository, or pull it again."
        )
    if model_type is not None:
        return (
            f"is a {model_type} model that pivot_hub did not write, so there are no checksums to compare it with; "
            "PivotVisionModel.from_pretrained checks that it is complete."
        )
    if images := image_files(path):
        return f"holds {len(images)} images and no model; give the folder of an encoder repository."
    return "is not a model repository: it has no config.json; give the folder of an encoder repository."


def _leads_out(file: Path, folder: Path) -> bool:
    """Return whether a file is a link to a place outside of its repository; the Hub's cache links to its own blobs."""
    if not file.is_symlink():
        return False
    root = folder.resolve()
    places = [root, root.parents[1] / "blobs"] if hub_commit(root) else [root]
    try:
        return not any(file.resolve().is_relative_to(place) for place in places) or file.is_dir()
    except (OSError, RuntimeError):  # a link that leads to itself
        return True


def _known_code(name: str) -> set[str]:
    """Hashes of a code file in all versions of this package."""
    return {*KNOWN_CODE[name], file_sha256(Path(__file__).with_name(name))}


def _foreign_code(path: Path) -> list[str]:
    """Name the configs that point at code other than the repository's own."""
    problems = []
    for name in ("config.json", "preprocessor_config.json"):
        config = json.loads((path / name).read_text()) if (path / name).is_file() else {}
        if config.get("auto_map", AUTO_MAP) != AUTO_MAP:
            problems.append(f"{name} points at code that is not the repository's own (auto_map); pull it again.")
    return problems


def _replay(folder: Path) -> float:
    """Relative distance of the repository's features from its golden vectors; refuse missing or unused keys."""
    model = _load_encoder(folder)
    _load_native(folder, model.config.backbone_config)
    return golden_distance(model, folder / "golden.safetensors")


def _load_encoder(folder: Path) -> PivotVisionModel:
    """Load the encoder of a folder, without its image processor, which may need software that is not installed."""
    try:
        model: PivotVisionModel = PivotVisionModel.from_pretrained(str(folder), dtype=torch.float32)
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder}: no encoder can be loaded: {loading_problem(folder, error)}.") from error
    return model


def _load_native(folder: Path, config: Any) -> Any:
    """Load a repository with its native class, the first loading path, and refuse missing or unused keys."""
    native, info = native_class(config).from_pretrained(
        folder, config=config, output_loading_info=True, dtype=torch.float32
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise CheckpointError(
            f"{folder}: keys of model.safetensors and of the model differ, {info['missing_keys'] or 'none'} missing, "
            f"{info['unexpected_keys'] or 'none'} unused; write the repository again."
        )
    return native.eval()


def _read_back(folder: Path) -> None:
    """Load a written repository by the first two loading paths and compare the features bit for bit."""
    golden = folder / "golden.safetensors"
    expected = load_file(golden)["last_hidden_state"]
    encoder = _load_encoder(folder)
    layer = encoder.config.pivot["feature_layer"]
    is_equal = torch.equal(replay(encoder, golden, layer), expected)
    encoder.backbone = None  # a large tower is not in memory twice
    encoder.backbone = _load_native(folder, encoder.config.backbone_config)
    if not (is_equal and torch.equal(replay(encoder, golden, layer), expected)):
        raise CheckpointError(f"{folder}: the written weights give other features than the model they came from.")
