"""Provenance of an artefact: commit, versions, recipe, parent and data, with hashes and without local paths."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from pivot_hub import __version__
from pivot_hub.files import write_whole
from pivot_hub.outputs import is_bystander

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "safetensors")


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of the packages that shape its results; None if one is missing."""
    installed: dict[str, str | None] = {"pivot_hub": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def machine() -> dict[str, Any]:
    """Describe the hardware, without a host or user name."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpus": torch.cuda.device_count() if cuda else 0,
    }


def peak_memory_mb() -> int:
    """Return the largest resident memory that this process has had, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the memory of the parent process
        kilobytes = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return kilobytes // 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / (1024 * 1024 if sys.platform == "darwin" else 1024))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(folder: Path) -> str:
    """Return one hash over all safetensors files of a folder, by name and content."""
    files = sorted(f for f in folder.glob("*.safetensors") if f.is_file())
    return hashlib.sha256("".join(f"{f.name}{file_sha256(f)}" for f in files).encode()).hexdigest()


def state_sha256(module: Any) -> str:
    """Return one hash over a torch module's weights and buffers, by name, type, shape and bytes."""
    return tensors_sha256(module.state_dict())


def tensors_sha256(tensors: Mapping[str, Any]) -> str:
    """Return one hash over tensors, by name, type, shape and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hub_commit(path: Path) -> str | None:
    """Return the Hub commit of a file or folder in the Hub's cache, and None for any other path."""
    folders = path.parts
    return folders[folders.index("snapshots") + 1] if "snapshots" in folders[:-1] else None


def cached_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a Hub repository in the Hub's cache, and None if it is not there."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return hub_commit(Path(config)) if isinstance(config, str) else None


def source_commit() -> str | None:
    """Return the commit of the checkout that this package runs from, or None for an installed wheel."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def write_manifest(folder: Path, metadata: dict[str, Any]) -> None:
    """Write provenance.json: the metadata, the hash of every other file in the folder, and its own hash.

    Files of git, the Hub's client and file managers are left out.
    """
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "provenance.json")
    files = [f for f in files if not is_bystander(f.relative_to(folder).as_posix())]
    provenance = {**metadata, "files": {str(f.relative_to(folder)): file_sha256(f) for f in files}}
    provenance["sha256"] = hashlib.sha256(manifest_text(provenance, with_hash=False).encode()).hexdigest()
    write_whole(folder / "provenance.json", manifest_text(provenance))


def manifest_text(provenance: dict[str, Any], with_hash: bool = True) -> str:
    """Return the text of provenance.json, with its own hash, or without it, as the hash is computed."""
    return json.dumps({k: v for k, v in provenance.items() if with_hash or k != "sha256"}, indent=2) + "\n"
