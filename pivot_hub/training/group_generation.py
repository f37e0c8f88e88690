"""Generation of several answers to each prompt, in which image and prompt run once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from pivot_hub.mllm.inputs import KINDS_OF_TOKENS

# Arguments of `generate` with a row for each sequence; other tensors belong to the images.
OF_SEQUENCES = ("attention_mask", "position_ids", *KINDS_OF_TOKENS)


@contextmanager
def one_prefill(model: PreTrainedModel, answers: int) -> Iterator[None]:
    """Let `model.generate(..., num_return_sequences=answers)` run each image and prompt once.

    By itself, generate repeats images and prompts before it runs them. Here the first forward pass gets them once, and
    its keys, values and logits are repeated. The answers are drawn from the same distributions.

    Args:
        model: The MLLM, whose cache grows as it generates.
        answers: Number of answers of each prompt.
    """
    unwrapped: Any = model
    expand, prefill = unwrapped._expand_inputs_for_generation, unwrapped._prefill

    def expand_sequences(
        expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        of_sequences = {name: value for name, value in kwargs.items() if name in OF_SEQUENCES}
        ids, repeated = expand(expand_size, is_encoder_decoder, input_ids, **of_sequences)
        return ids, {**kwargs, **repeated}

    def prefill_once(input_ids: Tensor, generation_config: Any, kwargs: dict[str, Any], **options: Any) -> Any:
        once = {name: _every(value, answers) if name in OF_SEQUENCES else value for name, value in kwargs.items()}
        outputs = prefill(input_ids[::answers], generation_config, once, **options)
        outputs.past_key_values.batch_repeat_interleave(answers)
        outputs.logits = outputs.logits.repeat_interleave(answers, 0)
        return outputs

    unwrapped._expand_inputs_for_generation, unwrapped._prefill = expand_sequences, prefill_once
    try:
        yield
    finally:
        del unwrapped._expand_inputs_for_generation, unwrapped._prefill


def _every(value: Tensor | None, answers: int) -> Tensor | None:
    """Return every sequence that begins a group: the first axis, or the second one of positions with three axes."""
    if value is None:
        return None
    return value[:, ::answers] if value.ndim == 3 else value[::answers]
