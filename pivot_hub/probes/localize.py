"""Localisation: do gradient maps of an answer sit on the thing it is about?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.shapes import Pair, Picture
from pivot_hub.gradcam import EXPLAINS, METHODS, Explain, Method, enlarge, gradient_map
from pivot_hub.probes.result import ProbeResult, bootstrap_mean

THRESHOLDS = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2))


@dataclass(frozen=True)
class Target:
    """A pair with its picture, about one thing whose mask (image_px, image_px) is known."""

    pair: Pair
    picture: Picture

    @property
    def mask(self) -> np.ndarray:
        assert self.pair.target is not None
        return self.picture.masks[self.pair.target]


@dataclass(frozen=True)
class MapScores:
    """How one map sits on a target: the peak on it or not, and shares from 0 to 1."""

    peak_inside: bool
    energy_inside: float
    iou: float
    area: float  # of the target: what an even map has inside


def score_map(grid: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> MapScores:
    """Score one map against a true mask, as `localize` scores many.

    Args:
        grid: (H, W), non-negative.
        mask: (px, px) bool.
        threshold: the share of its peak above which a cell counts for the IoU.
    """
    large = [enlarge(grid, mask.shape[0])]
    return MapScores(
        peak_inside=bool(large[0].max() > 0 and _pointing(large, [mask])[0]),
        energy_inside=float(_energy(large, [mask])[0]),
        iou=float(_ious(large, [mask], threshold)[0]),
        area=float(mask.mean()),
    )


def localize(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    reference: LlavaForConditionalGeneration,
    targets: dict[str, Sequence[Target]],
    conditions: dict[str, Any],
    seed: int = 0,
) -> list[ProbeResult]:
    """Score Grad-CAM and the paper's gradient map against true masks, for each thing explained.

    Pointing accuracy: the map's peak lies on the target. Energy: the share of the map's sum inside the target.
    IoU: of the map above a share of its peak with the target, the share chosen on validation.

    Args:
        model: the MLLM whose maps are scored.
        processor: its processor.
        reference: the frozen parent, for the DPO loss.
        targets: validation and test pairs that are about one thing.
        conditions: encoder, encoder_sha256, feature_layer, partner of the results.
    """
    results = []
    for explain in EXPLAINS:
        started = time.monotonic()
        maps = {s: [_maps(model, processor, reference, t, explain) for t in some] for s, some in targets.items()}
        duration = round((time.monotonic() - started) / len(METHODS), 2)
        for method in METHODS:
            chosen = {split: [m[method] for m in made] for split, made in maps.items()}
            results += _scores(chosen, targets, f"{method} of {explain}", conditions, seed, duration)
    return results


def _maps(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    reference: LlavaForConditionalGeneration,
    target: Target,
    explain: Explain,
) -> dict[Method, np.ndarray]:
    pair, image = target.pair, target.picture.image
    made = gradient_map(model, processor, image, pair.question, pair.chosen, explain, pair.rejected, reference)
    return {method: enlarge(grid, image.width) for method, grid in made.maps.items()}


def _scores(
    maps: dict[str, list[np.ndarray]],
    targets: dict[str, Sequence[Target]],
    what: str,
    conditions: dict[str, Any],
    seed: int,
    duration_s: float,
) -> list[ProbeResult]:
    masks = {split: [t.mask for t in some] for split, some in targets.items()}
    threshold = max(THRESHOLDS, key=lambda t: _ious(maps["validation"], masks["validation"], t).mean())
    area = 100 * np.mean([m.mean() for m in masks["test"]])
    scored = {
        "pointing_accuracy": (_pointing(maps["test"], masks["test"]), f"peak on the target; chance {area:.1f}"),
        "energy_inside": (_energy(maps["test"], masks["test"]), f"share on the target; uniform map {area:.1f}"),
        "iou": (
            _ious(maps["test"], masks["test"], threshold),
            f"map above {threshold:g} of its peak, chosen on validation",
        ),
    }
    results = []
    for metric, (values, protocol) in scored.items():
        value, interval = bootstrap_mean(values, seed)
        results.append(
            ProbeResult(
                task=f"shapes/localisation/{what}",
                metric=metric,
                value=100 * value,
                unit="percent",
                n=len(values),
                split="test",
                seed=seed,
                protocol=protocol,
                ci95=(100 * interval[0], 100 * interval[1]),
                duration_s=duration_s,
                **conditions,
            )
        )
    return results


def _pointing(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([float(k.ravel()[m.argmax()]) for m, k in zip(maps, masks, strict=True)])


def _energy(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    """A map that is zero everywhere points nowhere and scores 0."""
    return np.array([m[k].sum() / m.sum() if m.sum() > 0 else 0.0 for m, k in zip(maps, masks, strict=True)])


def _ious(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    values = []
    for m, k in zip(maps, masks, strict=True):
        above = m >= threshold * m.max() if m.max() > 0 else np.zeros_like(k)
        values.append((above & k).sum() / (above | k).sum())
    return np.array(values)
