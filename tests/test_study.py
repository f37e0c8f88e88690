"""Studies: their files, a miniature from the first run to the report, what failed and what goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pivot_hub.recipe import RECIPES

SHAPES = RECIPES / "shapes"
TINY = {
    "train": 40,
    "validation": 30,
    "test": 40,
    "questions": 20,
    "targets_validation": 4,
    "targets_test": 6,
    "harder": 10,
    "pairs": 8,
}


def miniature(folder: Path, runs: set[str] | None = None) -> Path:
    """The shipped study with two seeds, two candidates of each rate, two steps a run, and few scenes.

    Args:
        folder: gets the study's file and the recipes beside it.
        runs: that are kept, and those they need; all of them if None.
    """
    spec: dict[str, Any] = yaml.safe_load((SHAPES / "study.yaml").read_text())
    spec |= {"seeds": [0, 1], "sizes": TINY}
    needed = set(spec["runs"]) if runs is None else set(runs)
    for name in reversed(spec["runs"]):
        if name in needed:
            run = spec["runs"][name]
            needed |= {run[key] for key in ("parent", "vision", "language", "rate_of") if key in run}
    spec["runs"] = {name: run for name, run in spec["runs"].items() if name in needed}
    for run in spec["runs"].values():
        if run.get("rates"):
            run["rates"] = run["rates"][:2]
        if "recipe" in run:
            small = ["args.per_device_train_batch_size=4", "data.0.rows=8", "args.save_strategy='no'"]
            run["change"] = [*run.get("change", []), *small]
    for factor in spec["factors"]:
        factor["pairs"] = [pair for pair in factor["pairs"] if set(pair) <= needed]
        for line in factor.get("curve", {}).get("lines", {}).values():
            for place in [place for place, run in line.items() if run not in needed]:
                del line[place]
        if "levels" in factor:
            factor["levels"]["runs"] = [run for run in factor["levels"]["runs"] if run in needed]
    spec["factors"] = [factor for factor in spec["factors"] if factor["pairs"]]
    beside = folder / "shapes"
    beside.mkdir(parents=True)
    for recipe in SHAPES.glob("[0-9]-*.yaml"):
        shutil.copy2(recipe, beside)
    (beside / "base").symlink_to(SHAPES / "base")
    (beside / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return beside / "study.yaml"
