"""Two scenes that differ in one thing: what changes in the features of an encoder, and in the answers of its MLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.synthetic import KINDS, Counterfactual, Form, ShapesDataset, Split, draw_counterfactual
from pivot_hub.probes.ranking import rank_pairs
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.probes.run import FIRST_SCENE
from pivot_hub.study.movement import features


def probe_counterfactuals(dataset: ShapesDataset, split: Split, count: int) -> list[Counterfactual]:
    """Draw one pair of scenes that differ in one thing for each probe scene, taking the kinds and forms in turn."""
    forms: tuple[Form, ...] = ("describe", "question")
    return [
        draw_counterfactual(dataset, split, FIRST_SCENE + i, KINDS[i % len(KINDS)], forms[i // len(KINDS) % len(forms)])
        for i in range(count)
    ]


def sensitivity(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    counterfactuals: Sequence[Counterfactual],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how the features at the feature layer change where two scenes differ, and elsewhere.

    The change of a patch is the distance of its two tokens over the root mean square distance of a token from the mean
    token, in percent. `object` is the mean over the patches in which a pixel differs, and `elsewhere` over the others.
    `object share` is the share of the squared change that lies on the patches in which a pixel differs.

    Args:
        model: MLLM that is measured.
        processor: Processor of the MLLM.
        counterfactuals: Pairs of scenes that differ in one thing.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.
    """
    first, second = (
        features(model, processor, [scene.render().image for scene in scenes])
        for scenes in ([c.scene for c in counterfactuals], [c.other for c in counterfactuals])
    )
    side = math.isqrt(first.shape[1])
    differs = np.stack([_patches(c.difference(), side) for c in counterfactuals])  # (N, H*W)
    spread = float(np.sqrt(((first - first.mean((0, 1))) ** 2).sum(2).mean()))
    change = np.linalg.norm(first - second, axis=2) / spread  # (N, H*W)
    over_spread = "change of a patch token between two scenes that differ in one thing, over the spread of tokens"
    of_square = "share of the squared change between two scenes that differ in one thing"
    # For each measure a numerator and a denominator (N,), which are summed over the pairs of scenes.
    scores = {
        "object": (over_spread, (change * differs).sum(1), differs.sum(1)),
        "elsewhere": (over_spread, (change * ~differs).sum(1), (~differs).sum(1)),
        "object share": (of_square, (change**2 * differs).sum(1), (change**2).sum(1)),
    }
    return [
        measure(
            f"shapes/sensitivity/{where}",
            "relative_change",
            np.stack([numerator, denominator], axis=1),
            protocol=protocol,
            seed=0,
            duration_s=0,
            **conditions,
        )
        for where, (protocol, numerator, denominator) in scores.items()
    ]


def _patches(difference: np.ndarray, side: int) -> np.ndarray:
    """Whether any pixel of each patch differs: (H*W,) bool, from (height, width) bool."""
    patch = len(difference) // side
    return difference.reshape(side, patch, side, patch).any(axis=(1, 3)).ravel()


def rank_counterfactuals(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    counterfactuals: Sequence[Counterfactual],
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Rank the answers of pairs of scenes that differ in one thing, given the image and given a grey one.

    Either answer is right for one of the two scenes, so that a grey image leaves chance, 50%.
    """
    pairs = [c.pair for c in counterfactuals]
    images = [c.scene.render().image for c in counterfactuals]
    return [
        replace(rank_pairs(model, processor, pairs, shown, conditions), task=f"shapes/counterfactuals/{name}")
        for name, shown in (("image", images), ("grey image", [grey_image(image) for image in images]))
    ]


def grey_image(image: Image.Image) -> Image.Image:
    """An image of the same size that shows nothing."""
    return Image.new("RGB", image.size, (128, 128, 128))
