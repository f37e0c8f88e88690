"""Pointing accuracy: the share of maps whose peak lies on their target."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


def points_at(heat: np.ndarray, mask: np.ndarray) -> float:
    """Return 1.0 if the peak of a map lies on its target, else 0.0.

    A uniform map has no peak and scores 0. If several peaks are equal, the first in reading order counts.

    Args:
        heat: (H, W) map; its largest value is the peak.
        mask: (H, W) bool mask of the target.

    Raises:
        ValueError: The shapes differ.
    """
    if heat.shape != mask.shape:
        raise ValueError(f"a map is {heat.shape} and its mask {mask.shape}: bring the map to the mask's size.")
    return float(heat.max() > heat.min() and mask.ravel()[heat.argmax()])


class PointingAccuracy(evaluate.Metric):
    """The pointing game (Zhang et al., 2016) without its tolerance of 15 pixels."""

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        masks = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="The pointing game: the share of saliency maps whose peak lies on their target.",
            citation="",
            inputs_description="predictions: maps, (H, W) of each target. references: masks of the same sizes, 0 "
            "outside the target.",
            features=datasets.Features({"predictions": maps, "references": masks}),
            reference_urls=["https://arxiv.org/abs/1608.00507"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        scores = [points_at(np.asarray(m), np.asarray(k) != 0) for m, k in pairs]
        chance = float(np.mean([(np.asarray(k) != 0).mean() for k in references]))
        return {"pointing_accuracy": float(np.mean(scores)), "chance": chance, "scores": scores}
