"""What an MLLM's processor makes of one text and its images: token ids, kinds of tokens, and the images' tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from pivot_hub.errors import DataError, shown_text
from pivot_hub.mllm.families import family_of

# Outputs of processors that have one value for each token; all other outputs belong to the images.
KINDS_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")
TEXT_OUTPUTS = ("input_ids", "attention_mask", *KINDS_OF_TOKENS)


@dataclass
class ProcessedText:
    """A text and its images, as an MLLM takes them.

    Args:
        ids: Token ids, with the tokens of each image, (tokens,).
        kinds: Kind of each token, (tokens,), under the names of KINDS_OF_TOKENS that the processor gives.
        images: Tensors of the images, under the names of the model's arguments.
    """

    ids: list[int]
    kinds: dict[str, list[int]] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)


def process(processor: ProcessorMixin, text: str, images: Sequence[Image.Image] = ()) -> ProcessedText:
    """Prepare one text, in which a placeholder stands for each image, and its images.

    Raises:
        DataError: The text has another number of placeholders than there are images.
    """
    if text.count(placeholder_of(processor)) != len(images):
        raise DataError(f"the text of a row names another number of images than the row has: {shown_text(text)!r}.")
    if not images:  # the tokenizer alone takes a third of the time
        tokenizer: Any = processor.tokenizer
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ProcessedText(ids, {name: [0] * len(ids) for name in _kinds_of(processor)})
    outputs: Any = processor(images=[list(images)], text=[text], return_tensors="pt", add_special_tokens=False)
    return ProcessedText(
        outputs["input_ids"][0].tolist(),
        {name: outputs[name][0].tolist() for name in KINDS_OF_TOKENS if name in outputs},
        {name: value for name, value in outputs.items() if name not in TEXT_OUTPUTS},
    )


@lru_cache(maxsize=8)
def _kinds_of(processor: ProcessorMixin) -> tuple[str, ...]:
    """Return the kinds of tokens that a processor tells apart; text without images is of kind 0."""
    outputs: Any = processor(text=["a"], add_special_tokens=False)
    return tuple(name for name in KINDS_OF_TOKENS if name in outputs)


def placeholder_of(processor: ProcessorMixin) -> str:
    """Return the text that stands for an image in a prompt, which the processor replaces by the image's tokens."""
    names: Any = processor
    first_token = getattr(names, "boi_token", None)
    # Gemma 3's template writes the first of an image's tokens, and Gemma 4's the one that is repeated.
    if first_token is None or (processor.chat_template and first_token not in processor.chat_template):
        return str(names.image_token)
    return str(first_token)


def join_images(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the images of several texts to those of one batch.

    Tensors are joined along their first axis, of images, tiles or patches; where their other axes differ, as of images
    that are padded to the largest, they are padded with zeros as the processor would.
    """
    joined = {}
    for name in parts[0] if parts else ():
        tensors = [torch.as_tensor(part[name]) for part in parts]
        largest = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
        joined[name] = torch.cat([_padded_to(tensor, largest) for tensor in tensors])
    return joined


def left_padded(
    processor: ProcessorMixin | PreTrainedTokenizerBase, texts: Sequence[ProcessedText]
) -> dict[str, Tensor]:
    """Join texts and their images to one batch whose texts end together: ids, masks and kinds (texts, S), and images.

    Processors differ in the forms of several texts with images that they take; all take one text with its images.
    """
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    length = max(len(text.ids) for text in texts)
    kinds = {name for text in texts for name in text.kinds}

    def padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
        return torch.tensor([[padding] * (length - len(row)) + list(row) for row in rows])

    return {
        "input_ids": padded([text.ids for text in texts], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(text.ids) for text in texts], 0),
        **{name: padded([text.kinds.get(name, [0] * len(text.ids)) for text in texts], 0) for name in kinds},
        **join_images([text.images for text in texts if text.images]),
    }


def _padded_to(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [n for after in reversed(missing) for n in (0, after)])


def blank_images(model: PreTrainedModel, processor: ProcessorMixin) -> dict[str, Tensor]:
    """Return what the model's `get_image_features` takes of one black image."""
    outputs: Any = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    inner: Any = model.model
    accepted = inspect.signature(inner.get_image_features).parameters
    return {name: torch.as_tensor(value) for name, value in outputs.items() if name in accepted}


PositionsOf = Callable[[ProcessedText], Tensor]


def positions_of(model: PreTrainedModel) -> PositionsOf:
    """Return a function that gives the positions of a text's tokens in the language model, (axes, tokens).

    There is one axis, or three for models whose image tokens have a row and a column. The function holds the model's
    config and none of its weights, so that workers of a data loader can have it.
    """
    if family_of(model.config).positions == "1d":
        return _consecutive
    inner: Any = model.model
    without_weights = object.__new__(type(inner))
    nn.Module.__init__(without_weights)
    without_weights.config = inner.config
    return _RopePositions(without_weights)


def _consecutive(text: ProcessedText) -> Tensor:
    return torch.arange(len(text.ids))[None]


@dataclass
class _RopePositions:
    """Positions of a model with three axes, from its own `get_rope_index`."""

    without_weights: Any

    def __call__(self, text: ProcessedText) -> Tensor:
        get_rope_index = self.without_weights.get_rope_index
        if not text.images:
            return _consecutive(text).expand(3, -1)
        accepted = inspect.signature(get_rope_index).parameters
        known = {**text.images, **{name: torch.tensor([kinds]) for name, kinds in text.kinds.items()}}
        # The ids are on the CPU, and the images of answers that were generated are not.
        options = {name: value.cpu() for name, value in known.items() if name in accepted}
        positions: Tensor = get_rope_index(torch.tensor([text.ids]), **options)[0]
        return positions[:, 0]
