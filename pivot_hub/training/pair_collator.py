"""Preference rows as batches: as trees, in which image and prompt come once for both answers, or as TRL pads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from pivot_hub.data.image import open_image, to_rgb
from pivot_hub.data.preference import REJECTED_IMAGE_KEYS
from pivot_hub.errors import DataError, shown
from pivot_hub.mllm.inputs import PositionsOf, ProcessedText, join_images, process
from pivot_hub.training.conversation import padded
from pivot_hub.training.tree_row import tree_row

Logps = tuple[float, float]  # log-probabilities of the chosen and the rejected answer
References = Callable[[dict[str, Any]], Logps]


@dataclass
class PairCollator:
    """Turns preference rows into trees, see `use_trees`, and into the rows of answers that TRL's loss reads.

    Args:
        processor: Processor of the MLLM.
        positions: Function that returns the positions of a text's tokens, see `positions_of`.
        max_length: Largest number of tokens of prompt and answer together; answers are cut, as TRL does.
        references: Function that returns the reference log-probabilities of a row.
        reads_rejected_images: Whether each row is a second pair too, with its rejected images; these B pairs follow
            the others.
    """

    processor: ProcessorMixin
    positions: PositionsOf
    max_length: int | None = None
    references: References | None = None
    reads_rejected_images: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows."""
        return self.collate(with_rejected_images(examples) if self.reads_rejected_images else examples)

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B pairs.

        Returns:
            input_ids and completion_mask (2B, 1 + answer), chosen answers first: the prompt's last token, then the
            answer; attention_mask (2B, prompt + answer), from which TRL counts tokens; tree_ids and the kinds of tokens
            (1, tokens); tree_positions (1, tokens) or (3, 1, tokens); tree_take (2B, 1 + answer), the place of each of
            input_ids in the row; tree_layout; the tensors of the images, those of rows with the same images once; row,
            B numbers that stay on the CPU, if the examples have them; ref_chosen_logps and ref_rejected_logps (B,) with
            `references`.
        """
        tokenizer: Any = self.processor.tokenizer
        images = [images_of(e) for e in examples]
        texts = [rendered(e, i, self.processor) for e, i in zip(examples, images, strict=True)]
        prompts = [process(self.processor, t["prompt"], i) for t, i in zip(texts, images, strict=True)]
        answers = [
            self._cut(examples, prompts, tokenizer([t[side] for t in texts], add_special_tokens=False)["input_ids"])
            for side in ("chosen", "rejected")
        ]
        distinct, image_index = self._distinct(images, prompts)
        batch = {**self._laid_out(prompts, answers, image_index), **join_images(distinct)}
        return with_references(batch, examples, self.references)

    def _distinct(
        self, images: list[list[Image.Image]], prompts: list[ProcessedText]
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """Select the images to encode.

        Returns:
            The tensors of the images, those of rows that show the same images once; and for each image token, the
            number of its feature, None where no two rows show the same.
        """
        image_token: int = self.processor.image_token_id  # type: ignore[attr-defined]
        first_feature: dict[tuple[str, ...], int] = {}
        distinct, indices, features = [], [], 0
        for row_images, prompt in zip(images, prompts, strict=True):
            if not row_images:
                continue
            key, tokens = tuple(image_key(i) for i in row_images), prompt.ids.count(image_token)
            if key not in first_feature:
                first_feature[key] = features
                features += tokens
                distinct.append(prompt.images)
            indices.append(torch.arange(first_feature[key], first_feature[key] + tokens))
        return distinct, torch.cat(indices) if len(distinct) < len(indices) else None

    def _cut(
        self, examples: Sequence[dict[str, Any]], prompts: list[ProcessedText], answers: list[list[int]]
    ) -> list[list[int]]:
        """Cut answers that are longer than `max_length` allows behind their prompt.

        Raises:
            DataError: A prompt is empty, or leaves no room for an answer.
        """
        for example, prompt in zip(examples, prompts, strict=True):
            if not prompt.ids:
                raise DataError(
                    f"{_row_name(example)}: the prompt is empty, but an answer's first token is predicted from the "
                    "prompt; give the row a prompt."
                )
            if self.max_length is not None and len(prompt.ids) >= self.max_length:
                raise DataError(
                    f"{_row_name(example)}: image and prompt take {len(prompt.ids)} tokens and leave no room for an "
                    f"answer in max_length {self.max_length}; raise max_length."
                )
        if self.max_length is None:
            return answers
        return [a[: self.max_length - len(p.ids)] for p, a in zip(prompts, answers, strict=True)]

    def _laid_out(
        self, prompts: list[ProcessedText], answers: list[list[list[int]]], image_index: torch.Tensor | None
    ) -> dict[str, Any]:
        """Lay out B pairs as trees.

        Args:
            prompts: The prompts.
            answers: Token ids of the chosen answers, and of the rejected ones.
            image_index: For each image token, the number of its feature.
        """
        row = tree_row(prompts, list(zip(*answers, strict=True)), self.positions)
        tokenizer: Any = self.processor.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ends = [(p.ids[-1], a) for side in answers for p, a in zip(prompts, side, strict=True)]
        lengths = [len(p.ids) + len(a) for side in answers for p, a in zip(prompts, side, strict=True)]
        return {
            "input_ids": padded([[end, *answer] for end, answer in ends], padding),
            "completion_mask": padded([[0] + [1] * len(answer) for _, answer in ends], 0),
            "attention_mask": padded([[1] * n for n in lengths], 0),
            "tree_ids": row.ids,
            "tree_take": padded([place[side] for side in range(len(answers)) for place in row.places], 0),
            "tree_layout": row.layout(image_index),
            **row.inputs,
        }


@dataclass
class PaddedPairCollator(DataCollatorForVisionPreference):
    """TRL's collator, which also takes images as paths and arrays, and passes on numbers and reference values of rows.

    Args:
        references: Function that returns the reference log-probabilities of a row.
        reads_rejected_images: Whether each row is a second pair too, as in `PairCollator`.
    """

    references: References | None = None
    reads_rejected_images: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows."""
        return self.collate(with_rejected_images(examples) if self.reads_rejected_images else examples)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate B pairs as TRL does.

        Raises:
            DataError: An answer has no token left in `max_length`: its loss would be log 2 without end.
        """
        decoded = [{k: v for k, v in e.items() if k != "image"} | {"images": images_of(e)} for e in examples]
        batch = super().torch_call(decoded)
        answered = batch["completion_mask"].any(1)
        if self.max_length is not None and not answered.all():
            raise DataError(
                f"{int((~answered).sum())} of {len(answered)} answers of a batch have no token left in max_length "
                f"{self.max_length}, which image and prompt fill; raise max_length."
            )
        return with_references(batch, examples, self.references)


def with_rejected_images(examples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return preference rows as pairs: those of the images, then those of the rejected images, which have no number.

    Raises:
        DataError: A row has no rejected image, another number of them than of images, or the images themselves.
    """
    pairs, other_pairs = [], []
    for example in examples:
        texts = {key: value for key, value in example.items() if key not in ("image", "images", *REJECTED_IMAGE_KEYS)}
        rejected = next((example[key] for key in REJECTED_IMAGE_KEYS if example.get(key)), None)
        if rejected is None:
            raise DataError(f"{_row_name(example)} has no rejected image, which the loss compares with; give it one.")
        images, name = images_of(example), _row_name(example)
        rejected_images = [_decoded(i, name) for i in (rejected if isinstance(rejected, list) else [rejected])]
        if len(images) != len(rejected_images):
            raise DataError(
                f"{name}: {len(images)} images and {len(rejected_images)} rejected ones; give each image its rejected "
                "one."
            )
        if all(_same_pixels(*both) for both in zip(images, rejected_images, strict=True)):
            raise DataError(
                f"{name}: image and rejected image are the same; give one that the answer does not describe."
            )
        pairs.append({**texts, "images": images})
        other_pairs.append({key: value for key, value in texts.items() if key != "row"} | {"images": rejected_images})
    return pairs + other_pairs


def with_references(batch: Any, examples: Sequence[dict[str, Any]], references: References | None) -> Any:
    """Add the numbers of rows to a batch, and the reference log-probabilities (B,) of its B pairs where known."""
    if "row" in examples[0]:
        batch["row"] = [e["row"] for e in examples if "row" in e]
    if references is not None:
        chosen, rejected = zip(*(references(e) for e in examples), strict=True)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = torch.tensor(chosen), torch.tensor(rejected)
    return batch


def rendered(example: dict[str, Any], images: list[Any], processor: ProcessorMixin) -> dict[str, str]:
    """Return prompt and answers as text; messages go through the chat template."""
    texts: dict[str, Any] = {side: example[side] for side in ("prompt", "chosen", "rejected")}
    if is_conversational(texts):
        texts = {
            "prompt": prepare_multimodal_messages(texts["prompt"], images=images),
            "chosen": prepare_multimodal_messages(texts["chosen"]),
            "rejected": prepare_multimodal_messages(texts["rejected"]),
        }
        texts = apply_chat_template(cast(Any, {**texts, "chat_template_kwargs": template_options(example)}), processor)
    return texts


def template_options(example: dict[str, Any]) -> dict[str, Any]:
    """Return a row's own arguments of the chat template, as TRL passes them on.

    A table stores the arguments of other rows as None in this one, which a template would take for a value.
    """
    return {k: v for k, v in (example.get("chat_template_kwargs") or {}).items() if v is not None}


def image_key(image: Any) -> str:
    """Return a hash of a decoded image: of its mode, size and pixels, which a palette's colours belong to."""
    image = image.convert("RGBA") if image.mode in ("P", "PA") else image
    header = f"{image.mode}{image.size}".encode()
    return hashlib.blake2b(header + image.tobytes(), digest_size=16).hexdigest()


def _same_pixels(image: Image.Image, other: Image.Image) -> bool:
    return (image.mode, image.size) == (other.mode, other.size) and image_key(image) == image_key(other)


def images_of(example: dict[str, Any]) -> list[Image.Image]:
    """Return the images of a preference row, decoded: as TRL, paths and arrays are read too.

    Raises:
        DataError: An image is something else, or cannot be read.
    """
    images = [example["image"]] if "image" in example else list(example.get("images") or [])
    return [_decoded(image, _row_name(example)) for image in images]


def _decoded(image: Any, owner: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(Path(image), owner)
    array = np.asarray(image) if isinstance(image, np.ndarray | torch.Tensor) else None
    if array is not None and array.ndim == 3 and array.dtype == np.uint8:
        if array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
            array = array.transpose(1, 2, 0)
        if array.shape[2] in (1, 3, 4):
            return to_rgb(Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else np.ascontiguousarray(array)))
    found = shown(image) if array is None else f"an array {array.shape} of {array.dtype}"
    raise DataError(f"{owner}: {found} is no image; give a PIL image, a path, or an array (height, width, 3) of uint8.")


def _row_name(example: dict[str, Any]) -> str:
    if "row" in example:
        return f"row {example['row']}"
    return f"the row with the prompt {shown(example.get('prompt'))}"
