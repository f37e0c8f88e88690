"""Patch segmentation: a linear head on frozen patch tokens, scored on pixels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pivot_hub.data.synthetic import SHAPES, RenderedScene, Scene
from pivot_hub.metrics.mean_iou.mean_iou import mean_iou
from pivot_hub.probes.features import standardised
from pivot_hub.probes.result import ProbeResult, measure

DECAYS = (1e-5, 1e-4, 1e-3)
FIT_SCENES = 500  # of 64 patches each: more change the scores by less than their interval
CLASSES = ("background", *SHAPES)


def class_masks(scenes: Sequence[Scene], pictures: Sequence[RenderedScene]) -> np.ndarray:
    """Class id of each pixel: 0 background, then SHAPES in order. (N, image_px, image_px) int64."""
    masks = []
    for scene, picture in zip(scenes, pictures, strict=True):
        ids = np.zeros(picture.masks.shape[1:], np.int64)
        for thing, mask in zip(scene.objects, picture.masks, strict=True):
            ids[mask] = 1 + SHAPES.index(thing.shape)
        masks.append(ids)
    return np.stack(masks)


def segment_patches(
    tokens: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], conditions: dict[str, Any], seed: int = 0
) -> list[ProbeResult]:
    """Fit a linear head on patches, choose its decay on validation, score upsampled logits on test pixels.

    Args:
        tokens: (N, H*W, D) of train, validation and test. Any other name is of scenes of another world, on which the
            same head is tested: their task is `shapes/<name>/segmentation`.
        masks: (N, image_px, image_px) class ids of the same images.
        conditions: encoder, encoder_sha256, feature_layer of the results.

    Returns:
        mIoU, pixel accuracy and mean recall, intervals over test images.
    """
    started = time.monotonic()
    fitted = tokens["train"][:FIT_SCENES]
    flat = fitted.reshape(-1, fitted.shape[-1])
    scale = standardised(flat)
    shares = _patch_shares(masks["train"][:FIT_SCENES], fitted.shape[1])
    heads = {decay: _fit(scale(flat), shares, decay) for decay in DECAYS}

    def tallied(decay: float, part: str) -> np.ndarray:
        return _example_scores(heads[decay], scaled[part], masks[part])

    scaled = {part: scale(t) for part, t in tokens.items() if part != "train"}
    best = max(DECAYS, key=lambda d: mean_iou(tallied(d, "validation").sum(0)[None])[0])
    scored = {part: tallied(best, part) for part in scaled if part != "validation"}
    duration = time.monotonic() - started
    return [
        measure(
            "shapes/segmentation" if part == "test" else f"shapes/{part}/segmentation",
            metric,
            example_scores,
            protocol=f"linear head on patch tokens, logits upsampled; decay {best:g} chosen on validation",
            seed=seed,
            duration_s=duration,
            **conditions,
        )
        for part, example_scores in scored.items()
        for metric in ("mean_iou", "pixel_accuracy", "mean_recall")
    ]


def _patch_shares(masks: np.ndarray, patches: int) -> np.ndarray:
    """Share of each class in each patch: (N*patches, classes) float32, the soft label of a patch."""
    n, px, _ = masks.shape
    side = round(patches**0.5)
    one_hot = np.eye(len(CLASSES), dtype=np.float32)[masks]
    blocks = one_hot.reshape(n, side, px // side, side, px // side, len(CLASSES))
    return blocks.mean(axis=(2, 4)).reshape(n * patches, len(CLASSES))


def _fit(x: np.ndarray, shares: np.ndarray, decay: float) -> nn.Linear:
    """Multinomial logistic regression on soft labels by L-BFGS, from zero: no seed enters."""
    features, labels = torch.from_numpy(x).float(), torch.from_numpy(shares)
    head = nn.Linear(x.shape[1], shares.shape[1])
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(features), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


@torch.no_grad()
def _example_scores(head: nn.Linear, tokens: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Pixels hit, predicted and true of each class in each image: (N, 3, classes)."""
    n, patches, _ = tokens.shape
    side, k = round(patches**0.5), len(CLASSES)
    made = []
    parts = np.array_split(masks, range(64, n, 64))
    for logits, truth in zip(head(torch.from_numpy(tokens).float()).split(64), parts, strict=True):
        grid = logits.transpose(1, 2).unflatten(2, (side, side))
        size = truth.shape[1:]
        predicted = nn.functional.interpolate(grid, size=size, mode="bilinear").argmax(1).numpy()
        for p, t in zip(predicted, truth, strict=True):
            made.append([np.bincount(ids, minlength=k) for ids in (t[p == t], p.ravel(), t.ravel())])
    return np.array(made)
