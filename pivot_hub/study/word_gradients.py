"""How the gradient of an answer on the image divides among kinds of words, and among error types."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.data.synthetic import ERROR_TYPES, KINDS, ErrorType, ShapesDataset, draw_fact
from pivot_hub.explain.gradcam import gradient_map, token_maps
from pivot_hub.explain.word_kinds import token_kinds
from pivot_hub.probes.result import ProbeResult, measure
from pivot_hub.probes.run import FIRST_SCENE, probe_scenes

WORD_KINDS = ("seen", "known", "other")  # words that only the image tells, words of a fact, and all others


@dataclass(frozen=True)
class _Example:
    """One test question whose answer has two sentences: what the image shows, and a fact that is known without it.

    Args:
        image: Image of the scene.
        question: Question about the scene.
        chosen: True answer, with the fact behind it.
        rejected: Wrong answer by its error type, in the order of `ERROR_TYPES`.
        word_kinds: Kind of each word of the true answer, out of `WORD_KINDS`.
    """

    image: Image.Image
    question: str
    chosen: str
    rejected: dict[ErrorType, str]
    word_kinds: list[str]


def word_gradients(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: ShapesDataset,
    count: int,
    conditions: dict[str, Any],
) -> list[ProbeResult]:
    """Measure how an answer's gradient on the image tokens divides among kinds of words, and among error types.

    The size of a gradient is its L1 norm over image tokens and channels at the projector's output, as in the paper.
    For a word it is the gradient of the log-probability of its tokens; 100 is the mean token of the answer. For a
    preference pair it is the gradient of the DPO loss with the model as its own reference, so that every pair has the
    same weight; 100 is the pair whose rejected answer has a visual error.

    Args:
        model: MLLM that is measured.
        processor: Processor of the MLLM.
        dataset: Dataset of the scenes.
        count: Number of test scenes; each has one question, and the kinds of question take turns.
        conditions: Values of encoder, encoder_sha256, feature_layer and partner in the results.

    Returns:
        One result for each kind of word, and one for each error type except the visual one.
    """
    started = time.monotonic()
    by_word_kind, by_error_type = [], []
    for example in _draw_examples(dataset, count):
        by_word_kind.append(_token_gradients(model, processor, example))
        by_error_type.append(_pair_gradients(model, processor, example))
    shared = {**conditions, "seed": 0, "duration_s": time.monotonic() - started}
    return [*_word_results(np.array(by_word_kind), shared), *_pair_results(np.array(by_error_type), shared)]


def _draw_examples(dataset: ShapesDataset, count: int) -> Iterator[_Example]:
    """Draw one question on each test scene, with a rejected answer of every error type."""
    scenes = probe_scenes(dataset, "test", count)
    for i, (scene, rendered) in enumerate(zip(scenes.scenes, scenes.rendered, strict=True)):
        pairs = {}
        for error_type in ERROR_TYPES:
            # Each draw starts from the same random streams, so the pairs differ in the rejected answer alone.
            pair_rng = dataset.scene_rng("test", FIRST_SCENE + i, 7)
            fact_rng = dataset.scene_rng("test", FIRST_SCENE + i, 8)
            pairs[error_type] = scene.pair_with_fact(KINDS[i % len(KINDS)], "question", error_type, pair_rng, fact_rng)
        fact = draw_fact(dataset.scene_rng("test", FIRST_SCENE + i, 8))
        visual = pairs["visual"]
        true_answer, wrong_answer = (text.removesuffix(f" {fact.true}") for text in (visual.chosen, visual.rejected))
        yield _Example(
            image=rendered.image,
            question=visual.question,
            chosen=visual.chosen,
            rejected={error_type: pair.rejected for error_type, pair in pairs.items()},
            word_kinds=[
                *_kinds_of_words(true_answer, wrong_answer, "seen"),
                *_kinds_of_words(fact.true, fact.wrong, "known"),
            ],
        )


def _token_gradients(model: PreTrainedModel, processor: ProcessorMixin, example: _Example) -> list[list[float]]:
    """Summed gradient size and number of tokens for each kind of word: (3, 2), in the order of `WORD_KINDS`."""
    maps = token_maps(model, processor, example.image, example.question, example.chosen, limit=64)
    sizes = [float(token.maps["gradient"].sum()) for token in maps]
    # A word has the space before it, which may be a token of its own. The tokens that end the turn are of no kind.
    words = zip(re.finditer(r"\s*\S+", example.chosen), example.word_kinds, strict=True)
    kinds = token_kinds(processor, example.chosen, [(*word.span(), kind) for word, kind in words])
    return [
        [sum(size for size, of_token in zip(sizes, kinds, strict=True) if of_token == kind), kinds.count(kind)]
        for kind in WORD_KINDS
    ]


def _pair_gradients(model: PreTrainedModel, processor: ProcessorMixin, example: _Example) -> list[float]:
    """Gradient size of the DPO loss for each error type: (3,), in the order of `ERROR_TYPES`."""
    sizes = []
    for rejected in example.rejected.values():
        explained = gradient_map(
            model, processor, example.image, example.question, example.chosen, "dpo", rejected, reference=model
        )
        sizes.append(float(explained.maps["gradient"].sum()))
    return sizes


def _word_results(sums: np.ndarray, shared: dict[str, Any]) -> list[ProbeResult]:
    """One result for each kind of word, from summed sizes and numbers of tokens (N, 3, 2)."""
    mean_token = sums[:, :, 0].sum() / sums[:, :, 1].sum()
    return [
        measure(
            f"shapes/gradient/{kind} words",
            "relative_gradient",
            sums[:, j] / (mean_token, 1),
            protocol="L1 norm at the projector's output of a token's log-probability; 100 is the mean token",
            **shared,
        )
        for j, kind in enumerate(WORD_KINDS)
    ]


def _pair_results(sizes: np.ndarray, shared: dict[str, Any]) -> list[ProbeResult]:
    """One result for each error type except the visual one, the first column of the sizes (N, 3)."""
    return [
        measure(
            f"shapes/gradient/{error_type} pairs",
            "relative_gradient",
            sizes[:, [j, 0]],
            protocol="L1 norm at the projector's output of the DPO loss; 100 is the same pair with a visual error",
            **shared,
        )
        for j, error_type in enumerate(ERROR_TYPES)
        if error_type != "visual"
    ]


def _kinds_of_words(true: str, wrong: str, kind: str) -> list[str]:
    """For each word of a true sentence: `kind` if the wrong sentence differs there, else `other`.

    Sentences of as many words are compared word by word. Otherwise a word differs if the wrong sentence lacks it.
    """
    words, wrong_words = true.split(), wrong.split()
    if len(words) == len(wrong_words):
        differs = [a != b for a, b in zip(words, wrong_words, strict=True)]
    else:
        differs = [word not in wrong_words for word in words]
    return [kind if different else "other" for different in differs]
