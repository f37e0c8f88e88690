"""VQA: the share of held-out questions an MLLM answers in the right words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase

from pivot_hub.data.synthetic import KINDS, Question
from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.probes.result import ProbeResult, measure


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: LlavaProcessor | PreTrainedTokenizerBase,
    questions: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
    max_new_tokens: int = 16,
    batch: int = 64,
) -> list[str]:
    """Answer each question greedily, on its image, or its several or none, where there are images."""
    model.eval()
    answers: list[str] = []
    shown = [[i] if isinstance(i, Image.Image) else list(i) for i in images or [[]] * len(questions)]
    for start in range(0, len(questions), batch):
        part = slice(start, start + batch)
        asked = zip(questions[part], shown[part], strict=True)
        pictures = [i for own in shown[part] for i in own]
        inputs = processor(
            text=[chat_prompt(processor, question, len(own)) for question, own in asked],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            **({"images": pictures} if pictures else {}),
        ).to(model.device)
        if pictures:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        made = cast(Any, model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return [a.strip() for a in answers]


def answer_questions(
    model: PreTrainedModel,
    processor: LlavaProcessor | PreTrainedTokenizerBase,
    questions: Sequence[Question],
    shown: Sequence[Image.Image] | Sequence[str],
    conditions: dict[str, Any],
    split: str = "test",
    seed: int = 0,
) -> list[ProbeResult]:
    """Exact-match accuracy over all questions and by kind; an answer is right in the words of the world.

    Args:
        model: an MLLM, or a language model alone.
        processor: its processor or tokenizer.
        questions: of the built-in world.
        shown: what each question is about: an image, or for a language model a scan in words.
        conditions: encoder, encoder_sha256, feature_layer, partner of the results.
    """
    started = time.monotonic()
    if isinstance(shown[0], str):
        said = generate_answers(model, processor, [f"{s}\n{q.text}" for s, q in zip(shown, questions, strict=True)])
    else:
        images = cast(Sequence[Image.Image], shown)
        said = generate_answers(model, processor, [q.text for q in questions], images)
    right = np.array([float(s.casefold() == q.answer.casefold()) for s, q in zip(said, questions, strict=True)])
    duration = time.monotonic() - started
    return [
        measure(
            f"shapes/vqa/{kind}",
            "exact_match",
            right[[kind in ("all", q.kind) for q in questions]],
            protocol="greedy answer equals the true one",
            split=split,
            seed=seed,
            duration_s=duration,
            **conditions,
        )
        for kind in ("all", *KINDS)
    ]
