"""The page without a server in tests: its folder with ONNX Runtime Web, served on this machine, and small models.

ONNX Runtime Web and axe-core come from the npm registry, and are not part of the project.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pivot_hub.demo.launch import SPACES

PAGE = SPACES / "browser"
RUNTIME = urlparse(json.loads((PAGE / "settings.json").read_text())["runtime"]).path.split("/")[2]
RUNTIME_FILES = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
AXE = "axe-core@4.14.1"


class NoPackage(Exception):
    """A package cannot be had from npm; the message says why."""


def fetch_package(name: str, folder: Path) -> Path:
    """Download a package from npm, or take it from npm's cache.

    Args:
        name: Name and version, as `NAME@VERSION`.
        folder: Folder to download to.

    Returns:
        The folder of the package.

    Raises:
        NoPackage: npm is not installed, or cannot download the package.
    """
    if shutil.which("npm") is None:
        raise NoPackage("npm is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", name, "--silent", "--prefer-offline", "--fetch-retries=1", "--ignore-scripts"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired as error:
        raise NoPackage(f"npm did not download {name} within 180 s") from error
    if done.returncode != 0:
        raise NoPackage(f"npm cannot download {name}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def make_page(folder: Path, runtime: Path) -> Path:
    """Copy the page to a folder, with ONNX Runtime Web beside it."""
    shutil.copytree(PAGE, folder)
    (folder / "runtime").mkdir()
    for name in RUNTIME_FILES:
        shutil.copyfile(runtime / "dist" / name, folder / "runtime" / name)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"runtime": "runtime/"}))
    return folder


class _Handler(SimpleHTTPRequestHandler):
    """Serves files with further headers, and logs nothing."""

    def __init__(self, *arguments: Any, further: dict[str, str], **options: Any) -> None:
        self.further = further
        super().__init__(*arguments, **options)

    def end_headers(self) -> None:
        for name, value in self.further.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Serve a folder as any web server does, with further headers; yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder), further=headers or {}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def write_encoder(
    folder: Path,
    preprocessor: dict[str, Any],
    px: int = 48,
    patch: int = 8,
    width: int = 24,
    prefix: int = 1,
    names: tuple[str, str] = ("pixel_values", "last_hidden_state"),
    external: bool = False,
) -> Path:
    """Write a small random encoder in ONNX: a patch embedding with a nonlinearity, after CLS and registers.

    Args:
        folder: Folder that gets `onnx/model.onnx` and `preprocessor_config.json`.
        preprocessor: Content of preprocessor_config.json.
        px: Side of its input in pixels.
        patch: Side of a patch in pixels.
        width: Number of channels of a token.
        prefix: Number of tokens before the first patch.
        names: Names of its input and its output.
        external: Whether its weights lie in `onnx/model.onnx_data`.
    """
    rng = np.random.default_rng(width)
    grid = px // patch
    constants: dict[str, np.ndarray] = {
        "kernel": rng.normal(size=(width, 3, patch, patch)).astype(np.float32) / patch,
        "first": rng.normal(size=(1, prefix, width)).astype(np.float32),
        "shape": np.array([0, width, grid * grid], dtype=np.int64),
    }
    source, output = names
    nodes = [
        helper.make_node("Conv", [source, "kernel"], ["embedded"], strides=[patch, patch]),
        helper.make_node("Tanh", ["embedded"], ["bent"]),
        helper.make_node("Reshape", ["bent", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["first", "patches"], [output], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, [1, 3, px, px])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [1, prefix + grid * grid, width])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "onnx").mkdir(parents=True)
    options: dict[str, Any] = {"save_as_external_data": external}
    if external:
        options |= {"location": "model.onnx_data", "size_threshold": 64}
    onnx.save(model, str(folder / "onnx" / "model.onnx"), **options)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
