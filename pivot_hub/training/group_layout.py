"""The answers of one prompt as a tree: image and prompt come once, then every answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid

from pivot_hub.mllm.inputs import PositionsOf, ProcessedText, join_images
from pivot_hub.training.conversation import padded
from pivot_hub.training.tree_row import tree_row


@dataclass
class _Group:
    """Consecutive sequences with the same images and prompt: the prompt, and the answer of each, which may be empty."""

    prompt: ProcessedText
    answers: list[list[int]] = field(default_factory=list)


def group_trees(
    ids: Tensor,
    mask: Tensor,
    answer_tokens: int,
    positions: PositionsOf,
    kinds: dict[str, Tensor],
    images: list[dict[str, Tensor]],
) -> dict[str, Any]:
    """Lay out TRL's padded sequences as trees, one for each run of sequences with the same images and prompt.

    Args:
        ids: Token ids, prompts padded on the left and answers on the right, (B, prompt + answer).
        mask: 1 for tokens and 0 for padding, of the same shape.
        answer_tokens: Number of columns of the answers.
        positions: Function that returns the positions of a prompt's tokens, see `positions_of`.
        kinds: Kinds of the tokens, of the same shape.
        images: Tensors of the images of each sequence.

    Returns:
        What an MLLM with `use_trees` and TRL's fused head takes: input_ids and the kinds of tokens (1, tokens),
        tree_positions (1, tokens) or (3, 1, tokens), tree_take and labels (B, 1 + answer), tree_layout, and the tensors
        of the images, those of each tree once.
    """
    groups = _groups(ids, mask, answer_tokens, kinds, images)
    row = tree_row([group.prompt for group in groups], [group.answers for group in groups], positions)
    answers = ids[:, -answer_tokens:].masked_fill(mask[:, -answer_tokens:] == 0, -100)
    # As wide as the labels: the longest answer of all sequences may be in another batch.
    places = padded([*(place for places in row.places for place in places), [0] * (1 + answer_tokens)], 0)[:-1]
    tensors = {"input_ids": row.ids, "tree_take": places, **row.inputs}
    return {
        **{name: tensor.to(ids.device) for name, tensor in tensors.items()},
        "tree_layout": row.layout(),
        "labels": torch.nn.functional.pad(answers, (1, 0), value=-100),
        **join_images([group.prompt.images for group in groups if group.prompt.images]),
    }


def _groups(
    ids: Tensor, mask: Tensor, answer_tokens: int, kinds: dict[str, Tensor], images: list[dict[str, Tensor]]
) -> list[_Group]:
    """Return the groups of consecutive sequences with the same images and prompt."""
    on_cpu = {name: tensor.cpu() for name, tensor in kinds.items()}
    prompt_tokens = ids.shape[1] - answer_tokens
    groups: list[_Group] = []
    same_images = _same_as_before(images)
    for i, (row, kept) in enumerate(zip(ids.cpu(), mask.bool().cpu(), strict=True)):
        is_prompt, is_answer = kept[:prompt_tokens], kept[prompt_tokens:]
        prompt_ids = row[:prompt_tokens][is_prompt].tolist()
        last = groups[-1].prompt if groups else None
        if last is None or last.ids != prompt_ids or not same_images[i]:
            prompt_kinds = {name: values[i, :prompt_tokens][is_prompt].tolist() for name, values in on_cpu.items()}
            groups.append(_Group(ProcessedText(prompt_ids, prompt_kinds, images[i])))
        groups[-1].answers.append(row[prompt_tokens:][is_answer].tolist())
    return groups


def _same_as_before(images: list[dict[str, Tensor]]) -> list[bool]:
    """Return whether each sequence has the images of the one before it. The device is read once for all of them."""
    pairs = list(pairwise(images))
    alike = [
        before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
        for before, after in pairs
    ]
    compared = [
        torch.stack([(before[name] == after[name]).all() for name in before]).all()
        for (before, after), comparable in zip(pairs, alike, strict=True)
        if comparable and before
    ]
    equal = iter(torch.stack(compared).tolist() if compared else [])
    return [
        False,
        *(comparable and (not before or next(equal)) for (before, _), comparable in zip(pairs, alike, strict=True)),
    ]


def images_of_sequences(
    count: int, num_images: list[int] | None, num_tiles: list[int] | None, tensors: dict[str, Tensor | None]
) -> list[dict[str, Tensor]]:
    """Return the images' tensors of each of TRL's sequences, as its own batches divide them.

    Args:
        count: Number of sequences.
        num_images: Number of images of each sequence; None where none has an image.
        num_tiles: Number of tiles of each sequence, for models whose pixels are counted in tiles.
        tensors: Tensors of all images.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if num_images is None or not given:
        return [{} for _ in range(count)]
    counts: dict[str, Any] = {"num_images": num_images} | ({} if num_tiles is None else {"num_tiles": num_tiles})
    divided = split_pixel_values_by_grid({**given, **counts})
    return [
        {name: part for name in given if (part := _of_sequence(divided[name], i)).numel()} if num_images[i] else {}
        for i in range(count)
    ]


def _of_sequence(values: Tensor | list[Tensor], i: int) -> Tensor:
    return values[i] if isinstance(values, list) else values[i : i + 1]
