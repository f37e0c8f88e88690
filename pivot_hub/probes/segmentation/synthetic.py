"""Segmentation of the synthetic Shapes dataset: a linear head on frozen patch tokens, scored on pixels."""

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
FIT_SCENES = 500  # with 64 patches each; more scenes change the scores by less than their interval
CLASSES = ("background", *SHAPES)


def class_masks(scenes: Sequence[Scene], rendered: Sequence[RenderedScene]) -> np.ndarray:
    """Return the class id of each pixel, 0 for background, then SHAPES in order: (N, image_px, image_px) int64."""
    masks = []
    for scene, image in zip(scenes, rendered, strict=True):
        ids = np.zeros(image.masks.shape[1:], np.int64)
        for scene_object, mask in zip(scene.objects, image.masks, strict=True):
            ids[mask] = 1 + SHAPES.index(scene_object.shape)
        masks.append(ids)
    return np.stack(masks)


def segment_patches(
    tokens: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], conditions: dict[str, Any], seed: int = 0
) -> list[ProbeResult]:
    """Fit a linear head on patches, choose its weight decay on validation, and score upsampled logits on test pixels.

    Args:
        tokens: (N, H*W, D) patch tokens of train, validation and test. Any other name belongs to scenes of another
            dataset, on which the same head is tested. Their task is `shapes/<name>/segmentation`.
        masks: (N, image_px, image_px) class ids of the same images.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer.
        seed: Seed of the bootstrap.

    Returns:
        mIoU, pixel accuracy and mean recall, with intervals over test images.
    """
    started = time.monotonic()
    fitted = tokens["train"][:FIT_SCENES]
    flat = fitted.reshape(-1, fitted.shape[-1])
    scale = standardised(flat)
    shares = _patch_shares(masks["train"][:FIT_SCENES], fitted.shape[1])
    heads = {decay: _fit(scale(flat), shares, decay) for decay in DECAYS}

    def scores_of(decay: float, part: str) -> np.ndarray:
        return _example_scores(heads[decay], scaled[part], masks[part])

    scaled = {part: scale(t) for part, t in tokens.items() if part != "train"}
    best = max(DECAYS, key=lambda d: mean_iou(scores_of(d, "validation").sum(0)[None])[0])
    scored = {part: scores_of(best, part) for part in scaled if part != "validation"}
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
    """Compute the share of each class in each patch, the soft label of the patch: (N*patches, classes) float32."""
    n, px, _ = masks.shape
    side = round(patches**0.5)
    if px % side:  # patches that do not end at a pixel have the shares of all pixels that they touch
        ids = torch.from_numpy(masks).split(64)
        pools = [nn.functional.adaptive_avg_pool2d(_one_hot(part).movedim(-1, 1), side) for part in ids]
        return torch.cat(pools).movedim(1, -1).reshape(n * patches, len(CLASSES)).numpy()
    one_hot = np.eye(len(CLASSES), dtype=np.float32)[masks]
    blocks = one_hot.reshape(n, side, px // side, side, px // side, len(CLASSES))
    return blocks.mean(axis=(2, 4)).reshape(n * patches, len(CLASSES))


def _one_hot(masks: torch.Tensor) -> torch.Tensor:
    return nn.functional.one_hot(masks, len(CLASSES)).float()


def _fit(x: np.ndarray, shares: np.ndarray, decay: float) -> nn.Linear:
    """Fit a multinomial logistic regression on soft labels by L-BFGS, starting from zero, so that it needs no seed."""
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
    """Count correct, predicted and true pixels of each class in each image: (N, 3, classes)."""
    n, patches, _ = tokens.shape
    side, k = round(patches**0.5), len(CLASSES)
    scores = []
    parts = np.array_split(masks, range(64, n, 64))
    for logits, truth in zip(head(torch.from_numpy(tokens).float()).split(64), parts, strict=True):
        grid = logits.transpose(1, 2).unflatten(2, (side, side))
        size = truth.shape[1:]
        predicted = nn.functional.interpolate(grid, size=size, mode="bilinear").argmax(1).numpy()
        for p, t in zip(predicted, truth, strict=True):
            scores.append([np.bincount(ids, minlength=k) for ids in (t[p == t], p.ravel(), t.ravel())])
    return np.array(scores)
