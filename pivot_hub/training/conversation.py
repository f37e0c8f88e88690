"""Conversations as tokens and labels, for the stages align, instruct and sft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from transformers import ProcessorMixin

from pivot_hub.errors import DataError, shown_text
from pivot_hub.mllm.chat_templates import markers_of
from pivot_hub.mllm.inputs import PositionsOf, ProcessedText, join_images, placeholder_of, process
from pivot_hub.training.tree_row import tree_row

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


def segments(processor: ProcessorMixin, messages: Sequence[dict[str, Any]]) -> list[Segment]:
    """Split a conversation into prompts, the header of each answer's turn, and answers.

    Joined, the segments are the text that the chat template gives for the whole conversation.

    Args:
        processor: Processor with the chat template.
        messages: The conversation, up to and including its last answer.

    Raises:
        DataError: The template writes the beginning of a conversation otherwise once more follows, so that answers
            cannot be told from prompts.
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
        for shorter, longer in ((previous, before), (before, with_header), (with_header, with_answer)):
            if not longer.startswith(shorter):
                raise DataError(
                    f"the chat template does not write {shown_text(shorter)!r} at the start of {shown_text(longer)!r}, "
                    "so a row's answers cannot be told from its prompts; give the processor a template that only adds "
                    "to what it has written."
                )
        result += [
            Segment(before.removeprefix(previous)),
            Segment(with_header.removeprefix(before), header=True),
            Segment(with_answer.removeprefix(with_header), answer=True),
        ]
        previous = with_answer
    return result


@dataclass
class ConversationCollator:
    """Turns rows into the batch of an MLLM, with labels.

    A row has `images` and either `messages`, a conversation in which every answer is learnt, or `prompt` and
    `completion`, plain text. The row's number in the index is passed on under `row`.

    Args:
        processor: The model's processor.
        max_length: Largest number of tokens of a row, image tokens included; longer rows are cut at their end.
        labels: The tokens that the loss is on. None selects the answers with the end of their turn. `llava_next`
            selects what LLaVA-NeXT's code does, which the paper's authors ran: also the header of an answer's turn,
            and every turn marker and newline in all turns.
        positions: Function that returns the positions of a text's tokens, see `positions_of`. Rows are then laid out
            one after the other as trees, see `use_trees`; without it they are padded to the longest.
        weigh_rows: Whether the batch has the weight of each label in a loss that is a mean over rows.
    """

    processor: ProcessorMixin
    max_length: int | None = None
    labels: Labels = None
    positions: PositionsOf | None = None
    weigh_rows: bool = False
    _markers: set[int] = field(init=False)

    def __post_init__(self) -> None:
        tokenizer: Any = self.processor.tokenizer
        self._markers = set(markers_of(tokenizer)) if self.labels == "llava_next" else set()

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate B rows.

        Returns:
            input_ids, attention_mask, labels and the kinds of tokens, padded on the right to (B, longest), or with
            `positions` one after the other as (1, tokens), with tree_positions and tree_layout; the tensors of the
            images; row, B numbers that stay on the CPU, if the rows have them; and with `weigh_rows`, label_weights of
            the shape of labels, which sum to 1 over each row.
        """
        texts, labels = zip(*(self._tokens(e) for e in examples), strict=True)
        # Nothing predicts the first token of a row, which LLaVA-NeXT's code labels too.
        predicted = [[IGNORED, *row[1:]] for row in labels]
        weights = [[0 if label == IGNORED else 1 / _learnt(row) for label in row] for row in predicted]
        if self.positions is None:
            batch = self._padded(texts, labels, weights)
        else:
            batch = self._in_one_row(texts, predicted, weights, self.positions)
        batch |= join_images([text.images for text in texts if text.images])
        if not self.weigh_rows:
            del batch["label_weights"]
        if "row" in examples[0]:
            batch["row"] = [e["row"] for e in examples]
        return batch

    def _padded(
        self, texts: Sequence[ProcessedText], labels: Sequence[list[int]], weights: Sequence[list[float]]
    ) -> dict[str, Any]:
        tokenizer: Any = self.processor.tokenizer
        return {
            "input_ids": padded([text.ids for text in texts], tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(text.ids) for text in texts], 0),
            "labels": padded(labels, IGNORED),
            "label_weights": padded(weights, 0),
            **{name: padded([text.kinds[name] for text in texts], 0) for name in texts[0].kinds},
        }

    def _in_one_row(
        self,
        texts: Sequence[ProcessedText],
        labels: Sequence[list[int]],
        weights: Sequence[list[float]],
        positions: PositionsOf,
    ) -> dict[str, Any]:
        row = tree_row(texts, [()] * len(texts), positions)
        return {
            "input_ids": row.ids,
            "attention_mask": torch.ones_like(row.ids),
            "labels": torch.tensor([[label for labels_of_row in labels for label in labels_of_row]]),
            "label_weights": torch.tensor([[weight for weights_of_row in weights for weight in weights_of_row]]),
            "tree_layout": row.layout(),
            **row.inputs,
        }

    def _tokens(self, example: dict[str, Any]) -> tuple[ProcessedText, list[int]]:
        """Return tokens and labels of one row."""
        if "messages" in example:
            pieces = segments(self.processor, example["messages"])
        else:
            pieces = [Segment(example["prompt"]), Segment(example["completion"], answer=True)]
        placeholder, images = placeholder_of(self.processor), list(example["images"])
        whole = "".join(piece.text for piece in pieces)
        if whole.count(placeholder) != len(images):
            raise DataError(
                f"the text of a row names another number of images than the row has: {shown_text(whole)!r}."
            )
        tokens, labels = ProcessedText([]), []
        parts_with_images = []
        for piece in pieces:
            shown = [images.pop(0) for _ in range(piece.text.count(placeholder))]
            part = process(self.processor, piece.text, shown)
            learnt = piece.answer or (piece.header and self.labels == "llava_next")
            labels += [token if learnt or token in self._markers else IGNORED for token in part.ids]
            tokens.ids += part.ids
            for name, kinds in part.kinds.items():
                tokens.kinds[name] = tokens.kinds.get(name, []) + kinds
            parts_with_images += [part.images] if shown else []
        tokens.images = join_images(parts_with_images)
        token_id: Any = cast(Any, self.processor).image_token_id
        if self.max_length is not None and len(tokens.ids) > self.max_length:
            if token_id in tokens.ids[self.max_length :]:
                raise DataError(
                    f"a row's image lies behind max_length {self.max_length}: {shown_text(whole)!r}; raise max_length."
                )
            labels = labels[: self.max_length]
            tokens = ProcessedText(
                tokens.ids[: self.max_length],
                {name: kinds[: self.max_length] for name, kinds in tokens.kinds.items()},
                tokens.images,
            )
            if all(label == IGNORED for label in labels):
                raise DataError(
                    f"a row has no answer token left in max_length {self.max_length}: {shown_text(whole)!r}; "
                    "raise max_length."
                )
        return tokens, labels


def _learnt(labels: Sequence[int]) -> int:
    """Number of labels that the loss is on."""
    return sum(label != IGNORED for label in labels)


def padded(rows: Sequence[Sequence[float]], value: float) -> torch.Tensor:
    """Stack rows of different lengths to (rows, longest), padded on the right with a value."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=value)
