"""Conversations as tokens and labels, for the stages align, instruct and sft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LlavaProcessor

from pivot_hub.errors import DataError, shown_text
from pivot_hub.mllm.chat_templates import markers_of

IGNORED = -100  # label of a token that the loss ignores
Labels = Literal["llava_next"] | None


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text.

    Args:
        text: Text in the chat format.
        answer: Whether the text is an answer of the assistant, with the end of its turn.
        header: Whether the text opens a turn of the assistant.
    """

    text: str
    answer: bool = False
    header: bool = False


def segments(processor: LlavaProcessor, messages: Sequence[dict[str, Any]]) -> list[Segment]:
    """Split a conversation into prompts, the header of each answer's turn, and answers.

    Joined, the segments are the text that the chat template gives for the whole conversation.

    Args:
        processor: Processor with the chat template.
        messages: The conversation, up to and including its last answer.
    """

    def rendered(count: int, open_answer: bool = False) -> str:
        """Render the first messages, with the header of the next answer where `open_answer` is set."""
        first_messages: Any = list(messages[:count])
        return str(processor.apply_chat_template(first_messages, add_generation_prompt=open_answer, tokenize=False))

    result: list[Segment] = []
    previous = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, with_header, with_answer = rendered(i), rendered(i, open_answer=True), rendered(i + 1)
        result += [
            Segment(before.removeprefix(previous)),
            Segment(with_header.removeprefix(before), header=True),
            Segment(with_answer.removeprefix(with_header), answer=True),
        ]
        previous = with_answer
    return result


@dataclass
class ConversationCollator:
    """Turns rows into the batch of a LLaVA-style model, with labels.

    A row has `images` and either `messages`, a conversation in which every answer is learnt, or `prompt` and
    `completion`, plain text. The row's number in the index is passed on under `row`.

    Args:
        processor: The model's processor, in whose text an image is a run of one token.
        max_length: Largest number of tokens of a row, image tokens included; longer rows are cut at their end.
        labels: The tokens that the loss is on. None selects the answers with the end of their turn. `llava_next`
            selects what LLaVA-NeXT's code does, which the paper's authors ran: also the header of an answer's turn,
            and every turn marker and newline in all turns.
    """

    processor: LlavaProcessor
    max_length: int | None = None
    labels: Labels = None
    _markers: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self._markers = set(markers_of(self.processor.tokenizer)) if self.labels == "llava_next" else set()

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B rows.

        Returns:
            input_ids, attention_mask and labels (B, longest), padded on the right; pixel_values (images, ...) if any
            row has an image; row (B,) if the rows have numbers.
        """
        pixels, runs = prepare_images(self.processor, [image for e in examples for image in e["images"]])
        batch: dict[str, Any] = {} if pixels is None else {"pixel_values": pixels}
        widths = iter(runs)
        rows = [self._tokens(e, [next(widths) for _ in e["images"]]) for e in examples]
        tokenizer: Any = self.processor.tokenizer
        ids, labels = zip(*rows, strict=True)
        batch["input_ids"] = padded(ids, tokenizer.pad_token_id)
        batch["attention_mask"] = padded([[1] * len(i) for i in ids], 0)
        batch["labels"] = padded(labels, IGNORED)
        if "row" in examples[0]:
            batch["row"] = torch.tensor([e["row"] for e in examples])
        return batch

    def _tokens(self, example: dict[str, Any], widths: list[int]) -> tuple[list[int], list[int]]:
        """Return ids and labels of one row; each image token is repeated once per feature of its image."""
        if "messages" in example:
            pieces = segments(self.processor, example["messages"])
        else:
            pieces = [Segment(example["prompt"]), Segment(example["completion"], answer=True)]
        tokenizer: Any = self.processor.tokenizer
        image, runs = self.processor.image_token_id, iter(widths)
        ids: list[int] = []
        labels: list[int] = []
        texts = [p.text for p in pieces]
        pieces_ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        if sum(i.count(image) for i in pieces_ids) != len(widths):
            raise DataError(
                f"the text of a row names another number of images than the row has: {shown_text(''.join(texts))!r}."
            )
        for piece, tokens in zip(pieces, pieces_ids, strict=True):
            learnt = piece.answer or (piece.header and self.labels == "llava_next")
            for token in tokens:
                times = next(runs) if token == image else 1
                ids += [token] * times
                labels += [token if learnt or token in self._markers else IGNORED] * times
        if self.max_length is not None and len(ids) > self.max_length:
            ids, labels = ids[: self.max_length], labels[: self.max_length]
            if all(label == IGNORED for label in labels):
                raise DataError(
                    f"a row has no answer token left in max_length {self.max_length}: {shown_text(''.join(texts))!r}; "
                    "raise max_length."
                )
        return ids, labels


def prepare_images(processor: LlavaProcessor, images: Sequence[Any]) -> tuple[torch.Tensor | None, list[int]]:
    """Prepare images for the model.

    Returns:
        Pixel values (images, ...), None without an image, and the number of image tokens of each image.
    """
    if not images:
        return None, []
    text = [processor.image_token] * len(images)
    batch: Any = processor(images=list(images), text=text, return_tensors="pt", padding=True, add_special_tokens=False)
    return batch["pixel_values"], (batch["input_ids"] == processor.image_token_id).sum(1).tolist()


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """Stack rows of different lengths to (rows, longest), padded on the right with a value."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
