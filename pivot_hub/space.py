"""Find and load the Gradio app, which lies beside the package in a checkout and inside it in a wheel."""

from __future__ import annotations

import importlib.util
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pivot_hub.errors import CheckpointError, PivotError
from pivot_hub.recipe import PACKAGE

SPACES = PACKAGE / "spaces" if (PACKAGE / "spaces").is_dir() else PACKAGE.parent / "spaces"


def load_app(runs: Path) -> Any:
    """Build the Gradio app over trained stages.

    Raises:
        PivotError: gradio is not installed.
        CheckpointError: a stage is missing.
    """
    if missing := [s for s in ("2-instruct", "3-sft", "3-dpo") if not (runs / s / "config.json").is_file()]:
        raise CheckpointError(f"{runs} has no finished {missing[0]}: run `pivot quickstart` first, or give --runs.")
    if find_spec("gradio") is None:
        raise PivotError("the Space needs gradio: pip install 'pivot-hub[space]'.")
    spec = importlib.util.spec_from_file_location("pivot_space_gradcam", SPACES / "gradcam" / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_app(runs)
