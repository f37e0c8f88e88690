"""The paper's overfit-one-pair experiment: one pair under the SFT and the DPO loss, and where each loss looks.

Both runs begin at one parent and see nothing but one image with its two answers, until they know it. The maps of their
losses on the way show what each loss asks of the image (paper, section on gradient maps: steps 10, 20, 30).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.image import open_image
from pivot_hub.errors import DataError, TrainingError
from pivot_hub.explain.gradcam import (
    METHODS,
    Method,
    answer_batch,
    answer_log_probs,
    enlarge,
    explained_value,
    gradient_map,
    seen_image,
    seen_mask,
)
from pivot_hub.metrics.energy_inside.energy_inside import energy_inside
from pivot_hub.metrics.pointing_accuracy.pointing_accuracy import points_at
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.provenance import versions, weights_sha256

Loss = Literal["sft", "dpo"]
LOSSES: tuple[Loss, ...] = ("sft", "dpo")
STEPS = (10, 20, 30)
# On the built-in world's MLLM both losses have learnt the pair at step 30, and neither at step 10.
RATES: dict[Loss, float] = {"sft": 3e-5, "dpo": 3e-5}
PARTS = ("vision", "projector", "language")  # end to end, as the paper's second stage


@dataclass(frozen=True)
class Moment:
    """A model that has taken `step` steps on the pair: its loss, and the maps of it, each (H, W).

    `scores` of each map, where the target's mask is known: pointing_accuracy and energy_inside, as shares.
    """

    step: int
    loss: float
    maps: dict[Method, np.ndarray]
    scores: dict[Method, dict[str, float]] | None


@dataclass(frozen=True)
class OverfitRun:
    """One loss, overfitted on one pair.

    Args:
        loss: sft or dpo.
        learning_rate: of all parts.
        losses: before the first step, after the first, to the last.
        answer: summed log-probability of the right answer at the same steps.
        rejected: of the wrong one.
        moments: at the steps asked for.
    """

    loss: Loss
    learning_rate: float
    losses: list[float]
    answer: list[float]
    rejected: list[float]
    moments: list[Moment]

    def to_dict(self) -> dict[str, Any]:
        moments = [
            {"step": m.step, "loss": m.loss, "maps": {k: g.tolist() for k, g in m.maps.items()}, "scores": m.scores}
            for m in self.moments
        ]
        log_probs = {"answer": self.answer, "rejected": self.rejected}
        return {
            "learning_rate": self.learning_rate,
            "losses": self.losses,
            "log_probs": log_probs,
            "moments": moments,
        }


def overfit_pair(
    parent: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question: str,
    answer: str,
    rejected: str,
    loss: Loss,
    steps: Sequence[int] = STEPS,
    learning_rate: float | None = None,
    beta: float = 0.1,
    mask: np.ndarray | None = None,
) -> OverfitRun:
    """Train a copy of an MLLM on one pair by AdamW, and map the gradient of its loss on the way.

    Nothing is drawn by chance: without dropout and with one pair, the same call gives the same run.

    Args:
        parent: where the run begins, and the reference of the DPO loss; it is left as it was.
        processor: the parent's.
        image: any size; the processor brings it to the encoder's.
        question: what the user asks.
        answer: the right answer; rejected: the wrong one, which the SFT loss never sees.
        loss: sft or dpo.
        steps: after which to look; 0 is the parent itself.
        learning_rate: of all parts; that of RATES by default.
        beta: of the DPO loss.
        mask: (image_px, image_px) bool, where the thing asked about lies in what the encoder sees.

    Raises:
        TrainingError: the loss is not finite any more.
    """
    rate = RATES[loss] if learning_rate is None else learning_rate
    parent.eval()
    model = copy.deepcopy(parent)
    freeze_parts(model, dict.fromkeys(PARTS, rate))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate, weight_decay=0.0)
    batch = answer_batch(processor, image, question, [answer, rejected])
    with torch.no_grad():
        anchor = answer_log_probs(parent, batch)
    run = OverfitRun(loss, rate, [], [], [], [])
    for step in range(max(steps) + 1):
        log_probs = answer_log_probs(model, batch)
        value = explained_value(loss, log_probs, batch, anchor, beta)
        if not torch.isfinite(value):
            raise TrainingError(f"the {loss} loss is {value.item()} after {step} steps: lower its learning rate.")
        run.losses.append(float(value.detach()))
        run.answer.append(float(log_probs[0].detach()))
        run.rejected.append(float(log_probs[1].detach()))
        if step in steps:
            made = gradient_map(model, processor, image, question, answer, loss, rejected, parent, beta)
            scores = None if mask is None else {method: _scores(grid, mask) for method, grid in made.maps.items()}
            run.moments.append(Moment(step, made.value, made.maps, scores))
        if step < max(steps):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return run


def overfit_file(
    checkpoint: Path,
    image: Path,
    question: str,
    answer: str,
    rejected: str | None,
    steps: Sequence[int] = STEPS,
    rates: Mapping[Loss, float] | None = None,
    beta: float = 0.1,
    mask: Path | None = None,
) -> tuple[list[OverfitRun], Image.Image, np.ndarray | None, dict[str, Any]]:
    """Overfit one pair under both losses, from the MLLM of a folder, which is only read.

    Args:
        checkpoint: folder of the parent.
        image: the file.
        mask: a picture of the image's size, black outside of the thing asked about.
        steps, rates, beta: as `overfit_pair` takes them.

    Returns:
        The runs by SFT and by DPO, the image and the mask as the encoder sees them, and all as plain values.

    Raises:
        DataError: a file cannot be decoded or does not fit, an answer is missing, or a step or rate is none.
    """
    if rejected is None:
        raise DataError("the dpo loss compares two answers: give --rejected.")
    if not steps or min(steps) < 0 or max(steps) < 1:
        raise DataError(f"steps {list(steps)}: give whole numbers from 0 on, as in 10,20,30.")
    rates = {**RATES, **(rates or {})}
    if min(rates.values()) <= 0:
        raise DataError(f"learning rates {rates}: give positive ones.")
    picture = open_image(image, "image")
    known = None if mask is None else open_image(mask, "mask")
    if known is not None and known.size != picture.size:
        raise DataError(f"{mask} is {known.size} and its image {picture.size} pixels: give a mask of the image's size.")
    model, processor = load_mllm(checkpoint)
    seen = None if known is None else seen_mask(processor, np.asarray(known).max(-1) > 0)
    if seen is not None and not seen.any():
        raise DataError(f"{mask}: nothing of it is left in what the encoder sees; give the mask of a larger thing.")
    runs = [
        overfit_pair(model, processor, picture, question, answer, rejected, loss, steps, rates[loss], beta, seen)
        for loss in LOSSES
    ]
    metadata: dict[str, Any] = {
        "question": question,
        "answer": answer,
        "rejected": rejected,
        "parent": "/".join(checkpoint.absolute().parts[-2:]),
        "parent_sha256": weights_sha256(checkpoint),
        "optimizer": "AdamW, no weight decay, constant rate, all parts",
        "beta": beta,
        "target_area": None if seen is None else float(seen.mean()),
        "versions": versions(),
    }
    metadata |= {run.loss: run.to_dict() for run in runs}
    return runs, seen_image(processor, picture), seen, metadata


def figure_rows(
    runs: Sequence[OverfitRun], image: Image.Image, mask: np.ndarray | None
) -> list[tuple[str, Image.Image, np.ndarray | None, list[tuple[str, np.ndarray]]]]:
    """The figure's rows: a map of a loss each, by method; its columns: steps."""
    names = {"gradient": "gradient map", "gradcam": "Grad-CAM"}
    rows = []
    for method in reversed(METHODS):
        for run in runs:
            maps = []
            for moment in run.moments:
                said = f"step {moment.step}, loss {moment.loss:.3g}"
                if moment.scores is not None:
                    said += f", {100 * moment.scores[method]['energy_inside']:.0f}% inside"
                maps.append((said, moment.maps[method]))
            rows.append((f"{run.loss.upper()} loss, {names[method]}", image, mask, maps))
    return rows


def _scores(grid: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    heat = enlarge(grid, len(mask))
    return {"pointing_accuracy": points_at(heat, mask), "energy_inside": energy_inside(heat, mask)}
