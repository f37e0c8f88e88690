"""Answers that an MLLM samples, each question with random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, ProcessorMixin

from pivot_hub.mllm.chat_templates import chat_prompt
from pivot_hub.mllm.families import family_of
from pivot_hub.mllm.inputs import left_padded, process


def sample_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[str],
    images: Sequence[Image.Image],
    seeds: Sequence[int | Sequence[int]],
    answers: int,
    temperature: float = 1.0,
    max_tokens: int = 32,
) -> list[list[str | None]]:
    """Sample answers as `sample_ids` does, and return their texts; None for one that is not complete."""
    ends = end_ids(model, processor)
    sampled = sample_ids(model, processor, questions, images, seeds, answers, temperature, max_tokens)
    return [[answer_text(processor, ids) if ids[-1] in ends else None for ids in own] for own in sampled]


@torch.no_grad()
def sample_ids(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[str],
    images: Sequence[Image.Image],
    seeds: Sequence[int | Sequence[int]],
    answers: int,
    temperature: float = 1.0,
    max_tokens: int = 32,
) -> list[list[list[int]]]:
    """Sample answers to questions, each on one image, which share forward passes.

    They are drawn from all tokens but the image's. The random numbers of a question follow from its seed alone, so that
    its answers do not depend on the other questions, except where rounding decides between two tokens; torch's own
    random numbers stay as they are.

    Args:
        model: The MLLM.
        processor: Processor of the model.
        questions: The Q questions.
        images: Image of each question, of any size.
        seeds: Seed of each question: a whole number from 0, or several.
        answers: Number of answers to each question.
        temperature: Temperature of the draws, above 0.
        max_tokens: Largest number of tokens of an answer.

    Returns:
        For each question the token ids of its answers, with the token that ends each, which an answer lacks that is not
        complete after `max_tokens` tokens.
    """
    model.eval()
    prompts = [
        process(processor, chat_prompt(processor, question), [image])
        for question, image in zip(questions, images, strict=True)
    ]
    texts = [prompt for prompt in prompts for _ in range(answers)]
    inputs = {name: value.to(model.device) for name, value in left_padded(processor, texts).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    length = inputs["input_ids"].shape[1]
    numbers = np.concatenate([np.random.default_rng(seed).random((answers, max_tokens)) for seed in seeds])
    ends = end_ids(model, processor)
    generator: Any = model
    generated = generator.generate(
        **inputs,
        max_new_tokens=max_tokens,
        do_sample=False,  # the draws are those of the logits processor, which leaves one token
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        repetition_penalty=1.0,
        logits_processor=[_Draws(torch.from_numpy(numbers), length, temperature)],
        suppress_tokens=[family_of(model.config).image_token_id(model.config)],
        eos_token_id=ends,
        pad_token_id=cast(Any, processor).tokenizer.pad_token_id,
        use_cache=True,  # the config of a trained model can say that it has no cache
    )
    sampled = [_up_to_end(row, ends) for row in generated[:, length:].tolist()]
    return [sampled[i : i + answers] for i in range(0, len(sampled), answers)]


def answer_text(processor: ProcessorMixin, ids: Sequence[int]) -> str:
    """Decode an answer without the tokens that end it."""
    text: str = cast(Any, processor).tokenizer.decode(ids, skip_special_tokens=True)
    return text.strip()


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Return a row of generated ids up to the first one that ends it, without the padding behind."""
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids)) + 1]


def end_ids(model: PreTrainedModel, processor: ProcessorMixin) -> list[int]:
    """Return the ids that end an answer: those of the model's generation config, and the tokenizer's."""
    of_model = cast(Any, model).generation_config.eos_token_id
    own = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    return sorted({*own, cast(Any, processor).tokenizer.eos_token_id})


class _Draws(LogitsProcessor):
    """Leaves the token of each row whose share of the cumulative probabilities holds the row's random number.

    Args:
        numbers: Random numbers from 0 to below 1 (rows, steps).
        length: Number of tokens of the prompts.
        temperature: Temperature of the draws.
    """

    def __init__(self, numbers: Tensor, length: int, temperature: float) -> None:
        self.numbers, self.length, self.temperature = numbers, length, temperature

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        number = self.numbers[:, input_ids.shape[1] - self.length].to(scores.device)[:, None]
        upper = (scores.double() / self.temperature).softmax(-1).cumsum(-1)  # (rows, tokens)
        token = torch.searchsorted(upper, number * upper[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
