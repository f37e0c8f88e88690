"""Several answers to one question with their rewards, which GRPO learns from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, ProcessorMixin

from pivot_hub.errors import DataError
from pivot_hub.explain.image_maps import image_family
from pivot_hub.mllm.chat_templates import answer_end, chat_prompt
from pivot_hub.mllm.inputs import KINDS_OF_TOKENS, join_images, process
from pivot_hub.mllm.sampling import answer_text, sample_ids
from pivot_hub.training.rewards import exact_match

ANSWERS = 8  # as many as TRL's GRPOConfig generates for each prompt
MAX_TOKENS = 32  # of an answer, as in the shipped recipes of GRPO
# Keys of a batch whose values belong to tokens; those of all others belong to images.
OF_TOKENS = frozenset({"input_ids", "attention_mask", "completion_mask", *KINDS_OF_TOKENS})
Reward = Callable[[Sequence[str]], Sequence[float | None]]


@dataclass(frozen=True)
class AnswerGroup:
    """Answers to one question on one image, and the reward of each.

    Args:
        texts: The G answers.
        ids: Token ids of each answer, with the token that ends it, which an answer that was cut off lacks.
        rewards: Reward of each answer.

    Raises:
        DataError: There are fewer than two answers, or not as many rewards.
    """

    texts: list[str]
    ids: list[list[int]]
    rewards: list[float]

    def __post_init__(self) -> None:
        check_size(len(self.ids))
        if len(self.rewards) != len(self.ids):
            raise DataError(f"{len(self.ids)} answers have {len(self.rewards)} rewards: give each its reward.")

    @classmethod
    def of_texts(cls, processor: ProcessorMixin, texts: Sequence[str], rewards: Sequence[float]) -> AnswerGroup:
        """Make a group of answers that are given as texts, each of which is complete."""
        return cls(list(texts), answer_ids(processor, texts), list(rewards))

    @property
    def mean_reward(self) -> float:
        return float(np.mean(self.rewards))

    @property
    def has_gradient(self) -> bool:
        """Whether rewards differ; otherwise all advantages are zero, and so is the gradient."""
        return len(set(self.rewards)) > 1

    def advantages(self) -> Tensor:
        """Return the advantage of each answer (G,): its reward less their mean, divided by their deviation plus 1e-4.

        The deviation is that of a sample, with G - 1. This is TRL's `scale_rewards="group"`, its default.
        """
        rewards = torch.tensor(self.rewards, dtype=torch.float32)
        return (rewards - rewards.mean()) / (rewards.std() + 1e-4)

    def check_gradient(self) -> None:
        """Raise an error where the answers have no gradient.

        Raises:
            DataError: All answers have the same reward.
        """
        if not self.has_gradient:
            raise DataError(
                f"all {len(self.rewards)} answers have the reward {self.rewards[0]:g} (the first: {self.texts[0]!r}), "
                "so the GRPO loss has no gradient: draw others with another --seed or more of them with "
                "--generations, or ask a question that the model answers right only sometimes."
            )


def check_size(answers: int) -> None:
    """Raise an error for fewer answers than a group has.

    Raises:
        DataError: There are fewer than two.
    """
    if answers < 2:
        raise DataError(
            f"{answers} answer(s): GRPO compares the answers to one question with each other; give two or more "
            "(--generations)."
        )


def answer_ids(processor: ProcessorMixin, answers: Sequence[str]) -> list[list[int]]:
    """Tokenise answers, each with the text that ends it in the chat template."""
    tokenizer, end = cast(Any, processor).tokenizer, answer_end(processor)
    return [tokenizer(f"{answer}{end}", add_special_tokens=False)["input_ids"] for answer in answers]


def right_answer(question: str, answer: str) -> Reward:
    """Return the reward of an answer to a question: 1 if it is the right one by `rewards.exact_match`, otherwise 0."""

    def reward(texts: Sequence[str]) -> list[float | None]:
        return exact_match(texts, solution=[answer] * len(texts), prompts=[question] * len(texts))

    return reward


def draw_group(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image,
    question: str,
    reward: Reward,
    answers: int = ANSWERS,
    seed: int | Sequence[int] = 0,
    max_tokens: int = MAX_TOKENS,
) -> AnswerGroup:
    """Generate answers to a question as TRL's GRPOTrainer does by default, and score them.

    They are drawn at temperature 1 from all tokens but the image's.

    Args:
        model: The MLLM.
        processor: Processor of the model.
        image: Image of any size.
        question: The user's question.
        reward: Function that returns the reward of each answer.
        answers: Number of answers.
        seed: Seed of the answers: one whole number, or several. torch's own random numbers stay as they are.
        max_tokens: Largest number of tokens of an answer.

    Raises:
        DataError: There are fewer than two answers, or the reward does not apply to one.
    """
    check_size(answers)
    image_family(model.config)  # refuses an MLLM without image tokens
    (ids,) = sample_ids(model, processor, [question], [image], [seed], answers, max_tokens=max_tokens)
    texts = [answer_text(processor, own) for own in ids]
    rewards = [None if value is None else float(value) for value in reward(texts)]
    scored = [value for value in rewards if value is not None and math.isfinite(value)]
    if len(scored) < len(rewards):
        raise DataError(
            f"rewards of answers to {question!r} are {rewards}: give a reward that is a finite number for each answer, "
            "and a right answer that is not empty."
        )
    return AnswerGroup(texts, ids, scored)


def completion_batch(
    processor: ProcessorMixin, image: Image.Image, question: str, completions: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Join one question with the token ids of each of several answers, padded on the right.

    Args:
        processor: Processor of the MLLM.
        image: Image of any size.
        question: The user's question.
        completions: Token ids of the A answers.

    Returns:
        input_ids, attention_mask, completion_mask (A, S), further kinds of tokens (A, S) that the model takes, and the
        image's tensors for A copies of it.
    """
    prompt = process(processor, chat_prompt(processor, question), [image])
    width, length = max(len(ids) for ids in completions), len(prompt.ids)
    input_ids = torch.full((len(completions), length + width), cast(Any, processor).tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, ids in enumerate(completions):
        input_ids[i, :length] = torch.tensor(prompt.ids)
        input_ids[i, length : length + len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[i, : length + len(ids)] = 1
    completion_mask = attention_mask.clone()
    completion_mask[:, :length] = 0
    kinds = {name: torch.zeros_like(input_ids) for name in prompt.kinds}
    for name, kind in prompt.kinds.items():
        kinds[name][:, :length] = torch.tensor(kind)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        **kinds,
        **join_images([prompt.images] * len(completions)),
    }


def join_batches(batches: Sequence[dict[str, Tensor]], padding_id: int) -> dict[str, Tensor]:
    """Join batches of `completion_batch`, padded on the right to the longest with a token that nothing attends to."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    joined = join_images([{k: v for k, v in batch.items() if k not in OF_TOKENS} for batch in batches])
    for key in OF_TOKENS & set(batches[0]):
        value = padding_id if key == "input_ids" else 0
        rows = [functional.pad(batch[key], (0, longest - batch[key].shape[1]), value=value) for batch in batches]
        joined[key] = torch.cat(rows)
    return joined
