"""What answers cost that grpo and rloo generate: how often they are generated, and each token of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from pivot_hub.mllm.families import family_of

HALF, FLOAT32 = 2, 4  # bytes


@dataclass(frozen=True)
class Schedule:
    """How often answers are generated and trained on, as TRL's trainers do it.

    Args:
        answers: Answers of each prompt, `num_generations`.
        batches: Batches of a process that are generated at once, `steps_per_generation`.
        uses: Times that each answer is trained on, `num_iterations`.
        old_policy: Whether the log-probabilities of the policy that generated are computed before training.
        reference: Whether those of a reference are, because `beta` is not 0.
    """

    answers: int
    batches: int
    uses: int
    old_policy: bool
    reference: bool

    @classmethod
    def of(cls, stage: str, argument: Callable[[str], Any], at_once: int, accumulation: int) -> Schedule:
        """Read it from the arguments of a trainer.

        Args:
            stage: grpo or rloo.
            argument: Function that returns the value of a trainer's argument.
            at_once: Answers that all processes train on at a time.
            accumulation: Batches of a process in an optimizer step.
        """
        batches = argument("steps_per_generation")
        if batches is None:
            generated = argument("generation_batch_size")
            batches = accumulation if generated is None else generated // at_once
        uses = argument("num_iterations")
        # GRPOTrainer computes them only where a step's answers may be of an earlier policy; RLOOTrainer always does.
        stale = accumulation % (batches * uses) != 0
        return cls(argument("num_generations"), batches, uses, stage == "rloo" or stale, argument("beta") != 0)

    def batches_of_an_epoch(self, prompts: int, at_once: int) -> int:
        """Return the batches of each process in an epoch; prompts that fill no generation are left out."""
        generations = prompts // (at_once * self.batches // self.answers)
        return generations * self.batches * self.uses


@dataclass(frozen=True)
class Decoding:
    """What one token of one answer costs in the language model.

    Args:
        weights: Weights that a token is multiplied with; all answers that are generated at once share their reading.
        flops: FLOPs of a token without attention.
        flops_of_context: FLOPs of a token's attention to one token before it.
        cached: Numbers that the cache of keys and values holds for a token.
    """

    weights: int
    flops: int
    flops_of_context: int
    cached: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Decoding:
        """Count it on a model, which may be on the meta device."""
        config: Any = model.config.get_text_config()
        language: nn.Module = getattr(model.model, family_of(model.config).language)
        table, head = (cast(Any, m).weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))
        weights = head.numel() + sum(p.numel() for p in language.parameters() if p.ndim == 2 and p is not table)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = config.num_hidden_layers
        return cls(
            weights=weights,
            flops=2 * weights,
            flops_of_context=4 * layers * config.num_attention_heads * width,
            cached=2 * layers * config.num_key_value_heads * width,
        )

    def flops_of_answer(self, before: float, answer: float) -> float:
        """Return the FLOPs of an answer behind a number of tokens; its first token is the prompt's, of its prefill."""
        tokens = answer - 1
        contexts = tokens * before + tokens * (tokens + 1) / 2
        return tokens * self.flops + contexts * self.flops_of_context

    def bytes_of_answers(
        self, count: float, before: float, answer: float, weight_bytes: int, cache_bytes: int
    ) -> float:
        """Return the bytes that are read to generate a number of answers side by side.

        Args:
            count: Number of answers.
            before: Tokens before each answer.
            answer: Tokens of each answer.
            weight_bytes: Bytes that the reading of a weight moves.
            cache_bytes: Bytes of a number in the cache.
        """
        tokens = answer - 1
        contexts = tokens * before + tokens * (tokens + 1) / 2
        return tokens * self.weights * weight_bytes + count * contexts * self.cached * cache_bytes

    def cache(self, count: int, tokens: float, cache_bytes: int) -> int:
        """Return the bytes of the cache of a number of sequences."""
        return math.ceil(count * tokens * self.cached * cache_bytes)


def weight_traffic(half_weights: bool, autocast: bool) -> int:
    """Return the bytes that are moved to multiply with a weight: autocast reads it, and writes and reads its copy."""
    if half_weights:
        return HALF
    return FLOAT32 + 2 * HALF if autocast else FLOAT32
