"""Ranking: the share of held-out preference pairs whose better answer an MLLM considers more probable."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from pivot_hub.data.synthetic import Pair
from pivot_hub.explain.gradcam import answer_batch, answer_log_probs
from pivot_hub.probes.result import ProbeResult, measure


@torch.no_grad()
def rank_pairs(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
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
    model.eval()
    started, right = time.monotonic(), []
    for pair, image in zip(pairs, images, strict=True):
        chosen, rejected = answer_log_probs(
            model, answer_batch(processor, image, pair.question, [pair.chosen, pair.rejected])
        ).tolist()
        right.append(float(chosen > rejected))
    return measure(
        "shapes/pairs",
        "ranked_right",
        np.array(right),
        protocol="summed log-probability of the better answer above that of the worse; chance 50",
        split=split,
        seed=seed,
        duration_s=time.monotonic() - started,
        **conditions,
    )
