"""LLaVA's format: JSON or JSONL rows of `id, image, conversations`, turns from `human` and `gpt`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pivot_hub.data.row import Row, image_name, read_records
from pivot_hub.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_rows(file: Path) -> Iterator[Row | DataError]:
    """Yield one row for each answer of each conversation: the turns before it are its prompt.

    A row that does not fit the format is yielded as the error that says why, so that the caller can count it.
    """
    for name, raw in read_records(file):
        if isinstance(raw, DataError):
            yield raw
            continue
        turns = raw.get("conversations")
        if not isinstance(turns, list) or not turns:
            yield DataError(f"{name}: `conversations` is missing or empty")
            continue
        try:
            said = [(ROLES[t["from"]], str(t["value"])) for t in turns]
        except (KeyError, TypeError) as error:
            yield DataError(f"{name}: a turn needs `from` (human or gpt) and `value`, not {error}")
            continue
        answers = [i for i, (role, _) in enumerate(said) if role == "assistant"]
        if not answers or answers[0] == 0:
            yield DataError(f"{name}: a conversation needs a human turn and then a gpt turn")
            continue
        image = image_name(raw, name)
        if isinstance(image, DataError):
            yield image
            continue
        for i in answers:
            row_id = name if len(answers) == 1 else f"{name} turn {i + 1}"
            yield Row(row_id, image, said[i - 1][1], said[i][1], earlier=tuple(said[: i - 1]))
