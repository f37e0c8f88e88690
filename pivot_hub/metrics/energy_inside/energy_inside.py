"""Energy inside: the share of a map's sum that lies on its target."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np


def energy_inside(heat: np.ndarray, mask: np.ndarray) -> float:
    """Compute the share of a map's sum inside its target, from 0 to 1; a map that is zero everywhere scores 0.

    Args:
        heat: (H, W) map without negative values.
        mask: (H, W) bool mask of the target.

    Raises:
        ValueError: The shapes differ, or the map has a negative value.
    """
    if heat.shape != mask.shape:
        raise ValueError(f"a map is {heat.shape} and its mask {mask.shape}: bring the map to the mask's size.")
    if heat.min() < 0:
        raise ValueError("a map is negative somewhere: give its positive part or its absolute value.")
    total = heat.sum()
    return float(heat[mask].sum() / total) if total > 0 else 0.0


class EnergyInside(evaluate.Metric):
    """The energy-based pointing game (Wang et al., 2020), on masks or boxes."""

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        masks = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="The energy-based pointing game: the mean share of a saliency map's sum on its target.",
            citation="",
            inputs_description="predictions: maps without negative values, (H, W) of each target. references: masks "
            "of the same sizes, 0 outside the target.",
            features=datasets.Features({"predictions": maps, "references": masks}),
            reference_urls=["https://arxiv.org/abs/1910.01279"],
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        pairs = zip(predictions, references, strict=True)
        scores = [energy_inside(np.asarray(m), np.asarray(k) != 0) for m, k in pairs]
        uniform = float(np.mean([(np.asarray(k) != 0).mean() for k in references]))
        return {"energy_inside": float(np.mean(scores)), "uniform_map": uniform, "scores": scores}
