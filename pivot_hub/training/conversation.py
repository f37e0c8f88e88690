"""Conversations as tokens and labels: what align, instruct and sft train on, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import LlavaProcessor

from pivot_hub.errors import DataError
from pivot_hub.mllm.chat_templates import markers_of

IGNORED = -100  # a label that the loss leaves out
Labels = Literal["llava_next"] | None


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text.

    Args:
        text: in the chat format.
        answer: whether it is the assistant's, with the end of its turn.
        header: whether it opens the assistant's turn.
    """

    text: str
    answer: bool = False
    header: bool = False


def segments(processor: LlavaProcessor, messages: Sequence[dict[str, Any]]) -> list[Segment]:
    """Cut a conversation into what is asked, the header of each answer's turn, and the answers.

    Together they are the text that the chat template gives for the whole conversation.
    """

    def rendered(count: int, prompt: bool = False) -> str:
        said: Any = list(messages[:count])
        return str(processor.apply_chat_template(said, add_generation_prompt=prompt, tokenize=False))

    made: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, opened, told = rendered(i), rendered(i, prompt=True), rendered(i + 1)
        made += [
            Segment(asked.removeprefix(done)),
            Segment(opened.removeprefix(asked), header=True),
            Segment(told.removeprefix(opened), answer=True),
        ]
        done = told
    return made


@dataclass
class ConversationCollator:
    """Turns rows into the batch of a LLaVA-style model, with labels.

    A row is `images` with either `messages`, a conversation whose every answer is learnt, or `prompt` and `completion`,
    plain text. Its number in the index, under `row`, goes along.

    Args:
        processor: of the model: an image is a run of one token.
        max_length: tokens of a row, image tokens included; what is longer is cut at its end.
        labels: None for the answers with the end of their turn; `llava_next` as LLaVA-NeXT's code, which the paper's
            authors ran: also the header of an answer's turn, and every turn marker and newline, whoever's turn it is.
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
            input_ids, attention_mask, labels (B, longest), padded on the right; pixel_values (images, ...) where a row
            has one; row (B,).
        """
        pixels, runs = prepare_images(self.processor, [image for e in examples for image in e["images"]])
        made: dict[str, Any] = {} if pixels is None else {"pixel_values": pixels}
        widths = iter(runs)
        rows = [self._tokens(e, [next(widths) for _ in e["images"]]) for e in examples]
        tokenizer: Any = self.processor.tokenizer
        ids, labels = zip(*rows, strict=True)
        made["input_ids"] = padded(ids, tokenizer.pad_token_id)
        made["attention_mask"] = padded([[1] * len(i) for i in ids], 0)
        made["labels"] = padded(labels, IGNORED)
        if "row" in examples[0]:
            made["row"] = torch.tensor([e["row"] for e in examples])
        return made

    def _tokens(self, example: dict[str, Any], widths: list[int]) -> tuple[list[int], list[int]]:
        """Ids of one row, each image token as often as its image has features, and labels."""
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
            raise DataError(f"a row names another number of images than it has: {''.join(texts)!r}.")
        for piece, tokens in zip(pieces, pieces_ids, strict=True):
            learnt = piece.answer or (piece.header and self.labels == "llava_next")
            for token in tokens:
                times = next(runs) if token == image else 1
                ids += [token] * times
                labels += [token if learnt or token in self._markers else IGNORED] * times
        return ids[: self.max_length], labels[: self.max_length]


def prepare_images(processor: LlavaProcessor, images: Sequence[Any]) -> tuple[torch.Tensor | None, list[int]]:
    """Pixel values (images, ...), None without an image, and how many image tokens each becomes."""
    if not images:
        return None, []
    text = [processor.image_token] * len(images)
    made: Any = processor(images=list(images), text=text, return_tensors="pt", padding=True, add_special_tokens=False)
    return made["pixel_values"], (made["input_ids"] == processor.image_token_id).sum(1).tolist()


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """(rows, longest), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
