"""The paper's experiment of overfitting one preference pair, and saliency maps of SFT, DPO and GRPO on the way.

All runs start from the same parent and train on one image with its question only, until the model knows the answer. SFT
and DPO are given answers; GRPO is given a reward, and at each step generates answers of its own. The maps show which
places of the image each loss depends on (paper, section on gradient maps: steps 10, 20 and 30, of SFT and DPO).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.image import open_image
from pivot_hub.errors import DataError, TrainingError
from pivot_hub.explain.answer_group import (
    ANSWERS,
    AnswerGroup,
    Reward,
    check_size,
    completion_batch,
    draw_group,
    right_answer,
)
from pivot_hub.explain.gradcam import (
    METHODS,
    Method,
    answer_batch,
    answer_log_probs,
    enlarge,
    explained_value,
    gradient_map,
    group_gradient_map,
    group_loss,
    token_log_probs,
)
from pivot_hub.explain.image_maps import seen_image, seen_mask
from pivot_hub.metrics.energy_inside.energy_inside import energy_inside
from pivot_hub.metrics.pointing_accuracy.pointing_accuracy import points_at
from pivot_hub.mllm.load import load_mllm
from pivot_hub.mllm.trainable import freeze_parts
from pivot_hub.provenance import versions, weights_sha256

Loss = Literal["sft", "dpo", "grpo"]
LOSSES: tuple[Loss, ...] = ("sft", "dpo", "grpo")
STEPS = (10, 20, 30)
# The MLLM of the synthetic Shapes dataset learns the pair at these learning rates by step 30.
LEARNING_RATES: dict[Loss, float] = {"sft": 3e-5, "dpo": 3e-5, "grpo": 3e-5}
DRAWS = 16  # groups of answers that are generated for a map of the GRPO loss, at most
PARTS = ("vision", "projector", "language")  # all are trained, as in the paper's second stage


@dataclass(frozen=True)
class PreferencePair:
    """One image and question with a right and a wrong answer.

    Args:
        image: Image of any size, which the processor resizes for the encoder.
        question: The user's question.
        answer: The right answer.
        rejected: The wrong answer, which only the DPO loss uses.
        mask: (height, width) bool, true where the object that the question is about lies in the image that the
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
        maps: Map (H, W) of the loss by each method; none where the rewards of no group of answers differed.
        scores: pointing_accuracy and energy_inside of each map, as shares; None if the object's mask is not known.
        group: The answers whose GRPO loss is explained; None for other losses.
        draws: Number of groups that were generated until the rewards of one differed, for GRPO. The first is that of
            the step. The others add nothing to a mean over groups, because their gradient is zero.
    """

    step: int
    loss: float
    maps: dict[Method, np.ndarray]
    scores: dict[Method, dict[str, float]] | None
    group: AnswerGroup | None = None
    draws: int = 0

    def to_dict(self) -> dict[str, Any]:
        maps = {method: grid.tolist() for method, grid in self.maps.items()}
        values = {"step": self.step, "loss": self.loss, "maps": maps, "scores": self.scores}
        if self.group is None:
            return values
        return {**values, "answers": self.group.texts, "rewards": self.group.rewards, "draws": self.draws}


@dataclass(frozen=True)
class OverfitRun:
    """Training run on one preference pair under one loss.

    Args:
        loss: sft, dpo or grpo.
        learning_rate: Learning rate of all parts.
        losses: Loss before the first step and after each step.
        answer: Summed log-probability of the right answer at the same times.
        rejected: Summed log-probability of the wrong answer at the same times.
        rewards: Mean reward of the answers that were generated at the same times; empty for other losses than grpo.
        without_gradient: Whether all of these answers had the same reward, so that there was no gradient and the
            weights did not move.
        snapshots: Snapshots after the requested steps.
    """

    loss: Loss
    learning_rate: float
    losses: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    rejected: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    without_gradient: list[bool] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        values = {
            "learning_rate": self.learning_rate,
            "losses": self.losses,
            "log_probs": {"answer": self.answer, "rejected": self.rejected},
            "moments": [snapshot.to_dict() for snapshot in self.snapshots],
        }
        if not self.rewards:
            return values
        return {**values, "rewards": self.rewards, "share_without_gradient": float(np.mean(self.without_gradient[:-1]))}


@dataclass(frozen=True)
class Groups:
    """How GRPO generates and scores its answers.

    Args:
        reward: Reward of answers; by default 1 for the right one and 0 for others, by `rewards.exact_match`.
        answers: Number of answers that are generated at each step.
        seed: Seed of the answers, from which each step has its own.
    """

    reward: Reward | None = None
    answers: int = ANSWERS
    seed: int = 0

    def draw(
        self, model: PreTrainedModel, processor: ProcessorMixin, pair: PreferencePair, step: int, draw: int = 0
    ) -> AnswerGroup:
        """Generate the answers of a step from the model as it is now."""
        reward = self.reward or right_answer(pair.question, pair.answer)
        seed = (self.seed, step, draw)
        return draw_group(model, processor, pair.image, pair.question, reward, self.answers, seed)


def overfit_pair(
    parent: PreTrainedModel,
    processor: ProcessorMixin,
    pair: PreferencePair,
    loss: Loss,
    steps: Sequence[int] = STEPS,
    learning_rate: float | None = None,
    beta: float = 0.1,
    groups: Groups = Groups(),
) -> OverfitRun:
    """Train a copy of an MLLM on one preference pair with AdamW, and map the gradient of its loss at some steps.

    Only GRPO's answers are random, and they are seeded; there is no dropout and only one pair. So the same call gives
    the same run.

    Args:
        parent: Model that the run starts from, and the reference of the DPO loss; it is not changed.
        processor: Processor of the parent.
        pair: The preference pair to train on.
        loss: sft, dpo or grpo, which generates its own answers from the current weights at each step, and makes no step
            where all have the same reward.
        steps: Numbers of steps after which a snapshot is taken; 0 is the parent itself.
        learning_rate: Learning rate of all parts; by default that of LEARNING_RATES.
        beta: The beta of the DPO loss. The GRPO loss has no reference.
        groups: How the answers of GRPO are generated and scored.

    Raises:
        TrainingError: The answers' log-probabilities are no longer finite.
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
    run = OverfitRun(loss, learning_rate)
    for step in range(max(steps) + 1):
        with torch.set_grad_enabled(loss != "grpo"):
            log_probs = answer_log_probs(model, batch)
        if not torch.isfinite(log_probs).all():
            raise TrainingError(f"log-probabilities are not finite after {step} steps: lower the {loss} learning rate.")
        run.answer.append(float(log_probs[0].detach()))
        run.rejected.append(float(log_probs[1].detach()))
        moves = step < max(steps)
        if loss == "grpo":
            group = groups.draw(model, processor, pair, step)
            group_batch = completion_batch(processor, pair.image, pair.question, group.ids)
            value = group_loss(token_log_probs(model, group_batch), group_batch, group)
            run.rewards.append(group.mean_reward)
            run.without_gradient.append(not group.has_gradient)
            moves = moves and group.has_gradient  # otherwise AdamW would move the weights by its mean of past gradients
        else:
            value = explained_value(loss, log_probs, batch, reference_log_probs, beta)
        run.losses.append(float(value.detach()))
        if step in steps:
            run.snapshots.append(_snapshot(model, processor, parent, pair, loss, step, beta, groups))
        if moves:
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
    groups: Groups = Groups(),
) -> tuple[list[OverfitRun], Image.Image, np.ndarray | None, dict[str, Any]]:
    """Overfit one preference pair under each loss, starting from the MLLM of a checkpoint, which is only read.

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
        groups: How the answers of GRPO are generated and scored.

    Returns:
        The runs by SFT, DPO and GRPO, the image and the mask as the encoder sees them, and the results as plain values.

    Raises:
        DataError: A file cannot be decoded or has the wrong size, the wrong answer is missing, or a step, a
            learning rate or the number of GRPO's answers is out of range.
    """
    if rejected is None:
        raise DataError("the dpo loss compares two answers: give --rejected.")
    if not steps or min(steps) < 0 or max(steps) < 1:
        raise DataError(f"steps {list(steps)}: give whole numbers from 0 on, as in 10,20,30.")
    learning_rates = {**LEARNING_RATES, **(learning_rates or {})}
    if min(learning_rates.values()) <= 0:
        raise DataError(f"learning rates {learning_rates}: give positive ones.")
    check_size(groups.answers)
    decoded = open_image(image, "image")
    decoded_mask = None if mask is None else open_image(mask, "mask")
    if decoded_mask is not None and decoded_mask.size != decoded.size:
        raise DataError(
            f"{mask} is {decoded_mask.size} and its image {decoded.size} pixels: give a mask of the image's size."
        )
    model, processor = load_mllm(checkpoint)
    target = None if decoded_mask is None else seen_mask(model.config, processor, np.asarray(decoded_mask).max(-1) > 0)
    if target is not None and not target.any():
        raise DataError(f"{mask}: nothing of it is left in what the encoder sees; give the mask of a larger object.")
    pair = PreferencePair(decoded, question, answer, rejected, target)
    runs = [overfit_pair(model, processor, pair, loss, steps, learning_rates[loss], beta, groups) for loss in LOSSES]
    results: dict[str, Any] = {
        "question": question,
        "answer": answer,
        "rejected": rejected,
        "parent": "/".join(checkpoint.absolute().parts[-2:]),
        "parent_sha256": weights_sha256(checkpoint),
        "optimizer": "AdamW, no weight decay, constant learning rate, all parts",
        "beta": beta,
        "generations": groups.answers,
        "seed": groups.seed,
        "target_area": None if target is None else float(target.mean()),
        "versions": versions(),
    }
    results |= {run.loss: run.to_dict() for run in runs}
    return runs, seen_image(model.config, processor, decoded), target, results


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
                title = _figure_title(run, snapshot, method)
                maps.append((title, snapshot.maps.get(method, np.zeros((1, 1)))))
            rows.append((f"{run.loss.upper()} loss, {names[method]}", image, mask, maps))
    return rows


def _figure_title(run: OverfitRun, snapshot: Snapshot, method: Method) -> str:
    """Describe a snapshot's map, by the mean reward of the step for GRPO, because its loss is always near zero."""
    title, details = f"step {snapshot.step}, loss {snapshot.loss:.3g}", list[str]()
    if snapshot.group is not None:
        title = f"step {snapshot.step}, mean reward {run.rewards[snapshot.step]:.3g}"
        if not snapshot.maps:
            details.append(f"no gradient in {snapshot.draws} draws")
        elif snapshot.draws > 1:
            details.append(f"gradient of draw {snapshot.draws}")
    if snapshot.scores is not None:
        details.append(f"{100 * snapshot.scores[method]['energy_inside']:.0f}% inside")
    return "\n".join([title, ", ".join(details)]) if details else title


def _snapshot(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    parent: PreTrainedModel,
    pair: PreferencePair,
    loss: Loss,
    step: int,
    beta: float,
    groups: Groups,
) -> Snapshot:
    group, draws = None, 0
    if loss == "grpo":
        for draws in range(1, DRAWS + 1):
            group = groups.draw(model, processor, pair, step, draws - 1)
            if group.has_gradient:
                break
        else:
            return Snapshot(step, 0.0, {}, None, group, DRAWS)
        explanation = group_gradient_map(model, processor, pair.image, pair.question, group)
    else:
        explanation = gradient_map(
            model, processor, pair.image, pair.question, pair.answer, loss, pair.rejected, parent, beta
        )
    scores = None
    if pair.mask is not None:
        scores = {method: _scores(grid, pair.mask) for method, grid in explanation.maps.items()}
    return Snapshot(step, explanation.value, explanation.maps, scores, group, draws)


def _scores(grid: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    heat = enlarge(grid, mask.shape)
    return {"pointing_accuracy": points_at(heat, mask), "energy_inside": energy_inside(heat, mask)}
