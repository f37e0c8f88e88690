"""Run notebooks from top to bottom, and keep their outputs: `python -m tests.run_notebook notebooks/*.ipynb`."""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
LONGEST_S = 1800  # of a cell, on a machine that is busy with something else


def run_notebook(path: Path, folder: Path) -> Any:
    """Return the notebook with the outputs of a run, without the times and numbers of the machine.

    Args:
        path: The notebook.
        folder: Folder that its code runs in.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell fails; the message has its traceback.
    """
    # The kernel imports this checkout, and finds the `pivot` of this environment.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    notebook: Any = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=LONGEST_S,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute(env=environment)
    notebook.metadata.pop("widgets", None)
    shrink_pictures(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def shrink_pictures(notebook: Any) -> None:
    """Keep the pictures in 256 colours, which makes those of noisy images half as large."""
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if picture := output.get("data", {}).get("image/png"):
            small = io.BytesIO()
            Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB").quantize(256).save(
                small, "PNG", optimize=True
            )
            output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(run_notebook(Path(name), Path(name).parent), name)
