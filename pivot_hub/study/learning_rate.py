"""Choose a stage's learning rate on validation: every candidate is an ordinary run, and all are reported."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.errors import RecipeError
from pivot_hub.files import write_json
from pivot_hub.mllm.load import image_px, load_mllm
from pivot_hub.probes.run import probe_questions
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.provenance import machine, weights_sha256
from pivot_hub.training.stage import run_stage

CRITERION = "exact-match accuracy of the MLLM on questions about validation scenes of the built-in world"


def search_rate(
    recipe: str,
    rates: Sequence[float],
    runs: Path,
    output: Path,
    questions: int = 1000,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a recipe once for each rate, all trained parts alike, and compare on validation.

    The criterion is the MLLM's, not the encoder's: no probe that is reported later takes part in the choice.

    Args:
        recipe: of a stage with a parent, whose checkpoint lies below `runs`.
        rates: candidates, each for every part that the recipe trains.
        runs: folder of all runs; a candidate goes to `<recipe>-lr<rate>`.
        output: of the record, JSON.
        questions: on validation scenes.
        overrides: of the recipe, for every candidate.

    Returns:
        The record: criterion, candidates with value and 95% interval, and the chosen rate.

    Raises:
        RecipeError: fewer than two rates.
    """
    if len(set(rates)) < 2:
        raise RecipeError("a search compares at least two rates: give --rates 3e-5,1e-4,3e-4.")
    parts = load_recipe(recipe).recipe.learning_rate.trained()
    candidates: list[dict[str, Any]] = []
    for rate in rates:
        started = time.monotonic()
        changed = [*overrides, *(f"learning_rate.{part}={rate}" for part in parts)]
        loaded = load_recipe(recipe, changed)
        folder = run_stage(loaded, runs, runs / f"{loaded.name}-lr{rate:g}", log=log)
        model, processor = load_mllm(folder)
        dataset = ShapesDataset(image_px=image_px(model))
        images, asked = probe_questions(dataset, "validation", questions)
        metadata = {
            "feature_layer": None,
            "encoder": folder.name,
            "encoder_sha256": weights_sha256(folder),
            "partner": None,
        }
        result = answer_questions(model, processor, asked, images, metadata, split="validation")[0]
        log(f"{loaded.name}: rate {rate:g} answers {result.value:.1f}% {list(result.ci95)}")
        candidates.append(
            {
                "rate": rate,
                "recipe_sha256": loaded.recipe.sha256(),
                "value_pct": round(result.value, 2),
                "ci95": [round(end, 2) for end in result.ci95],
                "n": result.n,
                "duration_s": round(time.monotonic() - started, 1),
            }
        )
    best = max(candidates, key=lambda c: c["value_pct"])
    record = {
        "recipe": loaded.name,
        "criterion": CRITERION,
        "parts": sorted(parts),
        "candidates": candidates,
        "chosen": best["rate"],
        "machine": machine(),
    }
    write_json(output, record)
    return record
