"""Whether an MLLM computes in rows of trees what it computes in padded rows, found by running both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from pivot_hub.errors import TrainingError, shown_text
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.inputs import placeholder_of, positions_of
from pivot_hub.training.pair_collator import PairCollator
from pivot_hub.training.tree_layout import ATTENTION

# Largest difference between the layouts that is rounding, in float32 and in 16 bits.
TOLERANCE, TOLERANCE_HALF = 1e-4, 0.05
SHORT_WINDOW = 3  # so that the small rows exceed it
TEXTS = (
    ("What is at the top, and how many are there?", "Two red stars.", "A large blue circle, on the left."),
    ("Where?", "At the bottom of the image, I think.", "No."),
)


def tree_problem(model: PreTrainedModel, processor: ProcessorMixin, max_length: int | None) -> str | None:
    """Return why a model cannot run trees, or None if it can.

    Two small pairs with images go through the model as trees and as TRL pads them. What a model does with trees shows
    here, whatever it is called: whether attention gets the layout, whether anything besides attention passes from one
    token to the next, and whether tokens of an image attend to each other.

    Args:
        model: The MLLM after `use_trees`.
        processor: Its processor.
        max_length: Largest number of tokens of a row.

    Raises:
        TrainingError: Model and processor do not belong together.
    """
    if any(weight.is_meta or not weight.numel() for weight in model.parameters()):  # elsewhere, as under ZeRO-3
        return None
    language: Any = getattr(model.model, family_of(model.config).language)
    name = type(language).__name__
    tolerance = TOLERANCE if language.dtype == torch.float32 else TOLERANCE_HALF
    difference = _difference(model, processor)
    if isinstance(difference, str) or not difference <= tolerance:
        apart = difference if isinstance(difference, str) else f"{difference:.1e} apart, relative to their norm"
        return f"{name} computes other hidden states for two answers behind one prompt than for each alone ({apart})"
    window = getattr(language.config, "sliding_window", None)
    if window is None or (max_length is not None and max_length <= window):
        return None
    with _short_window(language):
        difference = _difference(model, processor)
    if isinstance(difference, str) or not difference <= tolerance:
        return (
            f"{name} has a sliding window of {window} tokens, which works otherwise for two answers behind one prompt"
        )
    return None


def _difference(model: PreTrainedModel, processor: ProcessorMixin) -> float | str:
    """Return the norm of the difference of hidden states, relative to their norm, or what failed."""
    rows = _small_rows(processor)
    device = next(model.parameters()).device
    padded = DataCollatorForVisionPreference(processor)(deepcopy(rows))
    answers = padded.pop("completion_mask")
    trees = PairCollator(processor, positions_of(model))(rows)
    taken = trees.pop("completion_mask").bool()
    trees["input_ids"] = trees.pop("tree_ids")
    inner: Any = model.model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            try:
                expected = inner(**_to(padded, device), use_cache=False).last_hidden_state[answers.bool()].float()
            except ValueError as error:
                raise TrainingError(
                    f"model and processor do not belong together ({error}); give the model's own processor."
                ) from error
            try:
                actual = inner(**_to(trees, device), use_cache=False).last_hidden_state[taken].float()
            except Exception as error:  # whatever a model of another kind raises
                return shown_text(f"{type(error).__name__}: {error}")
    finally:
        model.train(training)
    return float((actual - expected).norm() / expected.norm())


def _small_rows(processor: ProcessorMixin) -> list[dict[str, Any]]:
    """Return two preference rows with small images of noise, as messages where there is a chat template."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for (question, chosen, rejected), size in zip(TEXTS, ((48, 64), (64, 48)), strict=True):
        prompt = f"{placeholder_of(processor)}{question}"
        row: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if processor.chat_template is not None:
            row = {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": chosen}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": rejected}]}],
            }
        rows.append({"images": [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))], **row})
    return rows


def _to(batch: Any, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


@contextmanager
def _short_window(language: Any) -> Iterator[None]:
    """Shorten the sliding windows of a language model, where it is in a config or in its layers."""
    owners = [o for o in (language.config, *language.modules()) if isinstance(getattr(o, "sliding_window", None), int)]
    windows = [owner.sliding_window for owner in owners]
    for owner in owners:
        owner.sliding_window = SHORT_WINDOW
    try:
        yield
    finally:
        for owner, window in zip(owners, windows, strict=True):
            owner.sliding_window = window


def language_attention(model: PreTrainedModel) -> str:
    """Return the attention of the language model, as the user chose it."""
    language: Any = getattr(model.model, family_of(model.config).language)
    attention = str(language.config._attn_implementation)
    return "sdpa" if attention == ATTENTION else attention
