"""Metrics as `evaluate` modules: each folder is self-contained, loads by its path, and is also a Hub Space."""

from __future__ import annotations

from pathlib import Path
from typing import Any

METRICS = ("mean_iou", "pointing_accuracy", "energy_inside", "paired_bootstrap")


def load_metric(name: str) -> Any:
    """Load one of METRICS as `evaluate.load` does from its folder, with no network.

    Raises:
        ValueError: There is no metric of this name.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric of this package: it is one of {', '.join(METRICS)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name))
