"""Environments for other software. Each is created once and reused while its requirements stay the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("PIVOT_CONFORMANCE", ROOT / ".conformance"))
TORCH = torch.__version__.partition("+")[0]
# The release of torchvision that belongs to a release of torch: 0.28 to 2.13.
TORCHVISION = f"torchvision==0.{int(TORCH.split('.')[1]) + 15}.*"


def make_environment(name: str, *requirements: str, without: str | None = None) -> Path:
    """Create a virtual environment with further requirements that uses the torch of this one.

    A copy of torch in each environment would take a gigabyte of disk.

    Args:
        name: Name of the environment.
        requirements: Further requirements.
        without: Package to uninstall again, which a requirement names and which does not load here.

    Returns:
        The Python of the environment.
    """
    wanted = " ".join((f"torch=={TORCH}", "pillow", "numpy", *requirements))
    folder = FOLDER / name
    python = folder / "bin" / "python"
    with _lock(name):
        if _is_complete(folder, wanted):
            return python
        _create(folder, python, wanted, without)
    return python


def _create(folder: Path, python: Path, wanted: str, without: str | None) -> None:
    _call(sys.executable, "-m", "venv", folder)
    packages = Path(torch.__file__).parents[1]
    (target,) = (folder / "lib").glob("python*/site-packages")
    for part in {file.parts[0] for file in files("torch") or [] if file.parts[0] != ".."}:
        (target / part).symlink_to(packages / part)
    _call(python, "-m", "pip", "install", "--quiet", *wanted.split())
    if without is not None:
        _call(python, "-m", "pip", "uninstall", "--quiet", "--yes", without)
    (folder / "requirements").write_text(wanted)


def make_overlay(name: str, *requirements: str) -> Path:
    """Install packages without their dependencies in a folder for PYTHONPATH, and return the folder."""
    wanted = " ".join(requirements)
    folder = FOLDER / name
    with _lock(name):
        if not _is_complete(folder, wanted):
            _call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *requirements)
            (folder / "requirements").write_text(wanted)
    return folder


def make_node(name: str, *requirements: str) -> Path | None:
    """Install npm packages in a folder and return the folder, or None if npm or Node is not installed."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        return None
    wanted = " ".join(requirements)
    folder = FOLDER / name
    if not _is_complete(folder, wanted):
        folder.mkdir(parents=True)
        # onnxruntime-node's install script would download CUDA libraries; the package itself contains the CPU library.
        options = ("--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder)
        _call(npm, "install", *options, *requirements)
        (folder / "requirements").write_text(wanted)
    return folder


def _lock(name: str) -> FileLock:
    """Return the lock of an environment, which the processes of a run share."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    return FileLock(FOLDER / f"{name}.lock")


def _call(*command: str | Path) -> None:
    """Run a command of the set-up; the error of one that fails ends with its output and with the free disk space."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        free = shutil.disk_usage(ROOT).free / 1e9
        raise RuntimeError(f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}\n{free:.1f} GB of disk are free")


def _is_complete(folder: Path, wanted: str) -> bool:
    """Tell whether a folder was completed with these requirements, and remove it if not."""
    note = folder / "requirements"
    if note.is_file() and note.read_text() == wanted:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def run(program: Path, *arguments: str | Path, path: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a program of another environment, isolated from this one's packages.

    Args:
        program: The program, such as another environment's Python.
        arguments: Arguments of the program.
        path: Value of PYTHONPATH.
        check: Whether an exit status other than 0 is an error.

    Raises:
        RuntimeError: The program failed; the message ends with its output.
    """
    kept = ("PATH", "HOME", "LANG", "HF_HOME", "OMP_NUM_THREADS")
    variables = {k: os.environ[k] for k in kept if k in os.environ}
    variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": path}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{command}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done
