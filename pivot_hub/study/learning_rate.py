"""The choice of a learning rate on validation, for `pivot search` and for the runs of a study."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pivot_hub.config.recipe import load_recipe
from pivot_hub.data.synthetic import ShapesDataset
from pivot_hub.encoder import PivotVisionConfig
from pivot_hub.encoder.configuration_pivot import native_config
from pivot_hub.encoder.device import compute_device
from pivot_hub.errors import RecipeError
from pivot_hub.files import write_json
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.ranking import rank_pairs
from pivot_hub.probes.result import ProbeResult
from pivot_hub.probes.run import probe_pairs, probe_questions
from pivot_hub.probes.vqa.synthetic import answer_questions
from pivot_hub.provenance import machine, weights_sha256
from pivot_hub.training.stage import run_stage

METRIC = "ranked_right"  # the metric that candidates are compared by
CRITERION = (
    "share of preference pairs about validation scenes of the synthetic Shapes dataset whose chosen answer the MLLM "
    "finds more probable than the rejected one"
)


def score_candidate(
    checkpoint: Path, name: str, pairs: int, questions: int, dataset: ShapesDataset | None = None
) -> tuple[ProbeResult, ProbeResult]:
    """Score the MLLM of one candidate on validation scenes; no probe of its encoder takes part.

    Args:
        checkpoint: Folder of the candidate's MLLM.
        name: Name of the candidate in the results.
        pairs: Number of preference pairs.
        questions: Number of questions.
        dataset: Dataset of the scenes; by default the Shapes dataset at the image size of the MLLM.

    Returns:
        The share of pairs that are ranked right, which is the criterion; and the share of questions that are answered
        right, which is reported beside it.
    """
    model, processor = load_mllm(checkpoint)
    model.to(compute_device())  # type: ignore[arg-type]
    if dataset is None:
        dataset = ShapesDataset()
        own_px = PivotVisionConfig(native_config(model.config)).image_size  # None for a tower of native resolution
        dataset = replace(dataset, image_px=own_px or dataset.image_px)
    conditions: dict[str, Any] = {
        "feature_layer": family_of(model.config).feature_layer(model.config),
        "encoder": name,
        "encoder_sha256": weights_sha256(checkpoint),
        "partner": name,
    }
    images, preference_pairs = probe_pairs(dataset, "validation", pairs)
    ranked = rank_pairs(model, processor, preference_pairs, images, conditions, split="validation")
    images, asked_questions = probe_questions(dataset, "validation", questions)
    answers = answer_questions(model, processor, asked_questions, images, conditions, split="validation")
    return ranked, answers[0]


def best_learning_rate(scores: Mapping[float, float]) -> float:
    """Return the learning rate with the highest score; the first one of several with the same score."""
    return max(scores, key=lambda learning_rate: scores[learning_rate])


def search_learning_rate(
    recipe: str,
    learning_rates: Sequence[float],
    runs: Path,
    output: Path,
    pairs: int = 1000,
    questions: int = 1000,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a recipe once with each learning rate, the same for all trained parts, and compare on validation.

    Every candidate is an ordinary run, and all candidates are recorded.

    Args:
        recipe: Recipe of a stage with a parent whose checkpoint is below `runs`.
        learning_rates: Candidates, each for every part that the recipe trains.
        runs: Folder of all runs; a candidate is written to `<recipe>-lr<learning rate>`.
        output: File that the record is written to, as JSON.
        pairs: Number of validation pairs.
        questions: Number of validation questions.
        overrides: Overrides of the recipe, for every candidate.
        log: Callback that receives progress, one line at a time.

    Returns:
        The record: the criterion, the candidates with value and 95% interval, and the chosen learning rate.

    Raises:
        RecipeError: There are fewer than two learning rates.
    """
    if len(set(learning_rates)) < 2:
        raise RecipeError("a search compares at least two learning rates: give --rates 3e-5,1e-4,3e-4.")
    base = load_recipe(recipe)
    parts = base.recipe.learning_rate.trained()
    candidates: list[dict[str, Any]] = []
    scores: dict[float, float] = {}
    for learning_rate in learning_rates:
        started = time.monotonic()
        loaded = load_recipe(recipe, [*overrides, *(f"learning_rate.{part}={learning_rate}" for part in parts)])
        folder = run_stage(loaded, runs, runs / f"{loaded.name}-lr{learning_rate:g}", log=log)
        ranked, answers = score_candidate(folder, folder.name, pairs, questions)
        scores[learning_rate] = ranked.value
        log(
            f"{loaded.name}: learning rate {learning_rate:g} ranks {ranked.value:.1f}% {list(ranked.ci95)} of pairs "
            f"right, and answers {answers.value:.1f}% of questions"
        )
        record = _candidate_record(ranked, answers)
        duration = round(time.monotonic() - started, 1)
        candidates.append(
            {"rate": learning_rate, "recipe_sha256": loaded.recipe.sha256(), **record, "duration_s": duration}
        )
    search = {
        "recipe": base.name,
        "criterion": CRITERION,
        "parts": sorted(parts),
        "candidates": candidates,
        "chosen": best_learning_rate(scores),
        "machine": machine(),
    }
    write_json(output, search)
    return search


def _candidate_record(ranked: ProbeResult, answers: ProbeResult) -> dict[str, Any]:
    """The scores of a candidate as the record has them."""
    return {
        "value_pct": round(ranked.value, 2),
        "ci95": [round(end, 2) for end in ranked.ci95],
        "n": ranked.n,
        "answers_pct": round(answers.value, 2),
        "answers_n": answers.n,
    }
