"""Publish encoders to a Hub server on this machine and load them back by name, as with the real Hub.

The server is not part of the package: it is loaded from `tests/local_server` of the source checkout.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from pivot_hub.errors import PublishError
from pivot_hub.files import PACKAGE, write_json

OWNER = "pivot"
SERVER = PACKAGE.parent / "tests" / "local_server"
SERVER_NAME = "pivot_local_server"
# Plain transformers: nothing of this package is imported, and no remote code runs.
LOAD = """
import json, pathlib, sys
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModel
loaded = {}
for name in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(name, output_loading_info=True, trust_remote_code=False)
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"{name}: keys differ: {info}")
    cached = pathlib.Path(try_to_load_from_cache(name, "config.json"))
    loaded[name] = {"class": type(model).__name__, "commit": cached.parent.name}
print(json.dumps(loaded))
"""


def load_local_server() -> ModuleType:
    """Import `tests/local_server` of the source checkout.

    Returns:
        Its module `serve`.

    Raises:
        PublishError: There is no source checkout, or a package that the server needs is not installed.
    """
    if not (SERVER / "__init__.py").is_file():
        raise PublishError(
            "the local Hub server is part of the source checkout: clone the repository, or publish to the Hub with "
            "`pivot push`."
        )
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise PublishError(f"the local Hub server needs {missing[0]}: pip install 'pivot-hub[local-hub]'.")
    if SERVER_NAME not in sys.modules:
        spec = spec_from_file_location(SERVER_NAME, SERVER / "__init__.py", submodule_search_locations=[str(SERVER)])
        assert spec is not None
        assert spec.loader is not None
        package = module_from_spec(spec)
        sys.modules[SERVER_NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{SERVER_NAME}.serve")


def push_local(
    encoders: Mapping[str, Path], folder: Path, collection: str, log: Callable[[str], None] = print
) -> dict[str, dict[str, str]]:
    """Push encoders to a local Hub server, each by `pivot push`, then load all of them by name with an empty cache.

    Pushing and loading run in processes of their own, with unmodified huggingface_hub and transformers.

    Args:
        encoders: Folders of the encoders by name, such as `shapes-dpo`; they are published as `pivot/<name>`.
        folder: Folder in which the server keeps its repositories; a second push starts from what is there.
        collection: Title of the collection that the encoders are added to.
        log: Callback that receives progress messages.

    Returns:
        Class and commit of each encoder by its name, which are also written to `loaded.json` in the folder.

    Raises:
        PublishError: The server is not available, or a push or a load failed.
    """
    server = load_local_server()
    with server.serve_folder(folder, OWNER) as (address, token), TemporaryDirectory() as home:
        variables = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_TOKEN": token,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for name, encoder in encoders.items():
            command = ["-m", "pivot_hub", "push", str(encoder), f"{OWNER}/{name}", "--yes", "--collection", collection]
            log(_run_python(command, variables).strip().splitlines()[-1])
        names = [f"{OWNER}/{name}" for name in encoders]
        with TemporaryDirectory() as empty:
            output = _run_python(["-c", LOAD, *names], variables | {"HF_HOME": empty})
    loaded: dict[str, dict[str, str]] = json.loads(output)
    for name, metadata in loaded.items():
        log(f"loaded by name: {name} at {metadata['commit'][:8]}, {metadata['class']}")
    write_json(folder / "loaded.json", loaded)
    return loaded


def _run_python(arguments: list[str], variables: dict[str, str]) -> str:
    """Run Python without the working directory on its path, and return what it prints."""
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
        raise PublishError(f"the local hub: {lines[-1].removeprefix('pivot: ')}")
    return done.stdout
