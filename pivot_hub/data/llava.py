"""Conversations: LLaVA's rows of `id, image, conversations`, turns from `human` and `gpt`, and chat messages."""

from __future__ import annotations

from typing import Any

from pivot_hub.data.row import Row, image_name
from pivot_hub.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def parse_conversation(name: str, record: dict[str, Any]) -> Row | DataError:
    """One row of a conversation, with all of its answers; what is said after the last answer is left out."""
    told = record.get("conversations") or record.get("messages")
    if not isinstance(told, list) or not told:
        return DataError(f"{name}: `conversations` is missing or empty")
    said = turns_of(name, told)
    if isinstance(said, DataError):
        return said
    # As LLaVA does: a conversation begins with the user, whoever spoke before.
    while said and said[0][0] == "assistant":
        said = said[1:]
    while said and said[-1][0] != "assistant":
        said = said[:-1]
    if len(said) < 2:
        return DataError(f"{name}: a conversation needs a human turn and then a gpt turn")
    image = image_name(record, name, "image", "images")
    if isinstance(image, DataError):
        return image
    return Row(name, image, said[-2][1], said[-1][1], earlier=tuple(said[:-2]))


def turns_of(name: str, told: list[Any]) -> list[tuple[str, str]] | DataError:
    """Turns as (role, text), from LLaVA's `from` and `value` or from chat messages' `role` and `content`."""
    said = []
    for turn in told:
        try:
            role = ROLES[turn["from"] if "from" in turn else turn["role"]]
            said.append((role, _text(turn["value"] if "value" in turn else turn["content"])))
        except (KeyError, TypeError) as error:
            return DataError(f"{name}: a turn needs `from` (human or gpt) and `value`, not {error}")
    return said


def _text(content: Any) -> str:
    """The text of a message: itself, or its parts, an image as its tag."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise TypeError(repr(content))
    return "".join(part["text"] if part["type"] == "text" else "<image>\n" for part in content)
