"""Gradient maps: where on the image a loss or an answer depends, on the encoder's token grid.

Two methods: Grad-CAM (Selvaraju et al., 2017) at the feature layer, and the paper's gradient map, the L1 norm
over channels of the gradient at the projector's output tokens, border cells replaced by inner neighbours.
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
from pivot_hub.errors import DataError
from pivot_hub.mllm.load import chat_prompt, load_mllm, register_tokens

Explain = Literal["answer", "sft", "dpo"]
Method = Literal["gradcam", "gradient"]
EXPLAINS: tuple[Explain, ...] = ("answer", "sft", "dpo")
METHODS: tuple[Method, ...] = ("gradcam", "gradient")


@dataclass(frozen=True)
class GradientMaps:
    """Maps of one image by method, each (H, W) float32 and non-negative, and the value explained."""

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
    """Explain one answer of an MLLM by gradients on its image tokens.

    Args:
        model: an MLLM; its weights get no gradient and are left as they are.
        processor: the model's processor.
        image: any size; the processor brings it to the encoder's.
        question: what the user asks.
        answer: the answer to explain; for `dpo` the chosen one.
        explain: `answer`, the summed log-probability of the answer; `sft`, its mean negative; `dpo`, the sigmoid
            loss of the pair.
        rejected: the worse answer, for `dpo`.
        reference: the frozen parent, for `dpo`.
        beta: of the DPO loss.
        layer: hidden state of the encoder that Grad-CAM looks at, 1 behind its first block; by default the feature
            layer. The gradient map is of the projector's output at any layer.

    Returns:
        Both maps and the value they explain.

    Raises:
        ValueError: `dpo` without `rejected` or `reference`, or a layer that the MLLM does not see.
    """
    if explain == "dpo" and (rejected is None or reference is None):
        raise ValueError("the dpo loss compares two answers under two models: give `rejected` and `reference`.")
    seen = feature_layer(model)
    if layer is not None and not 1 <= layer <= seen:
        raise ValueError(f"layer {layer} is none of 1 to {seen}, which the language head depends on.")
    inner = layer if layer != seen else None
    answers = [answer] if explain != "dpo" else [answer, str(rejected)]
    batch = answer_batch(processor, image, question, answers)
    with torch.no_grad():
        anchor = answer_log_probs(reference, batch) if explain == "dpo" and reference is not None else None
    if inner is not None:  # the weights get no gradient, so the way back to an inner layer starts at the pixels
        batch["pixel_values"] = batch["pixel_values"].clone().requires_grad_()
    with torch.enable_grad(), _tokens_of(model, inner) as tokens:
        log_probs = answer_log_probs(model, batch)
        value = explained_value(explain, log_probs, batch, anchor, beta)
        features, projected = tokens["features"], tokens["projected"]
        by_feature, by_token = torch.autograd.grad(value, [features, projected])
    patches = slice(register_tokens(model), None)
    before = patches if inner is None else slice(prefix_tokens(cast(Any, model.config.vision_config)), None)
    # A loss falls where the evidence is: Grad-CAM looks at what raises the answer, so its sign is turned.
    sign = 1.0 if explain == "answer" else -1.0
    # Both answers of a pair look at copies of one image, whose gradients add up.
    maps: dict[Method, np.ndarray] = {
        "gradcam": _square(_grad_cam(features[0, before].detach(), sign * by_feature.sum(0)[before])),
        "gradient": inner_border(_square(by_token.sum(0)[patches].abs().sum(-1))),
    }
    return GradientMaps(maps, float(value.detach()))


@dataclass(frozen=True)
class TokenMap:
    """One token of an answer: its text, its log-probability, and maps of that log-probability."""

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
    """Explain each token of an answer on its own, given the tokens before it: one backward pass a token.

    Args:
        limit: tokens explained, from the first on; the last one of a whole answer ends the turn.
    """
    batch = answer_batch(processor, image, question, [answer])
    patches = slice(register_tokens(model), None)
    made = []
    with torch.enable_grad(), _tokens_of(model) as tokens:
        log_probs = token_log_probs(model, batch)[0]
        for position in batch["completion_mask"][0, 1:].nonzero().flatten().tolist()[:limit]:
            value = log_probs[position]
            by_feature, by_token = torch.autograd.grad(
                value, [tokens["features"], tokens["projected"]], retain_graph=True
            )
            maps: dict[Method, np.ndarray] = {
                "gradcam": _square(_grad_cam(tokens["features"][0, patches].detach(), by_feature[0, patches])),
                "gradient": inner_border(_square(by_token[0, patches].abs().sum(-1))),
            }
            text = processor.tokenizer.decode(batch["input_ids"][0, position + 1])
            made.append(TokenMap(text, float(value.detach()), maps))
    return made


def feature_layer(model: LlavaForConditionalGeneration) -> int:
    """The hidden state that enters the projector, counted from the first block: 1 lies behind it."""
    layer = int(cast(int, model.config.vision_feature_layer))
    return layer if layer >= 0 else int(cast(Any, model.config.vision_config).num_hidden_layers) + 1 + layer


def explained_value(
    explain: Explain, log_probs: Tensor, batch: dict[str, Tensor], anchor: Tensor | None = None, beta: float = 0.1
) -> Tensor:
    """What is explained of a pair's (A,) log-probabilities, a scalar.

    Args:
        explain: see `gradient_map`.
        log_probs: of the answer, and for `dpo` of the rejected one.
        batch: of the answers.
        anchor: log-probabilities of both under the reference, for `dpo`.
        beta: of the DPO loss.
    """
    if explain == "answer":
        return log_probs[0]
    if explain == "sft":
        return -log_probs[0] / batch["completion_mask"][0].sum()
    assert anchor is not None
    ratio = log_probs - anchor
    return -torch.nn.functional.logsigmoid(beta * (ratio[0] - ratio[1]))


def answer_batch(
    processor: LlavaProcessor, image: Image.Image, question: str, answers: Sequence[str]
) -> dict[str, Tensor]:
    """Token ids of one question with each of several answers, right-padded.

    Returns:
        input_ids, attention_mask, completion_mask (A, S), and pixel_values (A, 3, height, width).
    """
    prompt = chat_prompt(processor, question)
    first = processor(text=[prompt], images=[image], return_tensors="pt", add_special_tokens=False)
    end = processor.tokenizer.eos_token
    tails = [processor.tokenizer(f"{a}{end}", add_special_tokens=False)["input_ids"] for a in answers]
    width, length = max(len(t) for t in tails), first["input_ids"].shape[1]
    pad = processor.tokenizer.pad_token_id
    ids = torch.full((len(answers), length + width), pad)
    seen = torch.zeros_like(ids)
    for i, tail in enumerate(tails):
        ids[i, :length] = first["input_ids"][0]
        ids[i, length : length + len(tail)] = torch.tensor(tail)
        seen[i, : length + len(tail)] = 1
    answered = seen.clone()
    answered[:, :length] = 0
    pixels = first["pixel_values"].expand(len(answers), -1, -1, -1)
    return {"input_ids": ids, "attention_mask": seen, "completion_mask": answered, "pixel_values": pixels}


def answer_log_probs(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probability of each answer: (A,)."""
    return token_log_probs(model, batch).sum(-1)


def token_log_probs(model: LlavaForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each token from the second on, 0 where it is not of an answer: (A, S - 1)."""
    inputs = {k: v.to(model.device) for k, v in batch.items()}
    logits = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["pixel_values"],
    ).logits
    # At least float32: a sum of log-probabilities in bf16 loses the answer's last tokens.
    log_probs = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    picked = log_probs.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    return picked * inputs["completion_mask"][:, 1:]


def inner_border(grid: np.ndarray) -> np.ndarray:
    """Replace border cells by their inner neighbours, as the paper's maps do: attention sinks sit there."""
    if min(grid.shape) < 3:
        return grid
    return np.pad(grid[1:-1, 1:-1], 1, mode="edge")


def enlarge(grid: np.ndarray, image_px: int) -> np.ndarray:
    """Bilinear interpolation of a (H, W) map to (image_px, image_px)."""
    sheet = Image.fromarray(grid.astype(np.float32))
    return np.asarray(sheet.resize((image_px, image_px), Image.Resampling.BILINEAR))


def seen_image(processor: LlavaProcessor, image: Image.Image) -> Image.Image:
    """What the encoder sees of an image: resized, cropped or padded by its own processor, colours as they were.

    Raises:
        DataError: the processor gives images that are not square, which maps cannot be laid over.
    """
    prepared = cast(Any, processor).image_processor(
        images=image, do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]
    if prepared.shape[1] != prepared.shape[2]:
        raise DataError(f"the image processor gives images of {prepared.shape[1:]} pixels; maps need square ones.")
    return Image.fromarray(prepared.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8))


def seen_mask(processor: LlavaProcessor, mask: np.ndarray) -> np.ndarray:
    """What the encoder sees of a (H, W) bool mask: its way is the image's, so no resize or crop is guessed.

    Returns:
        (image_px, image_px) bool, pixels of which at least half lies on the mask.
    """
    return np.asarray(seen_image(processor, Image.fromarray(mask).convert("RGB")))[..., 0] >= 128


def _grad_cam(features: Tensor, gradient: Tensor) -> Tensor:
    """(H*W, D) features and gradients -> (H*W,): channels weighted by their mean gradient, positive part."""
    weights = gradient.mean(dim=0, keepdim=True)
    return (weights * features).sum(-1).relu()


def _square(flat: Tensor) -> np.ndarray:
    side = round(flat.numel() ** 0.5)
    return flat.reshape(side, side).detach().float().cpu().numpy()


@contextmanager
def _tokens_of(model: LlavaForConditionalGeneration, layer: int | None = None) -> Iterator[dict[str, Any]]:
    """Catch what enters and leaves the projector, as leaves of the graph; the model is left as it was.

    With a layer, that hidden state of the encoder is caught in place of what enters the projector.
    """
    caught: dict[str, Any] = {}
    frozen = [(p, p.requires_grad) for p in model.parameters()]

    def enter(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught["features"] = inputs[0].detach().requires_grad_()
        return (caught["features"], *inputs[1:])

    def leave(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        caught["projected"] = output

    def ask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"output_hidden_states": True}  # LLaVA's classes ask for the feature layer alone

    def inside(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        caught["features"] = output.hidden_states[layer]

    projector = model.model.multi_modal_projector
    hooks = [projector.register_forward_hook(leave)]
    if layer is None:
        hooks.append(projector.register_forward_pre_hook(enter))
    else:
        tower = cast(torch.nn.Module, model.model.vision_tower)
        hooks += [tower.register_forward_pre_hook(ask, with_kwargs=True), tower.register_forward_hook(inside)]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    try:
        yield caught
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)


def explain_file(
    checkpoint: str | Path,
    image: Path,
    question: str,
    answer: str,
    explain: str = "answer",
    rejected: str | None = None,
    reference: str | Path | None = None,
) -> tuple[GradientMaps, Image.Image]:
    """Explain an MLLM's answer on an image file.

    Args:
        checkpoint: folder of the MLLM.
        image: the file.
        reference: folder of the parent, for `dpo`.

    Returns:
        The maps, and the image as the encoder sees it.

    Raises:
        DataError: the image cannot be decoded, or `dpo` lacks its rejected answer or its reference.
    """
    if explain not in EXPLAINS:
        raise DataError(f"explain is {explain!r}: it is one of {', '.join(EXPLAINS)}.")
    if explain == "dpo" and (rejected is None or reference is None):
        raise DataError("the dpo loss compares two answers under two models: give --rejected and --reference.")
    picture = open_image(image, "image")
    model, processor = load_mllm(checkpoint)
    parent = load_mllm(reference)[0].eval() if reference is not None else None
    made = gradient_map(model.eval(), processor, picture, question, answer, explain, rejected, parent)
    return made, seen_image(processor, picture)
