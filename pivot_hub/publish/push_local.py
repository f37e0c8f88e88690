"""Publish encoders to a hub on this machine and load them back by name, as it would go on the real one."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pivot_hub.errors import PublishError
from pivot_hub.files import write_json
from tests.local_server.serve import need_server, serve

OWNER = "pivot"
# Plain transformers: nothing of ours is imported, no remote code runs.
LOAD = """
import json, pathlib, sys
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModel
made = {}
for name in sys.argv[1:]:
    model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        sys.exit(f"{name}: keys differ: {info}")
    cached = pathlib.Path(try_to_load_from_cache(name, "config.json"))
    made[name] = {"class": type(model).__name__, "commit": cached.parent.name}
print(json.dumps(made))
"""


def push_local(
    encoders: Mapping[str, Path], folder: Path, collection: str, log: Callable[[str], None] = print
) -> dict[str, dict[str, str]]:
    """Push encoders to a local hub, each by `pivot push`, then load all of them by name from an empty cache.

    Both go in processes of their own, with huggingface_hub and transformers as they are.

    Args:
        encoders: folders by name, as in `shapes-dpo`; they become `pivot/<name>`.
        folder: of the hub, which keeps its repositories; pushing again goes on from there.
        collection: that they are put into.
        say: gets progress.

    Returns:
        Class and commit of each by name, also written to `loaded.json` in the folder.

    Raises:
        PivotError: starlette or uvicorn is missing.
        PublishError: a push or a load failed.
    """
    need_server()
    from tests.local_server.protocol import Account, Hub, build_app
    from tests.local_server.store import Store

    folder.mkdir(parents=True, exist_ok=True)
    token = f"hf_{secrets.token_hex(17)}"  # of this hub, for as long as it is served
    hub = Hub(Store(folder), {token: Account("quickstart", (OWNER,))})
    with serve(build_app(hub)) as address, TemporaryDirectory() as home:
        variables = {
            **os.environ,
            "HF_ENDPOINT": address,
            "HF_TOKEN": token,
            "HF_HOME": home,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for name, place in encoders.items():
            command = ["-m", "pivot_hub", "push", str(place), f"{OWNER}/{name}", "--yes", "--collection", collection]
            log(_run(command, variables).strip().splitlines()[-1])
        names = [f"{OWNER}/{name}" for name in encoders]
        with TemporaryDirectory() as empty:
            loaded: dict[str, dict[str, str]] = json.loads(_run(["-c", LOAD, *names], variables | {"HF_HOME": empty}))
    for name, metadata in loaded.items():
        log(f"loaded by name: {name} at {metadata['commit'][:8]}, {metadata['class']}")
    write_json(folder / "loaded.json", loaded)
    return loaded


def _run(arguments: list[str], variables: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
        raise PublishError(f"the local hub: {said[-1].removeprefix('pivot: ')}")
    return done.stdout
