"""Saliency maps from gradients: which places of the image an answer or a loss depends on, on the encoder's token grid.

There are two methods: Grad-CAM (Selvaraju et al., 2017) at the feature layer, and the paper's gradient map, which is
the L1 norm over channels of the gradient at the projector's output tokens, with border cells replaced by their inner
neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.image import open_image
from pivot_hub.encoder.device import compute_device
from pivot_hub.errors import CheckpointError, DataError
from pivot_hub.explain.answer_group import (
    ANSWERS,
    OF_TOKENS,
    AnswerGroup,
    answer_ids,
    check_size,
    completion_batch,
    draw_group,
    join_batches,
    right_answer,
)
from pivot_hub.explain.image_maps import (
    captured_tokens,
    fold_embeddings,
    fold_features,
    image_family,
    inner_layer,
    seen_image,
)
from pivot_hub.mllm.load import load_mllm

Explain = Literal["answer", "sft", "dpo"]
Method = Literal["gradcam", "gradient"]
EXPLAINS: tuple[Explain, ...] = ("answer", "sft", "dpo")
METHODS: tuple[Method, ...] = ("gradcam", "gradient")


@dataclass(frozen=True)
class GradientMaps:
    """Saliency maps of one image by method, each (H, W) float32 and non-negative, and the value that they explain."""

    maps: dict[Method, np.ndarray]
    value: float


@dataclass(frozen=True)
class AnsweredImage:
    """An image and a question with an answer, and for the DPO loss a rejected answer."""

    image: Image.Image
    question: str
    answer: str
    rejected: str | None = None


def gradient_map(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    answer: str,
    explain: Explain = "answer",
    rejected: str | None = None,
    reference: PreTrainedModel | None = None,
    beta: float = 0.1,
    layer: int | None = None,
) -> GradientMaps:
    """Explain one answer of an MLLM by gradients at its image tokens.

    Args:
        model: The MLLM; its weights get no gradient and are not changed.
        processor: Processor of the model.
        image: Image of any size, which the processor resizes for the encoder.
        question: The user's question.
        answer: The answer to explain; for `dpo` the chosen one.
        explain: Value to explain: `answer`, the summed log-probability of the answer; `sft`, the negative mean
            log-probability of its tokens; `dpo`, the sigmoid loss of the preference pair.
        rejected: The rejected answer, for `dpo`.
        reference: The frozen parent, for `dpo`.
        beta: The beta of the DPO loss.
        layer: Hidden state of the encoder that Grad-CAM explains, where 1 is the output of the first block; by
            default the feature layer. The gradient map explains the projector's output for any layer.

    Returns:
        Both maps and the value that they explain.

    Raises:
        ValueError: `rejected` or `reference` is missing for `dpo`, or the MLLM does not depend on the layer.
        CheckpointError: The MLLM has no image tokens, or the reference is of another family.
    """
    answered = AnsweredImage(image, question, answer, rejected)
    return gradient_maps(model, processor, [answered], explain, reference, beta, layer)[0]


def gradient_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    answered: Sequence[AnsweredImage],
    explain: Explain = "answer",
    reference: PreTrainedModel | None = None,
    beta: float = 0.1,
    layer: int | None = None,
) -> list[GradientMaps]:
    """Explain one answer about each of several images, as `gradient_map` does, in one forward and one backward pass.

    Images that the processor gives tensors of other shapes have passes of their own. Maps equal those of single images
    to rounding.

    Args:
        model, processor, explain, reference, beta, layer: As in `gradient_map`.
        answered: The images with their questions and answers.

    Returns:
        Both maps of each image, and the value that they explain.

    Raises:
        ValueError: A rejected answer or `reference` is missing for `dpo`, or the MLLM does not depend on the layer.
        CheckpointError: The MLLM has no image tokens, or the reference is of another family.
    """
    if explain == "dpo" and (reference is None or any(one.rejected is None for one in answered)):
        raise ValueError("the dpo loss compares two answers under two models: give `rejected` and `reference`.")
    chosen_layer = inner_layer(model, layer)
    if explain == "dpo" and reference is not None:
        require_same_family(model, reference)
    batches = []
    for one in answered:
        answers = [one.answer] if explain != "dpo" else [one.answer, str(one.rejected)]
        batches.append(answer_batch(processor, one.image, one.question, answers))
    explained: dict[int, GradientMaps] = {}
    for places in _of_one_shape(batches):
        batch = join_batches([batches[place] for place in places], cast(Any, processor).tokenizer.pad_token_id)
        maps = _explain_together(model, batch, len(places), explain, reference, beta, chosen_layer)
        explained |= zip(places, maps, strict=True)
    return [explained[place] for place in range(len(answered))]


def _explain_together(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    images: int,
    explain: Explain,
    reference: PreTrainedModel | None,
    beta: float,
    layer: int | None,
) -> list[GradientMaps]:
    """Explain as many answers about each image of a batch; see `gradient_maps`."""
    reference_log_probs = None
    if explain == "dpo" and reference is not None:
        with torch.no_grad():
            reference_log_probs = answer_log_probs(reference, batch).view(images, -1)

    def values_of(log_probs: Tensor) -> Tensor:
        sums = log_probs.sum(-1).view(images, -1)
        return explained_value(explain, sums, batch, reference_log_probs, beta)

    # Grad-CAM shows what raises the answer's probability; a loss falls there, so its gradient has the opposite sign.
    return _explained(model, batch, layer, values_of, sign=1.0 if explain == "answer" else -1.0)


def _of_one_shape(batches: Sequence[dict[str, Tensor]]) -> list[list[int]]:
    """Group batches by the shapes of their images' tensors, and by the values of those that are shapes themselves."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, batch in enumerate(batches):
        images = {name: value for name, value in batch.items() if name not in OF_TOKENS}
        key = tuple(
            (name, tuple(value.shape), None if value.is_floating_point() else tuple(value.flatten().tolist()))
            for name, value in sorted(images.items())
        )
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def group_gradient_map(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    group: AnswerGroup,
    layer: int | None = None,
) -> GradientMaps:
    """Explain the GRPO loss of several answers to one question by gradients at its image tokens.

    Args:
        model: The MLLM, which is the policy; its weights get no gradient and are not changed.
        processor: Processor of the model.
        image: Image of any size, which the processor resizes for the encoder.
        question: The user's question.
        group: The answers and their rewards, from `draw_group` or `AnswerGroup.of_texts`.
        layer: Hidden state of the encoder that Grad-CAM explains, as in `gradient_map`.

    Returns:
        Both maps, and the value of `group_loss`.

    Raises:
        ValueError: The MLLM does not depend on the layer.
        CheckpointError: The MLLM has no image tokens.
        DataError: All answers have the same reward, so that there is no gradient.
    """
    group.check_gradient()
    chosen_layer = inner_layer(model, layer)
    batch = completion_batch(processor, image, question, group.ids)

    def values_of(log_probs: Tensor) -> Tensor:
        return group_loss(log_probs, batch, group)[None]

    return _explained(model, batch, chosen_layer, values_of, sign=-1.0)[0]


def _explained(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    layer: int | None,
    values_of: Callable[[Tensor], Tensor],
    sign: float,
) -> list[GradientMaps]:
    """Compute the maps of a value of each image.

    Args:
        model: The MLLM.
        batch: Batch of as many answers about each image.
        layer: Hidden state that Grad-CAM explains, from `inner_layer`.
        values_of: Function that returns the values (images,) for the tokens' log-probabilities, from `token_log_probs`.
            Each depends on the answers about its own image.
        sign: Sign of the gradient that Grad-CAM takes.
    """
    if layer is not None:
        # The weights require no gradient, so the graph of an inner layer has to start at the pixels.
        batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
    with torch.enable_grad(), captured_tokens(model, layer) as tokens:
        values = values_of(token_log_probs(model, batch))
        gradients = torch.autograd.grad(values.sum(), [tokens["features"], tokens["embeddings"]])
    maps = _maps(model, batch, tokens["features"], sign * gradients[0], gradients[1], len(values))
    return [GradientMaps(*pair) for pair in zip(maps, values.tolist(), strict=True)]


def require_same_family(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Check that an MLLM can be compared with its parent, which reads the same tokens.

    Raises:
        CheckpointError: The two are of different families.
    """
    if reference.config.model_type != model.config.model_type:
        title, other = (image_family(each.config).title for each in (model, reference))
        raise CheckpointError(
            f"the dpo loss compares an MLLM with its parent, and a {title} has no {other} for a parent; give the "
            "parent that it was trained from."
        )


def _maps(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    features: Tensor,
    feature_gradient: Tensor,
    embedding_gradient: Tensor,
    images: int = 1,
) -> list[dict[Method, np.ndarray]]:
    """Compute the map of each method for each image from captured features and gradients.

    The answers of a preference pair or a group have copies of one image, whose gradients are added up.
    """
    rows = len(batch["input_ids"])
    answers = rows // images
    folded = fold_features(model, features.detach(), batch, rows)[::answers]
    gradients = torch.stack(fold_features(model, feature_gradient, batch, rows)).unflatten(0, (images, answers)).sum(1)
    projected = torch.stack(fold_embeddings(model, embedding_gradient, batch["input_ids"], batch))
    return [
        {
            "gradcam": _to_array(_grad_cam(own, gradient)),
            "gradient": inner_border(_to_array(projected_gradient.abs().sum(-1))),
        }
        for own, gradient, projected_gradient in zip(
            folded, gradients, projected.unflatten(0, (images, answers)).sum(1), strict=True
        )
    ]


@dataclass(frozen=True)
class TokenMap:
    """Attribution of one token of an answer: its text, its log-probability, and saliency maps of the latter."""

    text: str
    log_prob: float
    maps: dict[Method, np.ndarray]


def token_maps(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    answer: str,
    limit: int = 24,
) -> list[TokenMap]:
    """Explain each token of an answer separately, given the tokens before it, with one backward pass for each.

    Args:
        model: The MLLM.
        processor: Processor of the model.
        image: Image of any size.
        question: The user's question.
        answer: The answer to explain.
        limit: Number of tokens to explain, from the first on. The last token of a complete answer ends the turn.

    Raises:
        CheckpointError: The MLLM has no image tokens.
    """
    batch = answer_batch(processor, image, question, [answer])
    token_attributions = []
    with torch.enable_grad(), captured_tokens(model) as tokens:
        log_probs = token_log_probs(model, batch)[0]
        for position in batch["completion_mask"][0, 1:].nonzero().flatten().tolist()[:limit]:
            log_prob = log_probs[position]
            captured = [tokens["features"], tokens["embeddings"]]
            gradients = torch.autograd.grad(log_prob, captured, retain_graph=True)
            maps = _maps(model, batch, tokens["features"], gradients[0], gradients[1])[0]
            text = cast(Any, processor).tokenizer.decode(batch["input_ids"][0, position + 1])
            token_attributions.append(TokenMap(text, float(log_prob.detach()), maps))
    return token_attributions


def explained_value(
    explain: Explain,
    log_probs: Tensor,
    batch: dict[str, Tensor],
    reference_log_probs: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """Compute the value to explain from the log-probabilities of the answers, for one image (A,) or several (N, A).

    Args:
        explain: Value to explain, as in `gradient_map`.
        log_probs: Log-probabilities of the answer and, for `dpo`, of the rejected one.
        batch: Batch of the answers, from `answer_batch` or `join_batches`; `sft` takes their lengths from it.
        reference_log_probs: Log-probabilities of both answers under the reference, for `dpo`.
        beta: The beta of the DPO loss.

    Returns:
        A scalar, or (N,).
    """
    if explain == "answer":
        return log_probs[..., 0]
    if explain == "sft":
        lengths = batch["completion_mask"].sum(-1).view(log_probs.shape).to(log_probs.device)
        return -log_probs[..., 0] / lengths[..., 0]
    assert reference_log_probs is not None
    ratio = log_probs - reference_log_probs
    return -torch.nn.functional.logsigmoid(beta * (ratio[..., 0] - ratio[..., 1]))


def group_loss(log_probs: Tensor, batch: dict[str, Tensor], group: AnswerGroup) -> Tensor:
    """Compute the GRPO loss of answers that the model itself has just generated, as TRL's GRPOTrainer does by default.

    Each token counts as its answer's advantage times the ratio of its probability to that of the policy that generated
    it. Here both are one policy: the ratio is 1, so that clipping changes nothing, and the gradient is that of
    REINFORCE with the group's advantages. The loss is the mean over the tokens of all answers
    (`loss_type="dapo"`, with one group in a step), negated, and has no divergence from a reference (`beta=0`). Its
    value is 0 where all answers are equally long.

    Args:
        log_probs: Log-probability of each token (G, S - 1), from `token_log_probs`.
        batch: Batch of the answers, from `completion_batch`.
        group: The answers and their rewards.
    """
    mask = batch["completion_mask"][:, 1:].to(log_probs.device)
    ratio = (log_probs - log_probs.detach()).exp()
    advantages = group.advantages().to(log_probs.device)
    return -(ratio * advantages[:, None] * mask).sum() / mask.sum()


def answer_batch(
    processor: ProcessorMixin, image: Image.Image, question: str, answers: Sequence[str]
) -> dict[str, Tensor]:
    """Tokenise one question with each of several answers, as `completion_batch` does with their token ids."""
    return completion_batch(processor, image, question, answer_ids(processor, answers))


def answer_log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probability of each answer: (A,)."""
    return token_log_probs(model, batch).sum(-1)


def token_log_probs(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each token from the second on, and 0 for tokens outside of the answer: (A, S - 1)."""
    inputs = {k: v.to(model.device) for k, v in batch.items()}
    completion_mask = inputs.pop("completion_mask")
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    logits = model(**inputs, use_cache=False).logits
    # At least float32, because a sum of log-probabilities in bf16 loses the answer's last tokens.
    log_probs = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return picked * completion_mask[:, 1:]


def inner_border(grid: np.ndarray) -> np.ndarray:
    """Replace border cells, where attention sinks lie, by their inner neighbours, as the paper's maps do."""
    if min(grid.shape) < 3:
        return grid
    return np.pad(grid[1:-1, 1:-1], 1, mode="edge")


def enlarge(grid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Enlarge a (H, W) map to a shape (height, width) in pixels by bilinear interpolation."""
    values = Image.fromarray(grid.astype(np.float32))
    return np.asarray(values.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """Sum the channels of (H, W, D) features, weighted by their mean gradient, and keep the positive part (H, W)."""
    weights = gradient.flatten(0, 1).mean(dim=0, keepdim=True)
    return (weights * features.flatten(0, 1)).sum(-1).relu().unflatten(0, features.shape[:2])


def _to_array(values: Tensor) -> np.ndarray:
    """Convert a map (H, W) to float32 in main memory."""
    return values.detach().float().cpu().numpy()


def explain_file(
    checkpoint: str | Path,
    image: Path,
    question: str,
    answer: str,
    explain: str = "answer",
    rejected: str | None = None,
    reference: str | Path | None = None,
    answers: int = ANSWERS,
    seed: int = 0,
) -> tuple[GradientMaps, Image.Image, AnswerGroup | None]:
    """Explain an MLLM's answer to a question on an image file, or a loss.

    Args:
        checkpoint: Folder of the MLLM.
        image: File of the image.
        question: The user's question.
        answer: The answer to explain; for `dpo` the chosen one, for `grpo` the right one.
        explain: Value to explain: answer, sft or dpo, as in `gradient_map`, or grpo, the loss of answers that the MLLM
            generates, whose reward is 1 if they are the right one and 0 otherwise, as in `group_gradient_map`.
        rejected: The rejected answer, for `dpo`.
        reference: Folder of the parent, for `dpo`.
        answers: Number of answers that are generated, for `grpo`.
        seed: Seed of these answers.

    Returns:
        The maps, the image as the encoder sees it, and for `grpo` the answers.

    Raises:
        DataError: The image cannot be decoded, `explain` is unknown, `dpo` lacks its rejected answer or its reference,
            or the answers for `grpo` are fewer than two or have all the same reward.
    """
    if explain not in (*EXPLAINS, "grpo"):
        raise DataError(f"explain is {explain!r}: it is one of {', '.join((*EXPLAINS, 'grpo'))}.")
    if explain == "dpo" and (rejected is None or reference is None):
        raise DataError("the dpo loss compares two answers under two models: give --rejected and --reference.")
    if explain == "grpo":
        check_size(answers)
    decoded = open_image(image, "image")
    model, processor = load_mllm(checkpoint)
    parent = load_mllm(reference)[0].eval() if reference is not None else None
    for each in (model, parent):
        if each is not None:
            cast(torch.nn.Module, each).to(compute_device())
    model.eval()
    group = None
    if explain == "grpo":
        group = draw_group(model, processor, decoded, question, right_answer(question, answer), answers, seed)
        maps = group_gradient_map(model, processor, decoded, question, group)
    else:
        maps = gradient_map(model, processor, decoded, question, answer, cast(Explain, explain), rejected, parent)
    return maps, seen_image(model.config, processor, decoded), group
