"""The paper's experiment of overfitting one preference pair, and saliency maps of the SFT and the DPO loss on the way.

Both runs start from the same parent and train on one image with its two answers only, until the model knows them. The
maps show which places of the image each loss depends on (paper, section on gradient maps: steps 10, 20 and 30).
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
# The MLLM of the synthetic Shapes dataset learns the pair at these learning rates after step 10 and by step 30.
LEARNING_RATES: dict[Loss, float] = {"sft": 3e-5, "dpo": 3e-5}
PARTS = ("vision", "projector", "language")  # all are trained, as in the paper's second stage


@dataclass(frozen=True)
class PreferencePair:
    """One image and question with a right and a wrong answer.

    Args:
        image: Image of any size, which the processor resizes for the encoder.
        question: The user's question.
        answer: The right answer.
        rejected: The wrong answer, which the SFT loss does not use.
        mask: (image_px, image_px) bool, true where the object that the question is about lies in the image that the
            encoder sees; None if that is not known.
    """

    image: Image.Image
    question: str
    answer: str
    rejected: str
    mask: np.ndarray | None = None


@dataclass(frozen=True)
class Snapshot:
    """Loss and saliency maps of a model after a number of steps.

    Args:
        step: Number of steps.
        loss: Value of the loss.
        maps: Map (H, W) of the loss by each method.
        scores: pointing_accuracy and energy_inside of each map, as shares; None if the object's mask is not known.
    """

    step: int
    loss: float
    maps: dict[Method, np.ndarray]
    scores: dict[Method, dict[str, float]] | None


@dataclass(frozen=True)
class OverfitRun:
    """Training run on one preference pair under one loss.

    Args:
        loss: sft or dpo.
        learning_rate: Learning rate of all parts.
        losses: Loss before the first step and after each step.
        answer: Summed log-probability of the right answer at the same times.
        rejected: Summed log-probability of the wrong answer at the same times.
        snapshots: Snapshots after the requested steps.
    """

    loss: Loss
    learning_rate: float
    losses: list[float]
    answer: list[float]
    rejected: list[float]
    snapshots: list[Snapshot]

    def to_dict(self) -> dict[str, Any]:
        snapshots = [
            {
                "step": s.step,
                "loss": s.loss,
                "maps": {k: grid.tolist() for k, grid in s.maps.items()},
                "scores": s.scores,
            }
            for s in self.snapshots
        ]
        return {
            "learning_rate": self.learning_rate,
            "losses": self.losses,
            "log_probs": {"answer": self.answer, "rejected": self.rejected},
            "moments": snapshots,
        }


def overfit_pair(
    parent: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pair: PreferencePair,
    loss: Loss,
    steps: Sequence[int] = STEPS,
    learning_rate: float | None = None,
    beta: float = 0.1,
) -> OverfitRun:
    """Train a copy of an MLLM on one preference pair with AdamW, and map the gradient of its loss at some steps.

    Nothing is random: there is no dropout and only one pair, so the same call gives the same run.

    Args:
        parent: Model that the run starts from, and the reference of the DPO loss; it is not changed.
        processor: Processor of the parent.
        pair: The preference pair to train on.
        loss: sft or dpo.
        steps: Numbers of steps after which a snapshot is taken; 0 is the parent itself.
        learning_rate: Learning rate of all parts; by default that of LEARNING_RATES.
        beta: The beta of the DPO loss.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    learning_rate = LEARNING_RATES[loss] if learning_rate is None else learning_rate
    parent.eval()
    model = copy.deepcopy(parent)
    freeze_parts(model, dict.fromkeys(PARTS, learning_rate))
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    batch = answer_batch(processor, pair.image, pair.question, [pair.answer, pair.rejected])
    with torch.no_grad():
        reference_log_probs = answer_log_probs(parent, batch)
    run = OverfitRun(loss, learning_rate, [], [], [], [])
    for step in range(max(steps) + 1):
        log_probs = answer_log_probs(model, batch)
        value = explained_value(loss, log_probs, batch, reference_log_probs, beta)
        if not torch.isfinite(value):
            raise TrainingError(f"the {loss} loss is {value.item()} after {step} steps: lower its learning rate.")
        run.losses.append(float(value.detach()))
        run.answer.append(float(log_probs[0].detach()))
        run.rejected.append(float(log_probs[1].detach()))
        if step in steps:
            run.snapshots.append(_snapshot(model, processor, parent, pair, loss, step, beta))
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
    learning_rates: Mapping[Loss, float] | None = None,
    beta: float = 0.1,
    mask: Path | None = None,
) -> tuple[list[OverfitRun], Image.Image, np.ndarray | None, dict[str, Any]]:
    """Overfit one preference pair under both losses, starting from the MLLM of a checkpoint, which is only read.

    Args:
        checkpoint: Folder of the parent.
        image: File of the image.
        question: The user's question.
        answer: The right answer.
        rejected: The wrong answer.
        steps: Numbers of steps after which a snapshot is taken.
        learning_rates: Learning rate for each loss; those of LEARNING_RATES by default.
        beta: The beta of the DPO loss.
        mask: File of a mask in the image's size, which is black outside of the object that the question is about.

    Returns:
        The runs by SFT and by DPO, the image and the mask as the encoder sees them, and the results as plain values.

    Raises:
        DataError: A file cannot be decoded or has the wrong size, the wrong answer is missing, or a step or a learning
            rate is out of range.
    """
    if rejected is None:
        raise DataError("the dpo loss compares two answers: give --rejected.")
    if not steps or min(steps) < 0 or max(steps) < 1:
        raise DataError(f"steps {list(steps)}: give whole numbers from 0 on, as in 10,20,30.")
    learning_rates = {**LEARNING_RATES, **(learning_rates or {})}
    if min(learning_rates.values()) <= 0:
        raise DataError(f"learning rates {learning_rates}: give positive ones.")
    decoded = open_image(image, "image")
    decoded_mask = None if mask is None else open_image(mask, "mask")
    if decoded_mask is not None and decoded_mask.size != decoded.size:
        raise DataError(
            f"{mask} is {decoded_mask.size} and its image {decoded.size} pixels: give a mask of the image's size."
        )
    model, processor = load_mllm(checkpoint)
    target = None if decoded_mask is None else seen_mask(processor, np.asarray(decoded_mask).max(-1) > 0)
    if target is not None and not target.any():
        raise DataError(f"{mask}: nothing of it is left in what the encoder sees; give the mask of a larger object.")
    pair = PreferencePair(decoded, question, answer, rejected, target)
    runs = [overfit_pair(model, processor, pair, loss, steps, learning_rates[loss], beta) for loss in LOSSES]
    results: dict[str, Any] = {
        "question": question,
        "answer": answer,
        "rejected": rejected,
        "parent": "/".join(checkpoint.absolute().parts[-2:]),
        "parent_sha256": weights_sha256(checkpoint),
        "optimizer": "AdamW, no weight decay, constant learning rate, all parts",
        "beta": beta,
        "target_area": None if target is None else float(target.mean()),
        "versions": versions(),
    }
    results |= {run.loss: run.to_dict() for run in runs}
    return runs, seen_image(processor, decoded), target, results


def figure_rows(
    runs: Sequence[OverfitRun], image: Image.Image, mask: np.ndarray | None
) -> list[tuple[str, Image.Image, np.ndarray | None, list[tuple[str, np.ndarray]]]]:
    """Arrange the maps of runs for `draw_rows`: one row for each method and loss, one column for each snapshot."""
    names = {"gradient": "gradient map", "gradcam": "Grad-CAM"}
    rows = []
    for method in reversed(METHODS):
        for run in runs:
            maps = []
            for snapshot in run.snapshots:
                title = f"step {snapshot.step}, loss {snapshot.loss:.3g}"
                if snapshot.scores is not None:
                    title += f", {100 * snapshot.scores[method]['energy_inside']:.0f}% inside"
                maps.append((title, snapshot.maps[method]))
            rows.append((f"{run.loss.upper()} loss, {names[method]}", image, mask, maps))
    return rows


def _snapshot(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    parent: LlavaForConditionalGeneration,
    pair: PreferencePair,
    loss: Loss,
    step: int,
    beta: float,
) -> Snapshot:
    explanation = gradient_map(
        model, processor, pair.image, pair.question, pair.answer, loss, pair.rejected, parent, beta
    )
    scores = None
    if pair.mask is not None:
        scores = {method: _scores(grid, pair.mask) for method, grid in explanation.maps.items()}
    return Snapshot(step, explanation.value, explanation.maps, scores)


def _scores(grid: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    heat = enlarge(grid, len(mask))
    return {"pointing_accuracy": points_at(heat, mask), "energy_inside": energy_inside(heat, mask)}
