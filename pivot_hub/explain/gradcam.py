"""Saliency maps from gradients: which places of the image an answer or a loss depends on, on the encoder's token grid.

There are two methods: Grad-CAM (Selvaraju et al., 2017) at the feature layer, and the paper's gradient map, which is
the L1 norm over channels of the gradient at the projector's output tokens, with border cells replaced by their inner
neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.image import open_image
from pivot_hub.encoder.configuration_pivot import prefix_tokens
from pivot_hub.encoder.image_shapes import require_squares
from pivot_hub.errors import DataError
from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.mllm.load import SQUARES_ONLY, load_mllm, register_tokens

Explain = Literal["answer", "sft", "dpo"]
Method = Literal["gradcam", "gradient"]
EXPLAINS: tuple[Explain, ...] = ("answer", "sft", "dpo")
METHODS: tuple[Method, ...] = ("gradcam", "gradient")


@dataclass(frozen=True)
class GradientMaps:
    """Saliency maps of one image by method, each (H, W) float32 and non-negative, and the value that they explain."""

    maps: dict[Method, np.ndarray]
    value: float


def gradient_map(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    image: Image.Image,
    question: str,
    answer: str,
    explain: Explain = "answer",
    rejected: str | None = None,
    reference: LlavaForConditionalGeneration | None = None,
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
        CheckpointError: The vision tower is of native resolution.
    """
    require_squares(model.config.vision_config, model.name_or_path or "the MLLM", *SQUARES_ONLY)
    if explain == "dpo" and (rejected is None or reference is None):
        raise ValueError("the dpo loss compares two answers under two models: give `rejected` and `reference`.")
    inner_layer = _inner_layer(model, layer)
    answers = [answer] if explain != "dpo" else [answer, str(rejected)]
    batch = answer_batch(processor, image, question, answers)
    reference_log_probs = None
    if explain == "dpo" and reference is not None:
        with torch.no_grad():
            reference_log_probs = answer_log_probs(reference, batch)
    if inner_layer is not None:
        # The weights require no gradient, so the graph of an inner layer has to start at the pixels.
        batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
    with torch.enable_grad(), _image_tokens(model, inner_layer) as tokens:
        log_probs = answer_log_probs(model, batch)
        value = explained_value(explain, log_probs, batch, reference_log_probs, beta)
        features, projected = tokens["features"], tokens["projected"]
        feature_gradient, projected_gradient = torch.autograd.grad(value, [features, projected])
    projected_patches = slice(register_tokens(model), None)
    feature_patches = projected_patches
    if inner_layer is not None:
        feature_patches = slice(prefix_tokens(cast(Any, model.config.vision_config)), None)
    # Grad-CAM shows what raises the answer's probability; a loss falls there, so its gradient has the opposite sign.
    sign = 1.0 if explain == "answer" else -1.0
    # The two answers of a preference pair have copies of one image, whose gradients are added up.
    maps = _maps(
        features[0, feature_patches],
        sign * feature_gradient.sum(0)[feature_patches],
        projected_gradient.sum(0)[projected_patches],
    )
    return GradientMaps(maps, float(value.detach()))


def _inner_layer(model: LlavaForConditionalGeneration, layer: int | None) -> int | None:
    """Check a layer of the encoder; return None for the feature layer, which the projector's input holds."""
    last = feature_layer(model)
    if layer is None or layer == last:
        return None
    if not 1 <= layer <= last:
        raise ValueError(f"layer {layer} is not one of 1 to {last}, the layers that the language model depends on.")
    return layer


def _maps(features: Tensor, feature_gradient: Tensor, projected_gradient: Tensor) -> dict[Method, np.ndarray]:
    """Compute the map of each method from (H*W, D) features and gradients of the patches."""
    return {
        "gradcam": _square(_grad_cam(features.detach(), feature_gradient)),
        "gradient": inner_border(_square(projected_gradient.abs().sum(-1))),
    }


@dataclass(frozen=True)
class TokenMap:
    """Attribution of one token of an answer: its text, its log-probability, and saliency maps of the latter."""

    text: str
    log_prob: float
    maps: dict[Method, np.ndarray]


def token_maps(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
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
        CheckpointError: The vision tower is of native resolution.
    """
    require_squares(model.config.vision_config, model.name_or_path or "the MLLM", *SQUARES_ONLY)
    batch = answer_batch(processor, image, question, [answer])
    patches = slice(register_tokens(model), None)
    token_attributions = []
    with torch.enable_grad(), _image_tokens(model) as tokens:
        log_probs = token_log_probs(model, batch)[0]
        for position in batch["completion_mask"][0, 1:].nonzero().flatten().tolist()[:limit]:
            log_prob = log_probs[position]
            feature_gradient, projected_gradient = torch.autograd.grad(
                log_prob, [tokens["features"], tokens["projected"]], retain_graph=True
            )
            maps = _maps(tokens["features"][0, patches], feature_gradient[0, patches], projected_gradient[0, patches])
            text = processor.tokenizer.decode(batch["input_ids"][0, position + 1])
            token_attributions.append(TokenMap(text, float(log_prob.detach()), maps))
    return token_attributions


def feature_layer(model: LlavaForConditionalGeneration) -> int:
    """Index of the hidden state that enters the projector, where 1 is the output of the first block."""
    layer = int(cast(int, model.config.vision_feature_layer))
    return layer if layer >= 0 else int(cast(Any, model.config.vision_config).num_hidden_layers) + 1 + layer


def explained_value(
    explain: Explain,
    log_probs: Tensor,
    batch: dict[str, Tensor],
    reference_log_probs: Tensor | None = None,
    beta: float = 0.1,
) -> Tensor:
    """Compute the scalar to explain from the log-probabilities of the answers.

    Args:
        explain: Value to explain, as in `gradient_map`.
        log_probs: Log-probabilities (A,) of the answer and, for `dpo`, of the rejected one.
        batch: Batch of the answers, from `answer_batch`.
        reference_log_probs: Log-probabilities (A,) of both answers under the reference, for `dpo`.
        beta: The beta of the DPO loss.
    """
    if explain == "answer":
        return log_probs[0]
    if explain == "sft":
        return -log_probs[0] / batch["completion_mask"][0].sum()
    assert reference_log_probs is not None
    ratio = log_probs - reference_log_probs
    return -torch.nn.functional.logsigmoid(beta * (ratio[0] - ratio[1]))


def answer_batch(
    processor: LlavaProcessor, image: Image.Image, question: str, answers: Sequence[str]
) -> dict[str, Tensor]:
    """Tokenise one question with each of several answers, padded on the right.

    Args:
        processor: Processor of the MLLM.
        image: Image of any size.
        question: The user's question.
        answers: The A answers.

    Returns:
        input_ids, attention_mask, completion_mask (A, S), and pixel_values (A, 3, height, width).
    """
    prompt = chat_prompt(processor, question)
    prompt_inputs = processor(text=[prompt], images=[image], return_tensors="pt", add_special_tokens=False)
    end = processor.tokenizer.eos_token
    completions = [processor.tokenizer(f"{a}{end}", add_special_tokens=False)["input_ids"] for a in answers]
    width, length = max(len(ids) for ids in completions), prompt_inputs["input_ids"].shape[1]
    input_ids = torch.full((len(answers), length + width), processor.tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(completions):
        input_ids[i, :length] = prompt_inputs["input_ids"][0]
        input_ids[i, length : length + len(ids)] = torch.tensor(ids)
        attention_mask[i, : length + len(ids)] = 1
    completion_mask = attention_mask.clone()
    completion_mask[:, :length] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "pixel_values": prompt_inputs["pixel_values"].expand(len(answers), -1, -1, -1),
    }


def answer_log_probs(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probability of each answer: (A,)."""
    return token_log_probs(model, batch).sum(-1)


def token_log_probs(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each token from the second on, and 0 for tokens outside of the answer: (A, S - 1)."""
    inputs = {k: v.to(model.device) for k, v in batch.items()}
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"],
    ).logits
    # At least float32, because a sum of log-probabilities in bf16 loses the answer's last tokens.
    log_probs = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return picked * inputs["completion_mask"][:, 1:]


def inner_border(grid: np.ndarray) -> np.ndarray:
    """Replace border cells, where attention sinks lie, by their inner neighbours, as the paper's maps do."""
    if min(grid.shape) < 3:
        return grid
    return np.pad(grid[1:-1, 1:-1], 1, mode="edge")


def enlarge(grid: np.ndarray, image_px: int) -> np.ndarray:
    """Enlarge a (H, W) map to (image_px, image_px) by bilinear interpolation."""
    values = Image.fromarray(grid.astype(np.float32))
    return np.asarray(values.resize((image_px, image_px), Image.Resampling.BILINEAR))


def seen_image(processor: LlavaProcessor, image: Image.Image) -> Image.Image:
    """Resize, crop or pad an image as the encoder's own processor does, but keep its colours.

    Returns:
        The image that the encoder sees.

    Raises:
        DataError: The processor returns images that are not square, on which maps cannot be drawn.
    """
    prepared = cast(Any, processor).image_processor(
        images=image, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    if prepared.shape[1] != prepared.shape[2]:
        raise DataError(f"the image processor gives images of {prepared.shape[1:]} pixels; maps need square ones.")
    return Image.fromarray(prepared.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8))


def seen_mask(processor: LlavaProcessor, mask: np.ndarray) -> np.ndarray:
    """Resize and crop a (H, W) bool mask with the image processor, exactly as `seen_image` does with an image.

    Returns:
        (image_px, image_px) bool, true for pixels that lie on the mask by at least half.
    """
    return np.asarray(seen_image(processor, Image.fromarray(mask).convert("RGB")))[..., 0] >= 128


def _grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """Sum the channels of (H*W, D) features, weighted by their mean gradient, and keep the positive part (H*W,)."""
    weights = gradient.mean(dim=0, keepdim=True)
    return (weights * features).sum(-1).relu()


def _square(flat: Tensor) -> np.ndarray:
    """Fold a value for each patch (H*W,) into the square grid (H, W)."""
    side = round(flat.numel() ** 0.5)
    return flat.reshape(side, side).detach().float().cpu().numpy()


@contextmanager
def _image_tokens(model: LlavaForConditionalGeneration, layer: int | None = None) -> Iterator[dict[str, Any]]:
    """Capture the input and the output of the projector, with gradients, while the weights require none.

    The model's hooks and `requires_grad` flags are restored afterwards.

    Args:
        model: The MLLM.
        layer: Hidden state of the encoder that is captured instead of the projector's input.

    Yields:
        A dictionary that has `features` and `projected` after each forward pass.
    """
    captured: dict[str, Any] = {}
    requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def before_projector(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured["features"] = inputs[0].detach().requires_grad_()
        return (captured["features"], *inputs[1:])

    def after_projector(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        captured["projected"] = output

    def before_tower(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_hidden_states": True}  # LLaVA's classes ask only for the feature layer

    def after_tower(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        captured["features"] = output.hidden_states[layer]

    projector = model.model.multi_modal_projector
    hooks = [projector.register_forward_hook(after_projector)]
    if layer is None:
        hooks.append(projector.register_forward_pre_hook(before_projector))
    else:
        tower = cast(torch.nn.Module, model.model.vision_tower)
        hooks.append(tower.register_forward_pre_hook(before_tower, with_kwargs=True))
        hooks.append(tower.register_forward_hook(after_tower))
    for parameter, _ in requires_grad:
        parameter.requires_grad_(False)
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)


def explain_file(
    checkpoint: str | Path,
    image: Path,
    question: str,
    answer: str,
    explain: str = "answer",
    rejected: str | None = None,
    reference: str | Path | None = None,
) -> tuple[GradientMaps, Image.Image]:
    """Explain an MLLM's answer to a question on an image file.

    Args:
        checkpoint: Folder of the MLLM.
        image: File of the image.
        question: The user's question.
        answer: The answer to explain; for `dpo` the chosen one.
        explain: Value to explain: answer, sft or dpo, as in `gradient_map`.
        rejected: The rejected answer, for `dpo`.
        reference: Folder of the parent, for `dpo`.

    Returns:
        The maps, and the image as the encoder sees it.

    Raises:
        DataError: The image cannot be decoded, `explain` is unknown, or `dpo` lacks its rejected answer or its
            reference.
    """
    if explain not in EXPLAINS:
        raise DataError(f"explain is {explain!r}: it is one of {', '.join(EXPLAINS)}.")
    if explain == "dpo" and (rejected is None or reference is None):
        raise DataError("the dpo loss compares two answers under two models: give --rejected and --reference.")
    decoded = open_image(image, "image")
    model, processor = load_mllm(checkpoint)
    parent = load_mllm(reference)[0].eval() if reference is not None else None
    maps = gradient_map(model.eval(), processor, decoded, question, answer, explain, rejected, parent)
    return maps, seen_image(processor, decoded)
