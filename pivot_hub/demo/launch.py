"""Find, load and serve the Gradio app, which lies beside the package in a checkout and inside it in a wheel."""

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
    """The app's module, whose `build_app` makes the app and whose `LAUNCH` says how it is launched.

    Args:
        file: of the app; the one that is shipped, or what `pivot push --space` lays out.

    Raises:
        PivotError: gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise PivotError("the Space needs gradio: pip install 'pivot-hub[space]'.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it asks for its version
    spec = importlib.util.spec_from_file_location("pivot_space_gradcam", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of_runs(runs: Path) -> BundleNames:
    """The two branches of a quickstart and their parent, as the app takes them.

    Raises:
        CheckpointError: a stage is missing.
    """
    if missing := [s for s in STAGES.values() if not (runs / s / "config.json").is_file()]:
        raise CheckpointError(f"{runs} has no finished {missing[0]}: run `pivot quickstart` first, or give --first.")
    return BundleNames(*(str(runs / STAGES[role]) for role in ("sft", "dpo", "parent")))


def serve(names: BundleNames, runs: Path | None, port: int, host: str = "127.0.0.1") -> None:
    """Serve the app until it is stopped.

    Args:
        names: of the pair to start with; the shipped pair by default.
        runs: folder of checkpoints that visitors may name.
        port: where it listens.
        host: the address it listens at; this machine only by default.
    """
    module = load_module()
    app = module.build_app(names, runs)
    app.launch(server_name=host, server_port=port, quiet=True, **module.LAUNCH)
