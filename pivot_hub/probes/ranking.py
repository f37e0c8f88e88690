"""What an MLLM considers probable: the better answer of a preference pair, and the true answer to a question."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.synthetic import Pair, Question
from pivot_hub.explain.answer_group import join_batches
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.probes.vqa.synthetic import measure_by_kind

BATCH = 16  # preference pairs or questions in a forward pass


def rank_pairs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[Pair],
    images: Sequence[Image.Image],
    conditions: dict[str, Any],
    split: str = "test",
    seed: int = 0,
) -> ProbeResult:
    """Compare the summed log-probabilities of the two answers of each preference pair.

    Args:
        model: The MLLM.
        processor: Processor of the MLLM.
        pairs: Preference pairs of the synthetic Shapes dataset.
        images: One image for each pair.
        conditions: Fields of the result: encoder, encoder_sha256, feature_layer, partner.
        split: Split that the pairs are from.
        seed: Seed of the bootstrap.
    """
    started = time.monotonic()
    texts = [(pair.question, (pair.chosen, pair.rejected)) for pair in pairs]
    chosen, rejected = _log_probs(model, processor, texts, images).T
    return measure(
        "shapes/pairs",
        "ranked_right",
        (chosen > rejected).astype(float),
        protocol="summed log-probability of the better answer above that of the worse; chance 50",
        split=split,
        seed=seed,
        duration_s=time.monotonic() - started,
        **conditions,
    )


def true_answer_probability(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    images: Sequence[Image.Image],
    conditions: dict[str, Any],
    split: str = "test",
    seed: int = 0,
) -> list[ProbeResult]:
    """Measure the probability of the true answer, over all questions and by kind.

    Answers that are drawn at temperature 1 are the true one with this probability. So it is the mean of the reward
    `exact_match`, which GRPO and RLOO raise, without the noise of drawing and without answers in other words.

    Args:
        model, processor, images, conditions, split, seed: As in `rank_pairs`.
        questions: Questions of the synthetic Shapes dataset.
    """
    started = time.monotonic()
    texts = [(question.text, (question.answer,)) for question in questions]
    probabilities = np.exp(_log_probs(model, processor, texts, images)[:, 0])
    return measure_by_kind(
        "true_answer_probability",
        probabilities,
        questions,
        protocol="probability of the true answer and the end of the turn, at temperature 1",
        split=split,
        seed=seed,
        duration_s=time.monotonic() - started,
        **conditions,
    )


@torch.no_grad()
def _log_probs(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[tuple[str, tuple[str, ...]]],
    images: Sequence[Image.Image],
) -> np.ndarray:
    """Summed log-probabilities (questions, answers) of as many answers to each question about an image."""
    model.eval()
    tokenizer: Any = processor.tokenizer
    rows = list(zip(texts, images, strict=True))
    parts = []
    for start in range(0, len(rows), BATCH):
        batches = [
            answer_batch(processor, image, question, answers)
            for (question, answers), image in rows[start : start + BATCH]
        ]
        log_probs = answer_log_probs(model, join_batches(batches, tokenizer.pad_token_id))
        parts.append(log_probs.view(len(batches), -1).double().cpu().numpy())
    return np.concatenate(parts)
