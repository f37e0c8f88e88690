"""Environments of their own for other software, made once and reused while their requirements stay the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("PIVOT_CONFORMANCE", ROOT / ".conformance"))
TORCH = torch.__version__.partition("+")[0]
# The release of torchvision that belongs to a release of torch: 2.13 and 0.28.
TORCHVISION = f"torchvision==0.{int(TORCH.split('.')[1]) + 15}.*"


def make_environment(name: str, *requirements: str) -> Path:
    """A virtual environment with this torch and what is asked for; its Python."""
    wanted = " ".join((f"torch=={TORCH}", "pillow", "numpy", *requirements))
    folder = FOLDER / name
    python = folder / "bin" / "python"
    if _is_made(folder, wanted):
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted.split()], check=True)
    (folder / "requirements").write_text(wanted)
    return python


def make_overlay(name: str, *requirements: str) -> Path:
    """Packages without their dependencies in a folder for PYTHONPATH."""
    wanted = " ".join(requirements)
    folder = FOLDER / name
    if not _is_made(folder, wanted):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *requirements], check=True)
        (folder / "requirements").write_text(wanted)
    return folder


def make_node(name: str, *requirements: str) -> Path | None:
    """A folder with npm packages, or None where there is no npm."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return None
    wanted = " ".join(requirements)
    folder = FOLDER / name
    if not _is_made(folder, wanted):
        folder.mkdir(parents=True)
        # Without scripts: onnxruntime-node would fetch CUDA libraries, its CPU library lies in the package.
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
        subprocess.run([*command, *requirements], check=True)
        (folder / "requirements").write_text(wanted)
    return folder


def _is_made(folder: Path, wanted: str) -> bool:
    """Whether it is there whole; what is there of other requirements, or half, is removed."""
    note = folder / "requirements"
    if note.is_file() and note.read_text() == wanted:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def run(program: Path, *arguments: str | Path, path: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of another environment, isolated from this one's packages; what it said is in the error."""
    kept = ("PATH", "HOME", "LANG", "HF_HOME", "OMP_NUM_THREADS")
    variables = {k: os.environ[k] for k in kept if k in os.environ}
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": path}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done
