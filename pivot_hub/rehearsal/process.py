"""Start the process that rehearses, and read its reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pivot_hub.errors import RehearsalError
from pivot_hub.rehearsal.library import compiled_library
from pivot_hub.rehearsal.report import PathReport


def rehearse_recipes(
    recipes: Sequence[str], overrides: Sequence[str] = (), module: str = "pivot_hub.rehearsal"
) -> list[PathReport]:
    """Rehearse the paths of recipes on fake CUDA tensors, each path once.

    Args:
        recipes: Recipe files, or names of shipped recipes.
        overrides: Values under dotted keys, for each recipe.
        module: Module that is run, with the arguments of `pivot_hub.rehearsal`.

    Raises:
        RehearsalError: This machine or this torch cannot rehearse, or the process ended with an error.
    """
    library = compiled_library()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports.json"
        command = [sys.executable, "-W", "ignore", "-m", module, str(library), str(file)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        ended = subprocess.run(
            [*command, *recipes, *overrides], env=os.environ | quiet, capture_output=True, text=True, check=False
        )
        if ended.returncode < 0:
            raise RehearsalError(
                f"the rehearsal was ended by signal {-ended.returncode}, as by a system without memory left; rehearse "
                "with `args.per_device_train_batch_size=1`."
            )
        if ended.returncode != 0:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise RehearsalError(f"the rehearsal could not run: {lines[-1]}")
        return [PathReport.from_dict(values) for values in json.loads(file.read_text())]
