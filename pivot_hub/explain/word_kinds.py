"""Kinds of the words of an answer, such as colours and places, and the tokens that these words consist of.

A span `(start, end, kind)` is a part of a text, in characters, whose kind is known. All other text is of kind `other`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import ProcessorMixin

from pivot_hub.config.yaml_loader import read_yaml
from pivot_hub.data.synthetic import COLOUR_NAMES, NUMBERS, POSITIONS, SHAPES, SIZES
from pivot_hub.errors import CheckpointError, DataError, shown
from pivot_hub.mllm.chat_templates import answer_end

Span = tuple[int, int, str]
FindSpans = Callable[[str], list[Span]]
OTHER = "other"
VISUAL = "visual"  # all kinds but `other`
NUMBER = "number"  # kind that numbers in digits belong to as well
WORDS = Path(__file__).with_name("words.yaml")
SHAPES_WORDS: dict[str, Sequence[str]] = {  # the whole vocabulary of the synthetic Shapes dataset, without `no`
    "colour": COLOUR_NAMES,
    NUMBER: [word for word in NUMBERS if word != "no"],
    "place": sorted({word for position in POSITIONS for word in position.split()}),
    "shape": [*SHAPES, *(f"{shape}s" for shape in SHAPES), "crosses"],
    "size": tuple(SIZES),
    "presence": ("yes",),
}


def shapes_spans(answer: str) -> list[Span]:
    """Find the words of each kind in an answer of the synthetic Shapes dataset that has no fact.

    The kinds are exact: the vocabulary is closed and has one kind for each word. The exception is `no`, a number in
    `There are no stars` and a sign of presence in `No, there is no red star`.
    """
    no = r"(?P<number>(?<=There are )no)|(?P<presence>\bno\b)"
    spans = [(*match.span(), str(match.lastgroup)) for match in re.finditer(no, answer, re.IGNORECASE)]
    return sorted([*spans, *listed_spans(SHAPES_WORDS)(answer)])


def listed_spans(words: Mapping[str, Sequence[str]]) -> FindSpans:
    """Return a function that finds the words of a list in an answer, whatever the words mean there.

    Args:
        words: Words of each kind. Several words, as in `next to`, are found as a whole. If there is a kind `number`,
            numbers in digits belong to it.
    """
    kind_of = {word.lower(): kind for kind, of_kind in words.items() for word in of_kind}
    longest_first = sorted(map(re.escape, kind_of), key=len, reverse=True)
    if NUMBER in words:
        longest_first.append(r"\d+(?:[.,]\d+)*")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)
    return lambda answer: [(*match.span(), kind_of.get(match[0].lower(), NUMBER)) for match in pattern.finditer(answer)]


def read_words(path: Path = WORDS) -> dict[str, list[str]]:
    """Read the words of each kind from a YAML file of lines such as `colour: [red, green]`; by default ours.

    Raises:
        DataError: The file cannot be read, a kind has no words, a word is no text, or a word is of two kinds.
    """
    raw, where = read_yaml(path, "the words of each kind are expected, as in `colour: [red, green]`", DataError)
    kind_of: dict[str, str] = {}
    for kind, words in raw.items():
        if not isinstance(kind, str) or kind in (OTHER, VISUAL):
            raise DataError(f"{where(kind)}: {shown(kind)} cannot be the name of a kind; give it another one.")
        if not isinstance(words, list) or not words:
            raise DataError(f"{where(kind)}: `{kind}` has no list of words; write `{kind}: [first, second]`.")
        for i, word in enumerate(words):
            if not isinstance(word, str) or not word.strip():
                raise DataError(
                    f"{where(kind, i)}: {shown(word)} of `{kind}` is no text; put words such as yes and no in quotes."
                )
            first = kind_of.setdefault(word.lower(), kind)
            if first != kind:
                raise DataError(f"{where(kind, i)}: {word!r} is a word of `{first}` and of `{kind}`; keep one.")
    if not raw:
        raise DataError(f"{path}: there is no word in it; write lines such as `colour: [red, green]`.")
    return raw


def token_kinds(processor: ProcessorMixin, answer: str, spans: Sequence[Span]) -> list[str | None]:
    """Return the kind of each token of an answer, as `answer_batch` tokenises it.

    Args:
        processor: Processor of the MLLM.
        answer: The answer.
        spans: Spans of the answer, sorted.

    Returns:
        For each token the kind of the first span that it is part of, or `other`; None for tokens that end the turn.

    Raises:
        CheckpointError: The tokenizer does not say which characters a token stands for.
    """
    tokenizer = cast(Any, processor).tokenizer
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for; give an MLLM that has a "
            "tokenizer.json."
        )
    text = f"{answer}{answer_end(processor)}"
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [
        None
        if start >= len(answer)
        else next((kind for first, last, kind in spans if start < last and first < end), OTHER)
        for start, end in offsets
    ]
