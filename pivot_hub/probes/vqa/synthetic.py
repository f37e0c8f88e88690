"""VQA on the synthetic Shapes dataset: the share of held-out questions whose answer matches exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from pivot_hub.data.synthetic import KINDS, Question
from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.mllm.inputs import ProcessedText, left_padded, process
from pivot_hub.probes.result import ProbeResult, measure


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    questions: Sequence[str],
    images: Sequence[Image.Image | Sequence[Image.Image]] | None = None,
    max_new_tokens: int = 16,
    batch: int = 64,
) -> list[str]:
    """Answer each question greedily.

    Args:
        model: An MLLM, or a language model alone.
        processor: Processor or tokenizer of the model.
        questions: Texts of the questions.
        images: For each question an image or a list of images, which may be empty. None for questions without images.
        max_new_tokens: Largest number of tokens of an answer.
        batch: Number of questions in one forward pass.
    """
    model.eval()
    answers: list[str] = []
    image_lists = [[i] if isinstance(i, Image.Image) else list(i) for i in images or [[]] * len(questions)]
    for start in range(0, len(questions), batch):
        part = slice(start, start + batch)
        batch_items = zip(questions[part], image_lists[part], strict=True)
        texts = [
            _processed(processor, chat_prompt(processor, question, len(own)), own) for question, own in batch_items
        ]
        inputs = {name: value.to(model.device) for name, value in left_padded(processor, texts).items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        generated = cast(Any, model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(new, skip_special_tokens=True)
    return [a.strip() for a in answers]


def _processed(
    processor: ProcessorMixin | PreTrainedTokenizerBase, text: str, images: Sequence[Image.Image]
) -> ProcessedText:
    """Prepare one text and its images; a text without images needs a tokenizer only."""
    if images:
        return process(cast(ProcessorMixin, processor), text, images)
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    return ProcessedText(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer_questions(
    model: PreTrainedModel,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    questions: Sequence[Question],
    subjects: Sequence[Image.Image] | Sequence[str],
    conditions: dict[str, Any],
    split: str = "test",
    seed: int = 0,
) -> list[ProbeResult]:
    """Measure exact-match accuracy over all questions and by kind; an answer is right if it is the dataset's own.

    Args:
        model: An MLLM, or a language model alone.
        processor: Processor or tokenizer of the model.
        questions: Questions of the synthetic Shapes dataset.
        subjects: What each question is about: an image, or for a language model the text of a scan.
        conditions: Fields of the results: encoder, encoder_sha256, feature_layer, partner.
        split: Split that the questions are from.
        seed: Seed of the bootstrap.
    """
    started = time.monotonic()
    if isinstance(subjects[0], str):
        texts = [f"{scan}\n{q.text}" for scan, q in zip(subjects, questions, strict=True)]
        answers = generate_answers(model, processor, texts)
    else:
        images = cast(Sequence[Image.Image], subjects)
        answers = generate_answers(model, processor, [q.text for q in questions], images)
    right = np.array([float(a.casefold() == q.answer.casefold()) for a, q in zip(answers, questions, strict=True)])
    return measure_by_kind(
        "exact_match",
        right,
        questions,
        protocol="greedy answer equals the true one",
        split=split,
        seed=seed,
        duration_s=time.monotonic() - started,
        **conditions,
    )


def measure_by_kind(metric: str, scores: np.ndarray, questions: Sequence[Question], **fields: Any) -> list[ProbeResult]:
    """Return the mean score over all questions, and of each kind of question.

    Args:
        metric: Name of the metric.
        scores: Score of each question, from 0 to 1, (N,).
        questions: The N questions.
        fields: Further fields of the results, as `measure` takes them.
    """
    return [
        measure(f"shapes/vqa/{kind}", metric, scores[[kind in ("all", q.kind) for q in questions]], **fields)
        for kind in ("all", *KINDS)
    ]
