"""Functions for lmms-eval tasks, whose YAML files name them, for rows of `image`, `question` and `answer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from pivot_hub.data.choices import same_choice


def show(row: dict[str, Any]) -> list[Image.Image]:
    """Return the image of a row, for `doc_to_visual`."""
    return [row["image"].convert("RGB")]


def score_choice(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Score whether the answer means the right option among those in the question, for `process_results`."""
    return {"accuracy": float(same_choice(answers[0], row["answer"], row["question"]))}


def score_words(row: dict[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Score whether the answer equals the right one word for word, ignoring case, for `process_results`."""
    return {"exact_match": float(answers[0].strip().casefold() == row["answer"].casefold())}
