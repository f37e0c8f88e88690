"""The library that lets a CPU build of torch run autograd on fake CUDA tensors: compiled on demand and cached."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from pivot_hub.errors import RehearsalError

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
COMPILERS = ("c++", "g++", "clang++")
OPTIONS = ("-std=c++20", "-O0", "-shared", "-fPIC")


def compiled_library(cache: Path | None = None) -> Path:
    """Return the compiled library; the first call on a machine compiles it, in a few seconds.

    Args:
        cache: Folder of compiled libraries; a folder below HF_HOME by default.

    Raises:
        RehearsalError: This machine or this torch cannot rehearse CUDA; the message says why.
    """
    import torch
    from huggingface_hub.constants import HF_HOME

    if torch.version.cuda is not None:
        raise RehearsalError(
            f"a rehearsal needs a CPU build of torch, and this one is built for CUDA {torch.version.cuda}: run "
            "the real step with `pivot bench train-step`."
        )
    compiler = shutil.which(os.environ.get("CXX", "")) or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise RehearsalError(
            f"a rehearsal needs a C++ compiler, and none of {', '.join(COMPILERS)} is installed: install one, or name "
            "yours in the environment variable CXX."
        )
    content = f"{SOURCE.read_text()} {OPTIONS} {torch.__version__} {sys.platform}"
    folder = cache or Path(HF_HOME) / "pivot_hub" / "rehearsal"
    library = folder / f"fake_cuda-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, _torch_folder(), library)
    return library


def _compile(compiler: str, torch_folder: Path, library: Path) -> None:
    """Compile the library beside its place, then rename it."""
    beside = library.with_name(f".{library.name}.{os.getpid()}")
    command = [compiler, *OPTIONS, f"-I{torch_folder / 'include'}", str(SOURCE), "-o", str(beside)]
    command += [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    try:
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode != 0:
            first = next((line for line in compiled.stderr.splitlines() if "error" in line), "no message")
            raise RehearsalError(
                f"{compiler} cannot compile {SOURCE.name} against this torch ({first.strip()}); a rehearsal needs a "
                "compiler of C++20."
            )
        beside.replace(library)
    finally:
        beside.unlink(missing_ok=True)


def load(library: str | Path) -> None:
    """Load the compiled library into this process, which must not have imported torch yet: torch reads hooks once."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; load the library in a process of its own")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def _torch_folder() -> Path:
    spec = find_spec("torch")  # which does not import it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent
