"""Metrics as `evaluate` modules: each folder stands alone, loads by its path and is a Hub Space as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

METRICS = ("mean_iou", "pointing_accuracy", "energy_inside", "paired_bootstrap")


def load_metric(name: str) -> Any:
    """Load one of METRICS as `evaluate.load` does from its folder, with no network.

    Raises:
        ValueError: there is no metric of this name.
    """
    if name not in METRICS:
        raise ValueError(f"{name!r} is no metric of this package: it is one of {', '.join(METRICS)}.")
    import evaluate

    return evaluate.load(str(Path(__file__).parent / name))
