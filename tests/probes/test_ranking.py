"""Probabilities of answers: batches of questions against one plain call of the MLLM for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pivot_hub.data.synthetic import KINDS, ShapesDataset
from pivot_hub.mllm.load import load_mllm
from pivot_hub.probes.ranking import rank_pairs, true_answer_probability
from pivot_hub.probes.run import probe_pairs, probe_questions

CONDITIONS = {"feature_layer": -2, "encoder": "e", "encoder_sha256": "0", "partner": "p"}
QUESTIONS = 20  # more than a batch


def plain_log_prob(model: Any, processor: Any, image: Any, question: str, answer: str) -> float:
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    inputs = processor(
        text=[f"{prompt}{answer}<|im_end|>"], images=[[image]], return_tensors="pt", add_special_tokens=False
    )
    length = len(processor.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(**inputs).logits[0, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])
    return float(log_probs[-length:].sum())


def test_probabilities_and_ranks_equal_those_of_plain_calls(trained: Path) -> None:
    model, processor = load_mllm(trained / "2-instruct")
    model.eval()
    dataset = ShapesDataset()
    images, questions = probe_questions(dataset, "test", QUESTIONS)
    results = true_answer_probability(model, processor, questions, images, CONDITIONS)
    assert [result.task for result in results] == [f"shapes/vqa/{kind}" for kind in ("all", *KINDS)]
    plain = np.exp(
        [plain_log_prob(model, processor, i, q.text, q.answer) for i, q in zip(images, questions, strict=True)]
    )
    for result, kind in zip(results, ("all", *KINDS), strict=True):
        own = plain[[kind in ("all", q.kind) for q in questions]]
        assert result.value == pytest.approx(100 * own.mean(), rel=1e-3)
        assert result.n == len(own)

    images, pairs = probe_pairs(dataset, "test", QUESTIONS)
    margins = np.array(
        [
            plain_log_prob(model, processor, i, p.question, p.chosen)
            - plain_log_prob(model, processor, i, p.question, p.rejected)
            for i, p in zip(images, pairs, strict=True)
        ]
    )
    assert np.abs(margins).min() > 1e-4  # no pair is decided by rounding
    assert rank_pairs(model, processor, pairs, images, CONDITIONS).value == 100 * (margins > 0).mean()
