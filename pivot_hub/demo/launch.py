"""Find, load and serve the Gradio app, which is beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

import importlib.util
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pivot_hub.demo.model_bundle import STAGES, BundleNames
from pivot_hub.errors import CheckpointError, PivotError
from pivot_hub.files import shipped_folder

SPACES = shipped_folder("spaces")


def load_module(file: Path = SPACES / "gradcam" / "app.py") -> Any:
    """Load the app's module. Its `build_app` builds the app, and its `LAUNCH` holds the launch options.

    Args:
        file: File of the app: the shipped one, or one that `pivot push --space` wrote.

    Raises:
        PivotError: gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise PivotError("the Space needs gradio: pip install 'pivot-hub[space]'.")
    # Gradio looks for a newer version of itself when it is imported, so this comes first.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    spec = importlib.util.spec_from_file_location("pivot_space_gradcam", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of_runs(runs: Path) -> BundleNames:
    """Return the names of a quickstart's two branches and their parent, as the app takes them.

    Raises:
        CheckpointError: A stage is missing.
    """
    missing = [stage for stage in STAGES.values() if not (runs / stage / "config.json").is_file()]
    if missing:
        raise CheckpointError(f"{runs} has no finished {missing[0]}: run `pivot quickstart` first, or give --first.")
    return BundleNames(*(str(runs / STAGES[role]) for role in ("sft", "dpo", "parent")))


def serve(names: BundleNames, runs: Path | None, port: int, host: str = "127.0.0.1") -> None:
    """Serve the app until it is stopped.

    Args:
        names: Names of the bundle to start with; empty for the shipped bundle.
        runs: Folder of checkpoints that visitors may name; None for no such folder.
        port: Port that the app listens on.
        host: Address that the app listens on; reachable from this machine only by default.
    """
    module = load_module()
    app = module.build_app(names, runs)
    app.launch(server_name=host, server_port=port, quiet=True, **module.LAUNCH)
